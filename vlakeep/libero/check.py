"""Stage `vlakeep libero-check`: does the LIBERO simulator run here, and does it show what the official data show?

    vlakeep libero-check [--evaluate.benchmark libero_object] [--root DIR]

Opens task 0 of the suite, settles its first initial state, steps with random actions and renders.
writes: tmp_dir/libero_check_<suite>.png (the camera's picture at full size, turned as the policy sees it)
Exit status: 0 when it runs (a difference from the official version is a warning), 2 when something is missing.
"""

import platform
import sys
import time
from typing import List

import numpy as np

from vlakeep.core.compat import require_numpy
from vlakeep.core.options import read
from vlakeep.core.storage import Storage, atomic_write
from vlakeep.data.images import encode_png
from vlakeep.libero import setup as libero_setup
from vlakeep.libero.env import CAMERA, SUITES, LiberoEnv, policy_image
from vlakeep.libero.stages import CHECK

STEPS = 10


def main(argv: List[str]) -> int:
    _, config = read(CHECK, argv)
    suite = config.evaluate.benchmark if config.evaluate.benchmark in SUITES else "libero_object"
    require_numpy()
    libero_setup.require_libero()
    found = libero_setup.versions()
    print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {version}" for name, version in found.items()))
    print(f"renderer {libero_setup.pick_renderer()} (MUJOCO_GL chooses another)")
    storage = Storage.from_config(config)
    storage.tmp.mkdir(parents=True, exist_ok=True)
    path = storage.guard_write(storage.tmp / f"libero_check_{suite}.png", what="picture")

    started = time.perf_counter()
    with libero_setup.variables(libero_setup.environment()):
        env = LiberoEnv(suite, 0)
        opened = time.perf_counter() - started
        raw_HWC = env.start(0)[f"{CAMERA}_image"]
        started, rng = time.perf_counter(), np.random.default_rng(0)
        for _ in range(STEPS):
            env.step(rng.uniform(-0.3, 0.3, 7))
        each = (time.perf_counter() - started) / STEPS
        env.close()
    if raw_HWC.std() < 1:
        raise ValueError(f"{suite} renders a picture of one colour; try the other renderer: MUJOCO_GL=osmesa or MUJOCO_GL=egl")
    with atomic_write(path) as file:
        file.write(encode_png(np.ascontiguousarray(raw_HWC[::-1, ::-1])))
    print(f"{suite} task 0, {env.language!r}: opened in {opened:.1f} s, {1000 * each:.0f} ms per step with one picture")
    print(f"mean grey {policy_image(raw_HWC, crop=False).mean():.1f}; picture {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
