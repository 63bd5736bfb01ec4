"""Single frames of video files, found by their time stamp, with PyAV (the decoders of FFmpeg; extra `lerobot`).

Containers cannot be shared between threads, so each thread keeps the files that it used last open.
"""

import re
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Tuple

import numpy as np

from vlakeep.data.index import optional

_OPEN_FILES = 8  # per thread
_AGAIN = "copy, download or make the file again"
TOLERANCE = 0.25  # of a frame's time
_ATTACHED = 0x400  # AV_DISPOSITION_ATTACHED_PIC


def _open(path: Path):
    av = optional("av", "lerobot", f"reading {path}")
    try:
        container = av.open(str(path))
        if not container.streams.video:
            raise ValueError("no video stream")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be opened as a video ({error}); {_AGAIN}") from error
    streams = _views(container)
    if len(streams) != 1:
        sizes = ", ".join(f"{one.codec_context.width} x {one.codec_context.height}" for one in streams if one.codec_context)
        container.close()
        raise ValueError(f"{path} holds {len(streams)} video streams ({sizes}), and which one is the camera it does not say: write that "
                         "one alone, such as the first by ffmpeg -i IN -map 0:v:0 -c copy OUT")
    codec = streams[0].codec_context
    if codec is None or not streams[0].time_base:  # a damaged header names none that there is
        container.close()
        raise ValueError(f"{path} cannot be opened as a video (no decoder for it, or no time base); {_AGAIN}")
    kind = str(codec.pix_fmt or "")
    if re.fullmatch(r"gray(9|1\d|f).*", kind):  # which a conversion to colour would cut to grey levels without meaning
        container.close()
        raise ValueError(f"{path}: a video of more than 8 bits of grey ({kind}), such as depth, holds no colour pictures: choose another "
                         "camera with --data.camera or `camera:` in the data card")
    codec.thread_count = 1  # data.workers is the number of threads
    return container


def _views(container) -> list:
    """The video streams of a container, without a still picture that it carries as its cover; a single one is no cover."""
    streams = list(container.streams.video)
    return [one for one in streams if len(streams) == 1 or not _is_cover(one)]


def _is_cover(stream) -> bool:
    still = stream.codec_context is not None and stream.codec_context.name in ("mjpeg", "png", "bmp", "gif", "webp")
    return bool(int(getattr(stream, "disposition", 0)) & _ATTACHED) or (still and stream.frames == 1)


def _upright(picture) -> np.ndarray:
    """uint8 [H, W, 3] of a decoded frame, turned as its container says that it is to be shown. ValueError unless in quarter turns."""
    image = picture.to_ndarray(format="rgb24")
    told = next((one for one in picture.side_data if one.type.name == "DISPLAYMATRIX"), None)
    if told is None:
        return image
    a, b, _, c, d = np.frombuffer(bytes(told), dtype=np.int32)[:5].astype(np.float64)
    turns = -np.arctan2(b, a) / (np.pi / 2)  # quarters, to the left
    if abs(turns - round(turns)) > 1e-3 or a * d - b * c <= 0:
        raise ValueError("its container mirrors it or turns it by less than a quarter; write the video as it is to be shown, ffmpeg -i IN "
                         "OUT.mp4")
    return np.ascontiguousarray(np.rot90(image, round(turns)))


def _time_base(stream) -> Tuple[int, int]:
    """Seconds of a tick as a fraction: ticks * up / down is rounded once, as Fraction is, in a tenth of the time."""
    return stream.time_base.numerator, stream.time_base.denominator


def video_times(path: Path) -> np.ndarray:
    """float64 [frames], ascending: when each frame is shown, in seconds. Read from the packets, not from the header, which may promise
    more than is there, or say nothing; nothing is decoded. ValueError for a file that does not open."""
    av = optional("av", "lerobot", f"reading {path}")
    with _open(path) as container:
        stream, times = _views(container)[0], []
        up, down = _time_base(stream)
        try:
            for packet in container.demux(stream):
                if packet.pts is not None and packet.size:
                    times.append(packet.pts * up / down)
        except (av.error.FFmpegError, OSError):
            pass  # what comes before the damage is there
        return np.sort(np.array(times, dtype=np.float64))


def missing_frame(times: np.ndarray, wanted: np.ndarray, fps: float) -> int:
    """The first of the `wanted` seconds at which VideoReader will find no frame among `times`; -1 when it finds all."""
    if not len(times):
        return 0 if len(wanted) else -1
    tolerance = TOLERANCE / fps
    # As there: the first frame that is not earlier than the wanted one less the tolerance.
    at = np.minimum(np.searchsorted(times, wanted - tolerance), len(times) - 1)
    far = np.flatnonzero(np.abs(times[at] - wanted) > tolerance)
    return int(far[0]) if len(far) else -1


class VideoReader:
    """fps: frames per second; a frame is found when its time stamp is at most a quarter of a frame off."""

    def __init__(self, fps: float):
        self._tolerance = TOLERANCE / fps
        self._local = threading.local()
        self._lock, self._all = threading.Lock(), []

    def _container(self, path: Path):
        files = self._local.__dict__.setdefault("files", OrderedDict())
        if path not in files:
            files[path] = _open(path)
            with self._lock:
                self._all.append(files[path])
            if len(files) > _OPEN_FILES:
                _, old = files.popitem(last=False)
                with self._lock:
                    self._all.remove(old)
                old.close()
        files.move_to_end(path)
        return files[path]

    def frame(self, path: Path, seconds: float, where: str) -> np.ndarray:
        """uint8 [H, W, 3]: the frame at `seconds`. ValueError when there is none, or it cannot be decoded."""
        av = optional("av", "lerobot", f"reading {path}")
        if not path.is_file():
            raise FileNotFoundError(f"{where}: {path} is missing; {_AGAIN}")
        container = self._container(path)
        stream, last = _views(container)[0], None
        up, down = _time_base(stream)
        try:
            # To the key frame before; from there on every frame is decoded until the one that is wanted.
            container.seek(int((seconds + self._tolerance) / stream.time_base), stream=stream, backward=True)
            for picture in container.decode(stream):
                last = (picture.pts or 0) * up / down
                if last >= seconds - self._tolerance:
                    break
            if last is not None and abs(last - seconds) <= self._tolerance:
                return _upright(picture)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            remedy = "" if "container" in str(error) else f"; {_AGAIN}"
            raise ValueError(f"{where}: {path} at {seconds:.3f} s cannot be decoded ({error}){remedy}") from error
        nearest = "no frame can be decoded" if last is None else f"the nearest is at {last:.3f} s"
        raise ValueError(f"{where}: {path} has no frame at {seconds:.3f} s, {nearest}; {_AGAIN}")

    def close(self) -> None:
        with self._lock:
            for container in self._all:
                container.close()
            self._all = []
        self._local = threading.local()
