"""What a simulator process does with a job of the evaluation: one official episode, and its video if one is wanted."""

from pathlib import Path
from typing import List

import numpy as np

from vlakeep.core.storage import atomic_path
from vlakeep.libero.env import CAMERA, LiberoEnv, policy_image, to_simulator
from vlakeep.libero.workers import Job, Seen

FRAMES_PER_SECOND = 20  # the control rate


def evaluate_episode(env: LiberoEnv, job: Job):
    """Generator: yields what the policy sees, is sent its action (un-normalised, gripper 1 = open), returns success and steps."""
    frames: List[np.ndarray] = []
    observation, success, steps = env.start(job.number), False, 0
    while not success and steps < job.limit:
        raw_HWC = observation[f"{CAMERA}_image"]
        if job.target:
            frames.append(np.ascontiguousarray(raw_HWC[::-1, ::-1]))
        image, *others = (policy_image(observation[f"{camera}_image"], job.crop, job.plain) for camera in job.cameras or (CAMERA,))
        action = yield Seen(image, env.language, steps, tuple(others), env.robot_state(observation) if job.state else None)
        observation, _, success = env.step(to_simulator(action))
        steps += 1
    if job.target:
        write_video(Path(job.target), [*frames, np.ascontiguousarray(observation[f"{CAMERA}_image"][::-1, ::-1])])
    return {"success": success, "steps": steps}


def require_video() -> None:
    """FileNotFoundError with the remedy when no encoder is installed."""
    try:
        import av  # noqa: F401
    except ImportError:
        raise FileNotFoundError("--evaluate.videos needs the package av: make libero, or pip install av") from None


def write_video(path: Path, frames: List[np.ndarray]) -> None:
    """H.264 in an mp4 file, turned as the policy sees it. The file appears when it is complete."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial, av.open(str(partial), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame_HWC in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode())
