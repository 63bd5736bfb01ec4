"""One LIBERO environment under the official evaluation protocol, several times faster and to the bit the same.

Source of the protocol: openvla experiments/robot/libero/run_libero_eval.py:101-240, libero_utils.py, robot_utils.py:75-102.
The official loop makes an environment per task, seeds NumPy's global generator with 0 once, and then hard-resets it before every
episode. Which cabinet or stove position episode k sees therefore depends on the draws of the k resets before it. Here the state
of the generator before each reset is kept, so episode k can be played at any time, in any process, as it is in an uninterrupted
official run.

Three things make it fast: no hard resets (2 s with rendering), the dynamics evaluated once and not three times per 2 ms, and no
picture that nobody looks at. tests/test_libero.py compares all of it with the plain loop.
"""

import contextlib
import io
import os
from typing import List, Optional, Sequence, Tuple, Union

import numpy as np

from vlakeep.data.images import center_crop, libero_image
from vlakeep.libero import official
from vlakeep.libero.setup import fitting_mujoco, import_libero

# Control steps that the official script allows, the settling ones not counted.
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
SUITES = tuple(MAX_STEPS)
TASKS = {**dict.fromkeys(SUITES, 10), "libero_90": 90}
INIT_STATES = 50  # fixed initial states of each task
SETTLE = 10  # steps in which things fall into place; the policy is not asked
IDLE = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)  # no motion, gripper open
RESOLUTION = 256
CAMERA = "agentview"
WRIST = "robot0_eye_in_hand"
CAMERAS = (CAMERA, WRIST, "frontview")
SAME_FROM = (3, 3, 7)  # mujoco from which on repeated evaluations change nothing: 3.3.7 and 3.17.0 were compared
ATTEMPTS = 100  # placements that may fail in a row; the simulator itself would try for ever


def to_simulator(action_A: Sequence[float]) -> List[float]:
    """The model's action in the simulator's terms: gripper 1 = open, 0 = close becomes -1 = open, +1 = close."""
    action = np.array(action_A, dtype=np.float64)
    action[-1] = -np.sign(2.0 * action[-1] - 1.0)
    return action.tolist()


def policy_image(raw_HWC: np.ndarray, crop: bool, plain: bool = False) -> np.ndarray:
    """uint8 [224, 224, 3]: what the official loop hands to the model, from the camera's own picture. plain: turned alone and of its own
    size, as lerobot and openpi hand it over (lerobot 7427f318 processor/env_processor.py:49-58, openpi examples/libero/main.py)."""
    image = np.ascontiguousarray(raw_HWC[::-1, ::-1]) if plain else libero_image(raw_HWC)
    return center_crop(image) if crop else image


def robot_state(observation: dict) -> np.ndarray:
    """float32 [8], LIBERO's `state`: hand position, its rotation as axis times angle, the two finger joints."""
    from robosuite.utils.transform_utils import quat2axisangle

    rotation = quat2axisangle(observation["robot0_eef_quat"].copy())
    return np.r_[observation["robot0_eef_pos"], rotation, observation["robot0_gripper_qpos"]].astype(np.float32)


def load_suite(name: str):
    """The simulator's suite object. ValueError for an unknown one."""
    if name not in SUITES:
        raise ValueError(f"no LIBERO suite {name!r}; known are {', '.join(SUITES)}")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its task order
        return import_libero().suites[name]()


def bddl_file(info) -> str:
    """Path of a task's scene and goal; `info` is what the suite's get_task gives."""
    return os.path.join(import_libero().path("bddl_files"), info.problem_folder, info.bddl_file)


def about_task(info, cameras: Sequence[str], resolution: int) -> dict:
    """What LIBERO's HDF5 files say of their task; `info` is what the suite's get_task gives."""
    from libero.libero.envs.bddl_utils import get_problem_info
    from robosuite.controllers import load_controller_config

    problem, scene = get_problem_info(bddl_file(info)), f"{info.problem_folder}/{info.bddl_file}"
    settings = {"robots": ["Panda"], "controller_configs": load_controller_config(default_controller="OSC_POSE"),
                "bddl_file_name": scene, "camera_names": list(cameras), "camera_heights": resolution, "camera_widths": resolution,
                "control_freq": 20}
    name = problem["problem_name"]
    with open(bddl_file(info), encoding="utf-8") as file:
        return {"env_name": name, "problem_info": problem, "bddl_file_name": scene, "bddl_file_content": file.read(),
                "env_args": {"type": 1, "env_name": name, "problem_name": name, "bddl_file": scene, "env_kwargs": settings}}


@contextlib.contextmanager
def _one_evaluation_per_substep(sim, boxes_G: Optional[np.ndarray]):
    """Within the context robosuite's forward, forward, step of every 2 ms evaluate the dynamics once.

    boxes_G: which geoms are boxes, for contacts as the official simulator has them; None takes the installed one's.

    mj_step1 (kinematics, collision, bias) runs where the controller first asks for it, mj_step2 (actuation, constraints,
    integration) when the torques are set. The two are mj_step; what robosuite adds are repetitions that leave the state as it
    is. With older versions they do not (mujoco 2.3.7 and 3.0.1 differ by 1e-7 after 15 steps: every evaluation refines the
    start of the next solution), so there everything is evaluated as robosuite does it.
    """
    import mujoco

    if tuple(int(part) for part in mujoco.__version__.split(".")[:3]) < SAME_FROM:
        yield
        return
    model, data, fresh = sim.model._model, sim.data._data, False

    def forward():
        nonlocal fresh
        if not fresh:
            mujoco.mj_step1(model, data) if boxes_G is None else official.step1(model, data, boxes_G)
            fresh = True

    def step(with_udd=True):
        nonlocal fresh
        mujoco.mj_step2(model, data)
        fresh = False

    sim.forward, sim.step = forward, step
    try:
        yield
    finally:
        del sim.forward, sim.step


