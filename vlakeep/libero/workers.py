"""Simulator processes: one environment each, many of them in front of one policy; a dead one is replaced.

Every worker is spawned (a forked one inherits a graphics context that it cannot use) and plays one job at a time. What it does
with a job is a generator function `play(env, job)`, such as evaluate_episode of libero_play.py: it yields pictures that need an
action, and returns the result.
"""

import contextlib
import multiprocessing
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, cast

import numpy as np

from vlakeep.libero.pace import Clock, Pace
from vlakeep.libero.setup import environment, variables

SILENCE = 900.0  # seconds after which a worker counts as hung; the first import after an installation takes over a minute
FAILURES = 4  # deaths in a row, per worker and without a single picture between them, that are not the episodes' fault
TRIES = 2  # an episode that takes its worker down is played once more


class Job(NamedTuple):
    """One episode of one task."""

    suite: str
    task: int
    number: int  # initial state, or number of the demonstration
    seed: int
    limit: int = 0  # control steps that the policy has
    crop: bool = False
    source: Optional[str] = None  # file to read: a stored demonstration
    target: Optional[str] = None  # file to write: a video, or pictures
    cameras: Tuple[str, ...] = ()  # what the policy looks through, in its order; () is the usual camera alone
    state: bool = False  # whether it is told the robot's state
    plain: bool = False  # whether it takes pictures of the camera's own size


class Seen(NamedTuple):
    """What a worker sends while it plays: a picture that needs an action."""

    image: np.ndarray
    instruction: str
    step: int = 0  # of the episode, the settling ones not counted
    others: Tuple[np.ndarray, ...] = ()  # of the cameras behind the first
    state: Optional[np.ndarray] = None  # float32 [8]


