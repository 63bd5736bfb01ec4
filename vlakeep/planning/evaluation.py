"""Memory and time of an evaluation: what a benchmark says that it is (benchmarks/amount.py), at what an answer of the model costs.

    episodes     the longer of policy and simulation, which go on side by side, and what of the one the other has to wait for
    questions    prompts with a picture, answered in words
    KL           from the base, on frames: its own answer, and a pass of each of both models over it
    texts        a pass without pictures
    drift        a pass of both models over the probe
"""

from typing import Dict, List, Sequence, Tuple

from vlakeep.benchmarks.amount import Amount, Play
from vlakeep.benchmarks.base import NEVER
from vlakeep.benchmarks.questions import ANSWER_TOKENS, KL_BATCH, QUESTION_BATCH, together
from vlakeep.core.hardware import GIB, PICTURE, SLACK, TENSORS, Work
from vlakeep.core.registry import benchmark_class

TEXT = 100  # columns of a text with all its choices, padded to the longest of its batch
SCORED = 15  # of them those whose next token is looked at
# cuBLAS keeps this for the stream of the warm calls and for that of the recording (32 MiB each on an H100): taken from its documentation.
WORKSPACES = 2 * 32 / 1024 * GIB


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Evaluation:
    """Of one configuration, as `planner` (predict.py) has it: the process that does most of it."""

    def __init__(self, planner):
        self.planner, self.work, self.card, self.config = planner, planner.work, planner.card, planner.config
        self.benchmark = benchmark_class(self.config.evaluate.benchmark)
        self.ranks = planner.gpus if self.benchmark.divides else 1
        self.amount: Amount = self.benchmark.amount(self.config, self.ranks, self.card.device == "cuda")
        self.tokens = self.work.action or self.work.answer
        self.chunk = min(self.config.evaluate.chunk or self.work.chunk, self.work.chunk)

    # Time

    def answer(self, play: Play) -> float:
        """Seconds of a call of the policy, which makes tensors of its rows before the card has something to do."""
        return self.answered(play.rows, self.tokens, graphed=self.graphed(play)) + TENSORS * play.rows

    def graphed(self, play: Play) -> bool:
        """Whether its answers are one CUDA graph."""
        return (play.recorded and self.config.evaluate.cuda_graph and self.card.device == "cuda" and self.planner.kind.waits_for_nothing)

    def answered(self, rows: float, tokens: int, adapted: bool = True, graphed: bool = False) -> float:
        """Seconds in which `rows` prompts are answered together. The host may be what the further tokens wait for, and the card what the
        prompts do."""
        lora = self.lora if adapted else (lambda tokens: Work())
        first = self.work.generate(rows, rows, 1)
        further = self.work.generate(rows, rows, tokens) + first.times(-1) + (lora(rows) + self.unpacked).times(tokens - 1)
        return self.card.seconds(first + lora(rows * self.work.columns) + self.unpacked, graphed) + self.card.seconds(further, graphed)

    def lora(self, tokens: float) -> Work:
        adapters = self.planner.adapters
        return self.work.lora_work(adapters.leaves, adapters.rank, tokens, len(adapters.layers))

    @property
    def unpacked(self) -> Work:
        """What every pass begins with where the base is of 4 bits."""
        return self.work.unpacked(self.planner.numbers, self.work.layers)

    def both(self, rows: float) -> Work:
        """A pass of the base, and one of base and adapters."""
        return (self.work.forward(rows) + self.unpacked).times(2) + self.lora(rows * self.work.columns)

    def question(self, rows: int) -> float:
        return self.answered(rows, ANSWER_TOKENS) + PICTURE * rows

    def distance(self, rows: int) -> float:
        both = self.both(rows) + self.work.head_work(2 * rows * self.tokens)
        return self.answered(rows, self.tokens, adapted=False) + self.card.seconds(both) + PICTURE * rows

    def text(self, rows: int) -> float:
        # Without pictures: the decoder alone.
        return self.card.seconds(self.work.layer_work(rows * TEXT, TEXT, self.work.layers) + self.lora(rows * TEXT)
                                 + self.unpacked + self.work.head_work(rows * SCORED))

    def drift(self) -> float:
        """Seconds of the pass of both models over the probe; the states of one process and of the others go on together."""
        size = min(self.config.icsm.batch_size, self.config.probe.size)
        one = self.card.seconds(self.both(size) + Work(pictures=2 * size))
        return self.config.probe.size / size * one / self.planner.gpus

    def asked(self) -> List[Tuple[str, int, float, int]]:
        """(what, how many in all, seconds, rows of a batch) of what is asked beside the episodes."""
        found = []
        questions, frames = (together(most, self.work.layers, self.work.width) for most in (QUESTION_BATCH, KL_BATCH))
        for what, piles, most, takes in (("questions", self.amount.questions, questions, self.question),
                                        ("frames for the KL from the base", self.amount.retention, frames, self.distance),
                                        ("texts", self.amount.texts, self.amount.text_rows, self.text)):
            if sum(piles):
                batches = [min(most, pile - start) for pile in piles for start in range(0, pile, most)]
                # Whole batches are dealt out.
                mine = min(1.0, -(-len(batches) // self.planner.gpus) / len(batches))
                found.append((what, sum(piles), mine * sum(map(takes, batches)), max(batches)))
        return found

    # Memory

    def answered_in(self, rows: int) -> Dict[str, float]:
        numbers = self.planner.numbers
        return {"keys and values": self.work.cache(numbers, rows), "a layer": self.work.passing(numbers, rows)}

    def phases(self, asked: Sequence[Tuple[str, int, float, int]]) -> Dict[str, float]:
        """The episodes' answers, whose blocks a graph keeps to itself while it lives; then the largest of what is asked beside them."""
        found: Dict[str, float] = {}
        if self.amount.plays:
            play = max(self.amount.plays, key=lambda play: play.most)
            found = self.answered_in(play.most)
            if self.graphed(play):
                found = {"the graph's own memory": (1 + SLACK) * sum(found.values()) + WORKSPACES}
        beside = {}
        for what, _, _, rows in asked:
            if what == "texts":
                beside[what] = self.work.passing(self.planner.numbers, rows, TEXT)
            else:
                beside[what] = sum(self.answered_in(rows).values())
        if beside:
            most = max(beside, key=lambda what: beside[what])
            found[most] = beside[most]
        return found

    # Together

    def plan(self):
        """The StagePlan."""
        planner, amount = self.planner, self.amount
        asked = self.asked() if amount.model else []
        seconds, notes = 0.0, []
        each = None
        for play in amount.plays:
            answer = self.answer(play) if amount.model else 0.0
            takes = play.seconds(answer, self.chunk)
            seconds, each = seconds + takes, answer if each is None else each
            notes += self.told(play, answer, takes)
        notes += [f"steps: {said}" for said in dict.fromkeys(play.said for play in amount.plays)]
        for what, count, takes, rows in asked:
            seconds += takes
            notes.append(f"{count:,} {what}, up to {rows} together: {duration(takes)}")
        if amount.model and self.benchmark.drift != NEVER:
            takes = self.drift()
            seconds += takes
            notes.append(f"the drift, {self.config.probe.size:,} items of the probe: {duration(takes)}")
        if not amount.model:
            return planner._made("evaluate", {}, {}, seconds, each, notes, weights=0.0)
        held = {"adapters": 4.0 * self.work.adapter_parameters(planner.adapters)}
        return planner._made("evaluate", held, self.phases(asked), self.card.seconds(planner.loading) + seconds, each, notes)

    def told(self, play: Play, answer: float, takes: float) -> List[str]:
        here = f" on each of {self.ranks} GPUs" if self.ranks > 1 else ""
        found = [f"{play.name}: {play.episodes:,} episodes{here}, {play.steps:,.0f} steps, {duration(takes)}"]
        if self.amount.model:  # a control has none
            looks = f"asked every {self.chunk} steps, " if self.chunk > 1 and play.queued else ""
            graph = " as one CUDA graph" if self.graphed(play) else ""
            used = play.steps / play.calls
            idle = f", of which {used:.3g} are used" if used < 0.99 * play.rows else ""
            found.append(f"  policy: {looks}{answer:.3f} s a call of {play.rows:.3g} rows{idle}{graph}")
        if play.simulator:
            found.append(f"  beside it: {play.simulator}; {duration(play.simulated)} in all")
        return found
