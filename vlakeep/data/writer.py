"""Write episodes as an RLDS data set (TFRecord shards, dataset_info.json, features.json) that tensorflow_datasets reads too.

The features are those of the LIBERO sets (moojink/rlds_dataset_builder) without the joint state; the wrist camera is there where episodes
have one.
Axes: T frames, H W pixels, A action and S state dimensions.
"""

import json
from pathlib import Path
from typing import Iterable, Tuple

import numpy as np

from vlakeep.core.storage import atomic_dir
from vlakeep.data.images import encode_jpeg, encode_png
from vlakeep.data.sample import Episode
from vlakeep.data.tfrecord import RecordWriter, write_example

_STATE_WIDTH = 8  # the official LIBERO transform slices a state of 8
_CLASS = "tensorflow_datasets.core.features."


def _scalar(dtype: str) -> dict:
    return {"pythonClassName": _CLASS + "scalar.Scalar", "tensor": {"shape": {}, "dtype": dtype, "encoding": "none"}}


def _tensor(width: int) -> dict:
    return {"pythonClassName": _CLASS + "tensor_feature.Tensor",
            "tensor": {"shape": {"dimensions": [str(width)]}, "dtype": "float32", "encoding": "none"}}


def _dictionary(features: dict) -> dict:
    return {"pythonClassName": _CLASS + "features_dict.FeaturesDict", "featuresDict": {"features": features}}


def _picture(size: Tuple[int, ...], image_format: str) -> dict:
    return {"pythonClassName": _CLASS + "image_feature.Image", "image": {
        "shape": {"dimensions": [*map(str, size), "3"]}, "dtype": "uint8", "encodingFormat": image_format}}


def _features_json(picture: Tuple[int, ...], wrist: Tuple[int, ...], actions: int, states: int, image_format: str) -> dict:
    """picture, wrist: height and width; none of the wrist's where it has no camera."""
    text = {"pythonClassName": _CLASS + "text_feature.Text", "text": {}}
    pictures = {name: _picture(size, image_format) for name, size in (("image", picture), ("wrist_image", wrist)) if size}
    steps = _dictionary({
        "reward": _scalar("float32"), "discount": _scalar("float32"),
        "is_first": _scalar("bool"), "is_last": _scalar("bool"), "is_terminal": _scalar("bool"),
        "observation": _dictionary({**pictures, "state": _tensor(states)}),
        "language_instruction": text, "action": _tensor(actions),
    })
    dataset = {"pythonClassName": _CLASS + "dataset_feature.Dataset", "sequence": {"feature": steps, "length": "-1"}}
    return _dictionary({"steps": dataset, "episode_metadata": _dictionary({"file_path": text})})


def _check(episode: Episode, number: int, name: str) -> None:
    images, actions = np.asarray(episode.images), np.asarray(episode.actions)
    where = f"episode {number} of {name}"
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(f"{where}: images must be uint8 [T, H, W, 3] with T >= 1, not {images.dtype} {list(images.shape)}")
    if episode.wrist is not None and (episode.wrist.dtype != np.uint8 or episode.wrist.ndim != 4 or len(episode.wrist) != len(images)):
        raise ValueError(f"{where}: wrist must be uint8 [T, H, W, 3] with T = {len(images)}, not {episode.wrist.dtype} "
                         f"{list(episode.wrist.shape)}")
    if actions.ndim != 2 or len(actions) != len(images):
        raise ValueError(f"{where}: actions must be [T, A] with T = {len(images)}, not {list(actions.shape)}")
    bad = np.flatnonzero(~np.isfinite(actions).all(axis=1))
    if len(bad):
        raise ValueError(f"{where}, frame {bad[0]}: action {actions[bad[0]].tolist()} is not finite")
    if episode.state is not None and (np.ndim(episode.state) != 2 or len(episode.state) != len(images)):
        raise ValueError(f"{where}: state must be [T, S] with T = {len(images)}, not {list(np.shape(episode.state))}")


