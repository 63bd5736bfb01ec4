"""What made a result: the commit of the code, uncommitted changes, library versions, hardware.

setup.py loads this file to stamp the commit into a built package, so nothing but the standard library is imported at its head.
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
from pathlib import Path
from typing import Any, Dict, Optional

LIBRARIES = ["torch", "transformers", "timm", "peft", "tokenizers", "safetensors", "numpy", "draccus"]
PACKAGE = Path(__file__).resolve().parents[1]
# In a built package, never in a checkout: the commit and, if it had uncommitted changes, the word `dirty`.
STAMP = "_commit.txt"


def library_versions() -> Dict[str, Optional[str]]:
    """Python and the libraries that decide results; None for one that is not installed."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    import torch

    versions["torch"] = torch.__version__  # with the build, e.g. +cu124
    return versions


def source_commit() -> Optional[str]:
    """Commit of the code that runs: of its checkout, else the one stamped into the package when it was built; None without both."""
    return source_state()["commit"]


def source_state() -> Dict[str, Any]:
    """commit, dirty, diff (text against the commit), diff_sha256, untracked; None values where no commit is known.

    The diff of a built package stays where it was built: there `dirty` alone tells that it had uncommitted changes.
    """
    commit = _git("rev-parse", "HEAD") if _is_checkout() else None
    if commit is None:
        return {**_stamped(), "diff": "", "diff_sha256": None, "untracked": []}
    diff = _git("diff", "HEAD", "--no-color", strip=False) or ""
    untracked = [line for line in (_git("ls-files", "--others", "--exclude-standard", "--full-name", ":/") or "").splitlines()]
    digest = hashlib.sha256(diff.encode()).hexdigest() if diff else None
    return {"commit": commit, "dirty": bool(diff or untracked), "diff": diff, "diff_sha256": digest, "untracked": untracked}


def stamp_text() -> str:
    """What setup.py writes into a package that it builds; empty where no commit is known."""
    state = source_state()
    return state["commit"] + (" dirty" if state["dirty"] else "") + "\n" if state["commit"] else ""


def version_line() -> str:
    """`vlakeep 0.1.0 (commit abc1234)`, with `, dirty` when there are uncommitted changes, without brackets when nothing is known."""
    import vlakeep

    state = source_state()
    commit = f" (commit {state['commit'][:7]}{', dirty' if state['dirty'] else ''})" if state["commit"] else ""
    return f"vlakeep {vlakeep.__version__}{commit}"


def _is_checkout() -> bool:
    """An installed package may lie in a work tree too, in a virtual environment; but that tree does not track it."""
    return bool(_git("ls-files", "--", "."))


def _stamped() -> Dict[str, Any]:
    try:
        commit, *dirty = (PACKAGE / STAMP).read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": dirty == ["dirty"]}


def _git(*args: str, strip: bool = True) -> Optional[str]:
    try:
        done = subprocess.run(
            ["git", *args], cwd=PACKAGE, capture_output=True, text=True, timeout=20, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    return done.stdout.strip() if strip else done.stdout


def hardware() -> Dict[str, Any]:
    """Host, CPU model and cores, memory, GPUs."""
    import torch

    cpu = platform.processor() or platform.machine()
    try:
        cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
        memory = int(re.search(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        memory = None
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(
                {"name": properties.name, "memory": properties.total_memory, "capability": [properties.major, properties.minor]}
            )
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory": memory,
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }
