"""When the simulators' policy is asked, and where the seconds of an evaluation go."""

import contextlib
import time
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, List, Tuple

SHARES = (0.5, 1.0)
SPAN = 6.0  # seconds of a trial
TRIALS = 2  # of each share
STARTED = 10  # pictures a worker, in the mean, before the first trial: until then simulators are imported and scenes loaded


@dataclass
class Clock:
    """How many seconds an evaluation took, and in how many of them the policy answered; in the others it waited for simulators."""

    episodes: int = 0
    answers: int = 0  # calls of the policy
    pictures: int = 0  # of all calls
    seconds: float = 0.0
    busy: float = 0.0

    @contextlib.contextmanager
    def answering(self, pictures: int) -> Iterator[None]:
        """The policy is asked for that many pictures."""
        began = time.perf_counter()
        yield
        self.busy += time.perf_counter() - began
        self.answers, self.pictures = self.answers + 1, self.pictures + pictures

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The evaluation goes on."""
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began

    def line(self) -> str:
        """In one sentence."""
        total = max(self.seconds, 1e-9)
        each, rows = 1000 * self.busy / max(self.answers, 1), self.pictures / max(self.answers, 1)
        return (f"{self.episodes} episodes in {total:.0f} s, {60 * self.episodes / total:.1f} a minute; the policy answered "
                f"{self.answers:,} times, {rows:.1f} pictures and {each:.1f} ms each, and waited for simulators "
                f"{100 * (1 - self.busy / total):.0f} % of the time")


class Pace:
    """Which share of the workers that play must wait before the policy is asked: half, so that the others simulate meanwhile, or all, so
    that none of them draws on the card on which it answers. Each is tried for some seconds, and the one with more pictures a second stays.
    What is answered does not depend on it, as each call has one shape.
    """

    def __init__(self, workers: int, now: Callable[[], float] = time.perf_counter):
        self._now, self._before = now, STARTED * workers
        self._plan: List[float] = list(SHARES) * TRIALS if workers > 1 else []
        self._seen: Dict[float, Tuple[int, float]] = {share: (0, 0.0) for share in SHARES}  # pictures, seconds
        self._pictures, self._began = 0, 0.0
        self.share = SHARES[0]

    @property
    def decided(self) -> bool:
        """Whether the trials are over."""
        return not self._plan

    def answered(self, pictures: int) -> None:
        """Called behind every answer, for so many pictures."""
        if not self._plan:
            return
        if self._before > 0:  # not begun
            self._before -= pictures
            self._began = self._now()
            return
        self._pictures += pictures
        seconds = self._now() - self._began
        if seconds < SPAN:
            return
        share = self._plan.pop(0)
        known, took = self._seen[share]
        self._seen[share] = known + self._pictures, took + seconds
        self._pictures, self._began = 0, self._now()
        self.share = self._plan[0] if self._plan else max(SHARES, key=self.rate)

    def rate(self, share: float) -> float:
        """Pictures a second in the trials of a share."""
        pictures, seconds = self._seen[share]
        return pictures / max(seconds, 1e-9)

    def line(self) -> str:
        """What the trials said, in half a sentence."""
        if not self.decided or not any(pictures for pictures, _ in self._seen.values()):
            return "asked when half of them waited"
        rates = " and ".join(f"{self.rate(share):.0f} a second when {'all' if share == 1 else 'half'} waited" for share in SHARES)
        return f"pictures in the trials: {rates}"