@contextlib.contextmanager
def blind(sim):
    """Within the context cameras give black pictures: nobody looks at those of a reset and of all settling steps but the last.

    The simulator samples its cameras at the first 2 ms of a control step, so they cannot be asked for afterwards.
    """
    def black(width, height, **options):
        return np.zeros((height, width, 3), np.uint8)

    sim.render = black
    try:
        yield
    finally:
        del sim.render


class NoPlacement(ValueError):
    """A seed from which no scene comes: always the same ones."""


class LiberoEnv:
    """One task of a suite. `language` is the task's name in words, as the official script takes it (the bddl file's differs).

    as_official: contacts and colours of the mujoco of the official data, whichever is installed (libero/official.py).
    """

    def __init__(self, suite: str, task: int, seed: int = 0, render: bool = True, resolution: int = RESOLUTION,
                 cameras: Sequence[str] = (CAMERA,), as_official: bool = True):
        found = load_suite(suite)
        if not 0 <= task < found.n_tasks:
            raise ValueError(f"{suite} has tasks 0 to {found.n_tasks - 1}, not {task}")
        info = found.get_task(task)
        self.suite, self.task, self.seed, self.name, self.language = suite, task, seed, info.name, info.language
        libero = import_libero()
        with contextlib.redirect_stdout(io.StringIO()), fitting_mujoco(), official.colours() if as_official else contextlib.nullcontext():
            self.init_states_KS = found.get_task_init_states(task)
            self.control = libero.environment(
                bddl_file_name=bddl_file(info), camera_heights=resolution, camera_widths=resolution,
                camera_names=list(cameras), hard_reset=False, has_offscreen_renderer=render, use_camera_obs=render)
        self._boxes_G = official.boxes(self.control.sim.model._model) if as_official and not official.halves_depth() else None
        self._samplers = list(self.env.object_property_initializers)
        np.random.seed(seed)
        self._generator = [np.random.get_state()]  # [k] is NumPy's state before reset k of an uninterrupted run

    @property
    def env(self):
        """robosuite's environment inside LIBERO's wrapper."""
        return self.control.env

    def start(self, init: int) -> dict:
        """The simulator's observation after reset, initial state `init` and the settling steps of the official episode `init`."""
        self.official_reset(init)
        with blind(self.control.sim):
            self.control.set_init_state(self.init_states_KS[init])
        return self._settle()

    def _settle(self) -> dict:
        with blind(self.control.sim):
            for _ in range(SETTLE - 1):
                self.step(IDLE)
        return self.step(IDLE)[0]

    def official_reset(self, number: int) -> None:
        """Reset `number` (from 0) of a run that was seeded once and hard-reset before every episode."""
        for k in range(min(number, len(self._generator) - 1), number + 1):
            np.random.set_state(self._generator[k])
            # Every hard reset appends the drawer samplers of the scene once more and then draws from all of them.
            self._reset(self._samplers * (k + 2))
            if k + 1 == len(self._generator):
                self._generator.append(np.random.get_state())

    def fresh_start(self, seed: int) -> dict:
        """The observation after a reset to a scene of its own, a function of `seed` alone, and the settling steps."""
        np.random.seed(seed)
        self._reset(self._samplers)
        return self._settle()

    def _reset(self, samplers) -> None:
        from robosuite.utils.errors import RandomizationError

        self._put_fixtures_back()
        self.env.object_property_initializers = samplers
        for robot in self.env.robots:  # a hard reset makes a new gripper; this is the only thing it remembers
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        for _ in range(ATTEMPTS):
            with contextlib.suppress(RandomizationError), blind(self.control.sim):
                self.env.reset()
                return
        raise NoPlacement(f"{self.suite} task {self.task}: no collision-free placement in {ATTEMPTS} attempts")

    def _put_fixtures_back(self) -> None:
        """Cabinets and the like to where the model file has them, as a hard reset does: what is inside is placed from there."""
        model = self.control.sim.model
        for fixture in self.env.fixtures_dict.values():
            body, element = model.body_name2id(fixture.root_body), fixture.get_obj()
            model.body_pos[body] = np.array(element.get("pos", "0 0 0").split(), dtype=float)
            model.body_quat[body] = np.array(element.get("quat", "1 0 0 0").split(), dtype=float)

    def step(self, action: Union[Sequence[float], np.ndarray]) -> Tuple[dict, float, bool]:
        """(observation, reward, success) of one 50 ms control step, action in the simulator's units."""
        with _one_evaluation_per_substep(self.control.sim, self._boxes_G):
            observation, reward, done, _ = self.control.step(list(action))
        return observation, float(reward), bool(done)

    def state(self) -> np.ndarray:
        """float64 [S]: time, positions and velocities of everything that moves. Fixture positions are not in it."""
        return self.control.get_sim_state()

    @property
    def positions(self) -> slice:
        """Where positions and joint angles stand in a state."""
        return slice(1, 1 + self.control.sim.model.nq)

    robot_state = staticmethod(robot_state)

    def put(self, state_S: np.ndarray) -> None:
        """Make `state` (of this scene) the current one; what is seen next is what the next step gives."""
        self.control.sim.set_state_from_flattened(state_S)
        self.control.sim.forward()

    def close(self) -> None:
        self.control.close()
