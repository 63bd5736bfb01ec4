"""Where the cells of a study run: processes of this machine, a SLURM cluster by submitit, or many machines by Ray.

    vlakeep study studies/X.yaml --scheduler slurm --workers 40 --resources slurm_partition=gpu,gpus_per_node=1,timeout_min=120
    vlakeep study studies/X.yaml --scheduler ray --workers 16 --resources num_gpus=0.25,num_cpus=2

A scheduler here is one call: the command line of a cell in, its exit status out, its output in a log file; queues, placement and retries
are the scheduler's own. All machines share the storage root. `resources` are the words of submitit's `update_parameters` (`slurm_` stands
before those of SLURM alone) and of Ray's task options. A running Ray cluster is found by its own means (RAY_ADDRESS); without one Ray
starts on this machine.
"""

import multiprocessing
import os
import queue
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

from vlakeep.core.config import ConfigError
from vlakeep.core.errors import install_extra

NAMES = ("local", "slurm", "ray")
PASSED = ("VLAKEEP_ROOT", "VLAKEEP_DEBUG", "PYTHONPATH", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "HF_HOME", "HF_ENDPOINT")
STOPPED = 143


def execute(words: List[str], log_file: str, environment: Dict[str, str]) -> int:
    """Run a command line of vlakeep where this is called; the exit status."""
    Path(log_file).parent.mkdir(parents=True, exist_ok=True)
    with open(log_file, "wb") as file:
        return subprocess.run([sys.executable, "-m", "vlakeep.cli", *words], stdout=file, stderr=subprocess.STDOUT,
                              env={**os.environ, **environment}).returncode


def environment(root) -> Dict[str, str]:
    """What a cell has to find elsewhere as here."""
    return {**{key: os.environ[key] for key in PASSED if key in os.environ}, "VLAKEEP_ROOT": str(root)}


def resources(words: Sequence[str]) -> Dict[str, Any]:
    """`num_gpus=0.25` -> {"num_gpus": 0.25}. ConfigError for what is no NAME=VALUE."""
    found: Dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise ConfigError(f"--resources {word}: write NAME=VALUE, with commas between them")
        try:
            number = float(value)
            found[name] = int(number) if number.is_integer() and "." not in value else number
        except ValueError:
            found[name] = value
    return found


class _Scheduler:
    """Keeps what runs, so that it can be stopped."""

    def __init__(self, root):
        self._environment, self._running, self._lock, self._stopped = environment(root), [], threading.Lock(), False

    def __call__(self, words: List[str], log_file: Path) -> int:
        with self._lock:
            if self._stopped:  # nothing is submitted any more
                return STOPPED
            job = self._submit(words, str(log_file))
            self._running.append(job)
        try:
            return self._wait(job)
        finally:
            with self._lock:
                self._running.remove(job)

    def stop(self) -> None:
        """Ask the scheduler to end what runs; nothing is submitted after this."""
        with self._lock:
            self._stopped = True
            for job in self._running:
                self._cancel(job)

    def _submit(self, words: List[str], log_file: str):
        raise NotImplementedError

    def _wait(self, job) -> int:
        raise NotImplementedError

    def _cancel(self, job) -> None:
        raise NotImplementedError


class Slurm(_Scheduler):
    """Each cell a job. `cluster`: submitit's, slurm or, to try it, local."""

    def __init__(self, root, folder: Path, given: Dict[str, Any], cluster: str = "slurm"):
        super().__init__(root)
        submitit = _library("submitit", "slurm")
        folder.mkdir(parents=True, exist_ok=True)
        self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        self._executor.update_parameters(**{"name": "vlakeep", **given})

    def _submit(self, words, log_file):
        return self._executor.submit(execute, words, log_file, self._environment)

    def _wait(self, job) -> int:
        job.wait()
        return job.result() if job.exception() is None else 1

    def _cancel(self, job) -> None:
        job.cancel()


class Ray(_Scheduler):
    """Each cell a task."""

    def __init__(self, root, given: Dict[str, Any]):
        super().__init__(root)
        self._ray = _library("ray", "ray")
        if not self._ray.is_initialized():
            self._ray.init(log_to_driver=False, include_dashboard=False)
        # Ray gives a task its GPUs by CUDA_VISIBLE_DEVICES, which the cell's process inherits.
        self._task = self._ray.remote(execute).options(**{"num_cpus": 1, "max_retries": 0, **given})

    def _submit(self, words, log_file):
        return self._task.remote(words, log_file, self._environment)

    def _wait(self, job) -> int:
        try:
            return self._ray.get(job)
        except self._ray.exceptions.RayError:  # a worker or its machine is gone
            return 1

    def _cancel(self, job) -> None:
        self._ray.cancel(job, force=False)


def _forked(words: List[str], log_file: str, environment: Dict[str, str]) -> None:
    """A command line of vlakeep in a process that was forked for it."""
    output = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    sys.argv = ["vlakeep", *words]
    sys.exit(import_module("vlakeep.cli").main())


def cards(count: int) -> List[str]:
    """What names each of the GPUs that this process sees: as they were given to it, by number or UUID, else counted."""
    given = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    return given[:count] or [str(number) for number in range(count)]


class Launcher:
    """Runs command lines of `vlakeep` as processes, at most `workers` at a time, each on a GPU of its own where there are several.

    They are forked from a process in which vlakeep/warm.py has imported the libraries once (and which touches no GPU): importing them takes
    seconds, more where dozens of cells begin together.
    """

    def __init__(self, workers: int, gpus: int = 0):
        self._forks = multiprocessing.get_context("forkserver")
        self._forks.set_forkserver_preload(["vlakeep.warm"])
        self._slots: "queue.Queue[int]" = queue.Queue()
        for slot in range(workers):
            self._slots.put(slot)
        self._cards, self._running, self._lock, self._stopped = cards(gpus), set(), threading.Lock(), False

    def __call__(self, words: List[str], log_file: Path) -> int:
        slot = self._slots.get()
        try:
            environment = dict(os.environ)
            if len(self._cards) > 1:
                environment["CUDA_VISIBLE_DEVICES"] = self._cards[slot % len(self._cards)]
            log_file.parent.mkdir(parents=True, exist_ok=True)
            process = self._forks.Process(target=_forked, args=(words, str(log_file), environment))
            with self._lock:
                if self._stopped:
                    return STOPPED
                process.start()
                self._running.add(process)
            try:
                process.join()
                return process.exitcode
            finally:
                with self._lock:
                    self._running.discard(process)
        finally:
            self._slots.put(slot)

    def stop(self) -> None:
        """Ask the processes to save and end; none is started after this."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


def at_once(launcher, workers: int, calls: Sequence[Callable[[], int]]) -> List[int]:
    """What the calls return, `workers` of them running side by side; when one raises, what the launcher runs is asked to end."""
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(call) for call in calls]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            if hasattr(launcher, "stop"):
                launcher.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [job.result() for job in jobs]


def _library(name: str, extra: str):
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise ConfigError(f"--scheduler needs the package {name}: {install_extra(extra)}") from None


def scheduler(name: str, root, folder: Path, words: Sequence[str]):
    """The launcher of a study; None for processes of this machine."""
    if name == "local":
        if words:
            raise ConfigError("--resources are for --scheduler slurm or ray; on this machine --workers says how many cells run at a time")
        return None
    given = resources(words)
    return Slurm(root, folder, given) if name == "slurm" else Ray(root, given)