def _serve(connection, open_env: Callable, play: Callable) -> None:
    """Life of a worker: jobs in; pictures, results and errors out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent closes the workers in order
    env, key = None, None
    try:
        while (job := connection.recv()) is not None:
            if key != (job.suite, job.task, job.seed):
                if env is not None:
                    env.close()
                key, env = (job.suite, job.task, job.seed), open_env(job.suite, job.task, job.seed)
            game = play(env, job)
            try:
                connection.send(("seen", next(game)))
                while (action := connection.recv()) is not None:
                    connection.send(("seen", game.send(action)))
                game.close()
                connection.send(("done", None))
            except StopIteration as end:
                connection.send(("done", end.value))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    except Exception as error:  # the parent decides what an error of the simulator means
        connection.send(("error", f"{type(error).__name__}: {error}"))
    finally:
        if env is not None:  # not left to the interpreter's end: EGL is shut down before it frees what is left over
            with contextlib.suppress(Exception):
                env.close()


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    job: Optional[Job] = None
    seen: Optional[Seen] = None
    playing: bool = False  # whether its job has shown a picture yet; before, its scene is loaded
    since: float = 0.0  # when it was last told something
    given_up: Optional[str] = None  # why its episode was ended from here
    task: Optional[Tuple[str, int]] = None  # the environment that it has open


@dataclass
class Workers:
    """`count` workers that play jobs in environments that open_env(suite, task, seed) makes; use as a context manager."""

    open_env: Callable
    play: Callable
    count: int
    silence: float = SILENCE
    restarts: int = 0

    def __enter__(self) -> "Workers":
        self._workers: List[_Worker] = []
        self.clock, self.pace = Clock(), Pace(self.count)
        return self

    def __exit__(self, *error) -> None:
        for worker in self._workers:
            self._stop(worker, gently=not any(error))

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        with variables(environment()):
            process = context.Process(target=_serve, args=(theirs, self.open_env, self.play), daemon=True)
            process.start()
        theirs.close()
        return _Worker(process, ours)

    def _stop(self, worker: _Worker, gently: bool = False) -> None:
        try:
            if gently and worker.job is None:
                worker.connection.send(None)
                worker.process.join(5)
        except OSError:
            pass
        if worker.process.is_alive():
            worker.process.kill()
        worker.process.join()
        worker.connection.close()

    def run(self, jobs: List[Job], act: Callable) -> Iterator[Tuple[Job, Any, Optional[str]]]:
        """Play all jobs; yields (job, result, None) or (job, None, error), in the order in which they end.

        act(jobs, [Seen]) -> per job an action [A], or the text of an error that ends its episode. It is asked as soon as so many of the
        workers that play wait for it as `pace` says; nobody waits for one that loads its scene.
        """
        with self.clock.running():
            yield from self._run(jobs, act)

    def _run(self, jobs: List[Job], act: Callable) -> Iterator[Tuple[Job, Any, Optional[str]]]:
        todo, tries, failures = list(jobs), {}, 0
        while todo or any(worker.job for worker in self._workers):
            self._fill(todo, tries)
            for worker, kind, value in self._listen():
                job = worker.job
                if kind == "seen":
                    worker.seen, worker.playing, failures = value, True, 0
                    continue
                worker.job, worker.seen, worker.playing = None, None, False
                self.clock.episodes += kind == "done"
                if kind == "done":
                    failures, reason, worker.given_up = 0, worker.given_up, None
                    yield job, value, reason
                    continue
                self._workers.remove(worker)
                self._stop(worker)
                self.restarts, failures = self.restarts + 1, failures + 1
                if failures > FAILURES * self.count:
                    raise ChildProcessError(f"the LIBERO simulator fails every time ({value}): try `vlakeep libero-check`")
                if tries[job] < TRIES:
                    todo.insert(0, job)
                else:
                    yield job, None, value
            waiting = [worker for worker in self._workers if worker.seen is not None]
            if waiting and len(waiting) >= self.pace.share * sum(worker.playing for worker in self._workers):
                with self.clock.answering(len(waiting)):
                    actions = act([w.job for w in waiting], [w.seen for w in waiting])
                self.pace.answered(len(waiting))
                for worker, action in zip(waiting, actions):
                    worker.seen, worker.given_up = None, action if isinstance(action, str) else None
                    self._send(worker, None if isinstance(action, str) else action)

    def _fill(self, todo: List[Job], tries: Dict[Job, int]) -> None:
        """Give every idle worker a job, if possible of the task that it has open; start workers while there are jobs for them."""
        idle = [worker for worker in self._workers if worker.job is None]
        while todo and (idle or len(self._workers) < self.count):
            if not idle:
                idle.append(self._start())
                self._workers.append(idle[-1])
            worker = idle.pop()
            own = [job for job in todo if (job.suite, job.task) == worker.task]
            busy = {other.task for other in self._workers if other.job is not None}
            free = [job for job in todo if (job.suite, job.task) not in busy]
            job = (own or free or todo)[0]
            todo.remove(job)
            tries[job] = tries.get(job, 0) + 1
            worker.job, worker.task = job, (job.suite, job.task)
            self._send(worker, job)

    def _send(self, worker: _Worker, value) -> None:
        worker.since = time.monotonic()
        try:
            worker.connection.send(value)
        except OSError:
            pass  # it is dead; _listen will find that out

    def _listen(self) -> List[Tuple[_Worker, str, Any]]:
        """What busy workers have to say: at least one message, unless the policy can be asked anyway."""
        busy = {worker.connection: worker for worker in self._workers if worker.job is not None and worker.seen is None}
        ready = cast(List[Connection], wait(list(busy), timeout=5.0)) if busy else []
        found: List[Tuple[_Worker, str, Any]] = []
        for connection in ready:
            try:
                kind, value = connection.recv()
            except (EOFError, OSError):
                busy[connection].process.join(5)
                kind, value = "error", f"the simulator process died (exit status {busy[connection].process.exitcode})"
            found.append((busy[connection], kind, value))
        now = time.monotonic()
        for connection, worker in busy.items():
            if connection not in ready and now - worker.since > self.silence:
                found.append((worker, "error", f"the simulator was silent for {self.silence:.0f} s"))
        return found