def _example(episode: Episode, encode) -> bytes:
    steps = len(episode.images)
    state = np.zeros((steps, _STATE_WIDTH), np.float32) if episode.state is None else np.asarray(episode.state, np.float32)
    at_end = np.arange(steps) == steps - 1
    wrist = {} if episode.wrist is None else {"steps/observation/wrist_image": [encode(image) for image in episode.wrist]}
    return write_example({
        "steps/observation/image": [encode(image) for image in episode.images], **wrist,
        "steps/observation/state": state.reshape(-1),
        "steps/action": np.asarray(episode.actions, np.float32).reshape(-1),
        "steps/language_instruction": [episode.language.encode("utf-8")] * steps,
        "steps/reward": at_end.astype(np.float32), "steps/discount": np.ones(steps, np.float32),
        "steps/is_first": np.arange(steps) == 0, "steps/is_last": at_end, "steps/is_terminal": at_end,
        "episode_metadata/file_path": [episode.file_path.encode("utf-8")],
    })


def write_rlds(folder, name: str, episodes: Iterable[Episode], image_format: str = "png", version: str = "1.0.0",
               shard_bytes: int = 256 << 20, overwrite: bool = False) -> Path:
    """Write `episodes` (any iterable, consumed once) to folder/name/version and return that path.

    The folder appears under its final name only when it is complete; a shard is closed when it exceeds shard_bytes.
    Raises ValueError for malformed or no episodes, FileExistsError when the data set exists and overwrite is False.
    """
    encode = {"png": encode_png, "jpeg": encode_jpeg}.get(image_format)
    if encode is None:
        raise ValueError(f"image_format {image_format!r} must be png or jpeg")
    final = Path(folder) / name / version
    if final.exists() and not overwrite:
        raise FileExistsError(f"{final} exists; remove it or ask for it to be overwritten")
    with atomic_dir(final) as partial:
        _fill(partial, name, episodes, encode, image_format, version, shard_bytes)
    return final


def _fill(partial: Path, name: str, episodes, encode, image_format: str, version: str, shard_bytes: int) -> None:
    """Write everything into the folder `partial`."""
    shape, lengths, total, writer = None, [], 0, None
    try:
        for number, episode in enumerate(episodes):
            _check(episode, number, name)
            state_width = _STATE_WIDTH if episode.state is None else episode.state.shape[1]
            wrist = () if episode.wrist is None else episode.wrist.shape[1:3]
            widths = (episode.images.shape[1:3], wrist, episode.actions.shape[1], state_width)
            shape = shape or widths
            if widths != shape:
                raise ValueError(f"episode {number} of {name} has (picture, wrist, action, state) sizes {widths}, the first "
                                 f"{shape}")
            if writer is None:
                writer = RecordWriter(partial / f"shard-{len(lengths)}").__enter__()
            writer.write(_example(episode, encode))
            if writer.payload_bytes >= shard_bytes:
                lengths, total, writer = _close(writer, lengths, total)
        if writer is not None:
            lengths, total, writer = _close(writer, lengths, total)
        if shape is None:
            raise ValueError(f"data set {name} would have no episodes")
        for i in range(len(lengths)):
            (partial / f"shard-{i}").rename(partial / f"{name}-train.tfrecord-{i:05d}-of-{len(lengths):05d}")
        features = _features_json(*shape, image_format)
        (partial / "features.json").write_text(json.dumps(features, indent=4))
        (partial / "dataset_info.json").write_text(json.dumps({
            "description": f"{name}, written by vlakeep", "fileFormat": "tfrecord", "moduleName": "vlakeep.data.writer",
            "name": name,
            "splits": [{"filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}", "name": "train",
                        "numBytes": str(total), "shardLengths": [str(n) for n in lengths]}],
            "version": version,
        }, indent=2))
    except BaseException:
        if writer is not None:
            writer.__exit__()  # on a full disk this fails too
        raise


def _close(writer: RecordWriter, lengths, total):
    writer.__exit__()
    return lengths + [writer.records], total + writer.payload_bytes, None
