"""How much an evaluation is, reckoned from its settings before anything is opened: what `vlakeep plan` makes time and memory of.

A benchmark says it (Benchmark.amount); what an answer of the model costs is planning/evaluation.py's. Whatever is not known beforehand is
assumed, and said in the lines that the plan prints:

    an episode   takes SHARE of its limit
    a frame      of a data set is one of FRAMES of its episode
    a simulator  has a core of its own
"""

from typing import Dict, List, NamedTuple

# Of its limit: half of it where the episode succeeds, all of it for the one in four that fails. Two evaluations of libero_object with .85
# and .90 of success took .47 and .49 (docs/log.md).
SHARE = 0.625
SAID = f"{SHARE} of the limit each: half of it where it succeeds, one in four fails; {1 / SHARE:g} times as many if all fail"
UNKNOWN = 300  # steps of an episode of a benchmark that does not say more
FRAMES = 150  # of an episode of a data set; those of LIBERO's suites have 120 to 270


class Play(NamedTuple):
    """Episodes as one process plays them. calls: of the policy, with `rows` on average, where it looks before every step; alone: those of
    them that nothing of the simulation goes beside; most: rows of the largest call."""

    name: str
    episodes: int
    steps: float
    said: str  # what of it is assumed
    calls: float
    rows: float
    alone: float
    most: int
    simulated: float = 0.0  # seconds of simulation that follow one another
    simulator: str = ""  # in words
    queued: bool = True  # whether what is left of a chunk of actions is played before the model looks again
    recorded: bool = False  # whether answers may be one CUDA graph

    def seconds(self, answer: float, chunk: int) -> float:
        """With so much for an answer, which holds a chunk of so many actions: simulation and policy overlap but for `alone`."""
        looks = 1 / chunk if self.queued else 1.0
        return max(self.calls * looks * answer, self.simulated + self.alone * looks * answer)


class Amount(NamedTuple):
    """plays: of one process. Of all processes together, in piles whose batches are dealt out: questions with a picture, frames for the KL
    from the base, texts that are scored `text_rows` at a time. model: whether one is asked at all."""

    plays: List[Play]
    questions: List[int] = []
    retention: List[int] = []
    texts: List[int] = []
    text_rows: int = 16
    model: bool = True


def share(count: int, ranks: int) -> int:
    """Of so many episodes those of the process that plays most."""
    return -(-count // ranks)


def beside(name: str, episodes: int, limit: int, said: str, workers: int, batch: int, step: float, begin: float, simulator: str) -> Play:
    """Simulator processes before a policy reckoned as asked when half of them wait, with a batch that is filled up. step, begin: seconds
    of a simulator for a step, and before the first one of an episode."""
    workers = max(1, min(workers, episodes))
    half = -(-workers // 2)
    in_turn = -(-half // batch)  # calls until the half that waits has its answers
    steps = episodes * limit * SHARE
    each = steps / workers  # of a worker
    return Play(name, episodes, steps, said, calls=each * workers / half * in_turn, rows=batch, alone=each * in_turn, most=batch,
                simulated=each * step + episodes / workers * begin, simulator=simulator, recorded=True)


def lockstep(name: str, limits: Dict[str, int], episodes: int, ranks: int, parallel: int, step: float, simulator: str) -> Play:
    """Episodes of skills, `parallel` of them in one batch, which those leave that are over; the last is one that fails. step: seconds of
    one episode's step, one after the other."""
    own = share(episodes * len(limits), ranks)
    steps = episodes * sum(limits.values()) * SHARE / ranks
    calls = -(-own // parallel) * max(limits.values())
    return Play(name, own, steps, SAID, calls, steps / calls, calls, min(own, parallel), steps * step, simulator)


def frames(name: str, episodes: int, parallel: int, picture: float) -> Play:
    """Every frame of recorded episodes, `parallel` at a time within an episode. picture: seconds to read one."""
    calls = episodes * -(-FRAMES // parallel)
    steps = float(episodes * FRAMES)
    return Play(name, episodes, steps, f"{FRAMES} frames each", calls, steps / calls, calls, min(parallel, FRAMES), steps * picture,
                f"pictures read in one process, {1000 * picture:g} ms each", queued=False)
