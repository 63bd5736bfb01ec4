"""Plant the faults of tests/mutations.txt one by one in a copy of the sources and see that the named tests catch each of them.

    make mutations                                   # all of them, WORKERS side by side
    make mutations FAULT="gripper|^demo:"            # those in whose name this regular expression is found
    python tests/mutations.py --workers 4 --limit 900

The working tree stays as it is. Exit status 1 when a fault survives, when one gives no answer, or when the tests fail without it.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Callable, List, NamedTuple, Sequence, Tuple

from tqdm import tqdm

REPO = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".txt")
SEPARATOR = " :: "
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", "build", "*.egg-info")
CAUGHT, SURVIVED, UNKNOWN = "caught by", "SURVIVED", "NO ANSWER"

# Tests run in processes that are forked from one in which libraries, which have no faults, are imported once. Those that import
# torchvision are not among them: vlakeep comes before it.
FORKS = multiprocessing.get_context("forkserver")
LIBRARIES = ["numpy", "pytest", "torch", "torch._dynamo", "matplotlib.pyplot", "draccus", "safetensors.torch"]



class Fault(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: Tuple[str, ...]


class Outcome(NamedTuple):
    """verdict: one of the three above; what: the first failing test, or why there is no answer."""

    verdict: str
    what: str = ""


def read_faults(path: Path = LIST) -> List[Fault]:
    """The faults of a list. ValueError names the line that has not five fields."""
    faults = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.split(SEPARATOR)
        if len(fields) != 5 or not all(field.strip() for field in (*fields[:3], fields[4])):
            raise ValueError(f"{path} line {number}: not name{SEPARATOR}file{SEPARATOR}old{SEPARATOR}new{SEPARATOR}tests")
        faults.append(Fault(*(field.strip() for field in fields[:2]), *fields[2:4], tuple(fields[4].split())))
    return faults


def mutated(fault: Fault, repo: Path) -> str:
    """The file's text with the fault in it. ValueError unless the old text occurs exactly once."""
    text = (repo / fault.file).read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.name}: {fault.old!r} occurs {text.count(fault.old)} times in {fault.file}, and must occur once")
    return text.replace(fault.old, fault.new)


def _pytest(argv: List[str], copy: Path, said: Path) -> None:
    """Life of a process of run_tests: pytest in a copy of the repository, with what it says in a file."""
    os.setsid()  # so that it ends with the processes that the tests have started
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(copy)
    os.environ.update(PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1", COLUMNS="400")
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(copy))
    for name in [name for name in sys.modules if name.partition(".")[0] == "vlakeep"]:
        del sys.modules[name]  # in the suite itself, where the first to fork says what is imported
    import pytest

    sys.exit(int(pytest.main(argv)))


def run_tests(copy: Path, tests: Sequence[str], limit: float) -> Outcome:
    """What pytest says about `tests` in a copy of the repository."""
    said = copy.parent / "said.txt"
    argv = ["-x", "-q", "--color=no", "-p", "no:cacheprovider", f"--basetemp={copy.parent / 'tmp'}", *tests]
    run = FORKS.Process(target=_pytest, args=(argv, copy, said))
    run.start()
    run.join(limit)
    if run.is_alive():
        os.killpg(run.pid, signal.SIGKILL)
        run.join()
        return Outcome(UNKNOWN, f"not done after {limit:.0f} s")
    lines = said.read_text(errors="replace").splitlines()
    failed = [line.split()[1] for line in lines if line.startswith(("FAILED ", "ERROR ")) and len(line.split()) > 1]
    if run.exitcode == 0:
        return Outcome(SURVIVED)
    if run.exitcode in (1, 2) and failed:
        return Outcome(CAUGHT, failed[0].removeprefix("tests/"))
    return Outcome(UNKNOWN, f"pytest ended with status {run.exitcode}: {' '.join(lines[-1:])}")


def in_copy(repo: Path, plant: Callable[[Path], None], tests: Sequence[str], limit: float) -> Outcome:
    """run_tests in a fresh copy of the repository that `plant` may change."""
    with tempfile.TemporaryDirectory(prefix="vlakeep-fault-") as folder:
        copy = Path(folder) / "repo"
        shutil.copytree(repo, copy, ignore=LEFT_OUT)
        plant(copy)
        return run_tests(copy, tests, limit)


def plant(fault: Fault, copy: Path) -> None:
    (copy / fault.file).write_text(mutated(fault, copy), encoding="utf-8")


def check_all(faults: List[Fault], repo: Path, workers: int, limit: float) -> bool:
    """Run everything, print the table; True when the tests pass without a fault and catch every one."""
    FORKS.set_forkserver_preload(LIBRARIES)
    files = sorted({name for fault in faults for name in fault.tests})
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(files) + len(faults), desc="mutations", mininterval=1.0) as bar:
        jobs = {pool.submit(in_copy, repo, lambda copy: None, [name], limit): name for name in files}
        jobs.update({pool.submit(in_copy, repo, lambda copy, fault=fault: plant(fault, copy), fault.tests, limit): fault
                     for fault in faults})
        outcomes = {}
        for job in as_completed(jobs):
            what, outcome = jobs[job], job.result()
            outcomes[what] = outcome
            bar.update()
            if outcome.verdict != (CAUGHT if isinstance(what, Fault) else SURVIVED):  # the table is an hour away
                bar.write(f"{getattr(what, 'name', what)}  {outcome.verdict} {outcome.what}".rstrip())
    ill = {name: outcomes[name] for name in files if outcomes[name].verdict != SURVIVED}
    for name, outcome in ill.items():
        print(f"without any fault {name} fails: {outcome.what}")
    width = max(len(fault.name) for fault in faults)
    for fault in faults:
        print(f"{fault.name:{width}s}  {outcomes[fault].verdict} {outcomes[fault].what}".rstrip())
    caught = sum(outcomes[fault].verdict == CAUGHT for fault in faults)
    print(f"{caught} of {len(faults)} faults caught")
    return caught == len(faults) and not ill


def main(argv: List[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fault", nargs="?", default="", help="only faults in whose name this regular expression is found")
    parser.add_argument("--workers", type=int, default=int(os.environ.get("WORKERS", "2")), help="faults side by side")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for the tests of one fault")
    options = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    faults = [fault for fault in read_faults() if re.search(options.fault, fault.name)]
    if not faults:
        parser.error(f"no fault of {LIST.name} is called like {options.fault!r}")
    return 0 if check_all(faults, REPO, options.workers, options.limit) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
