"""Alarms for what runs without an error and costs weeks: a model that does not look, one that always does the same, pictures the wrong way.

Whatever can be refused before work is lost raises; what shows only in results is returned as text and goes into the summary.
"""

from copy import copy
from typing import Any, Callable, Dict, List, Sequence, Union

import numpy as np
import torch

from vlakeep.models.base import Backbone

SEEN_AT_LEAST = 100  # actions, before anything is said about them
TURNS = {"as they are": lambda x: x, "turned by 180 degrees": lambda x: x[::-1, ::-1], "upside down": lambda x: x[::-1],
         "mirrored": lambda x: x[:, ::-1]}


@torch.no_grad()
def vision_effect(backbone: Backbone, instruction: str = "pick up the object") -> float:
    """Largest change of a log-probability of the first action token between a black and a white picture; 0 when vision is not used."""
    processor = backbone.processor
    samples = [processor.spec.blank(value, processor.picture_size, instruction) for value in (0, 255)]
    training = backbone.training
    backbone.eval()
    black_V, white_V = torch.log_softmax(backbone.next_logits(processor.encode_prompts(samples)), dim=-1)
    backbone.train(training)
    return float((black_V - white_V).abs().max())


def check_vision(backbone: Backbone) -> None:
    """Raise ValueError for a model that answers a black and a white picture alike."""
    effect = vision_effect(backbone)
    if effect <= 1e-6:  # a NaN is told by the training step, which knows more about it
        raise ValueError(f"{backbone.name} answers a black and a white picture alike (largest change of a log-probability "
                         f"{effect:.1e}), so it does not use its vision: the vision weights or the projector are damaged or zero; "
                         "fetch the checkpoint again")


class ActionWatch:
    """Collects what a policy did in an evaluation; `alarms` says what is suspicious about it."""

    def __init__(self, statistics: dict, stand_in: str):
        """statistics: q01, q99 and mask of the actions, as Backbone.action_statistics; stand_in: as Backbone.stand_in."""
        self._stand_in = stand_in
        self._low, self._high = np.array(statistics["q01"], dtype=float), np.array(statistics["q99"], dtype=float)
        self._scaled = np.array(statistics.get("mask", np.ones(len(self._low))), dtype=bool) & (self._high > self._low)
        self._distinct: Dict[bytes, int] = {}
        self._at_end, self._count, self._early = np.zeros(len(self._low)), 0, 0

    def add(self, actions_NA: np.ndarray, early_N: Union[Sequence[bool], np.ndarray] = ()) -> None:
        """early_N: bool, whether the answer ended before all action tokens were out."""
        self._early += int(np.sum(early_N))
        for action_A in np.asarray(actions_NA, dtype=float):
            if not np.isfinite(action_A).all():
                continue
            key = action_A.tobytes()
            self._distinct[key] = self._distinct.get(key, 0) + 1
            span_A = np.where(self._scaled, self._high - self._low, 1.0)
            position_A = np.where(self._scaled, 2 * (action_A - self._low) / span_A - 1, 0.0)
            self._at_end += np.abs(position_A) > 0.99
            self._count += 1

    def with_others(self, gather: Callable[[Any], List[Any]]) -> "ActionWatch":
        """What all processes of an evaluation have collected; gather(value): that of each."""
        mine = {"distinct": {key.hex(): count for key, count in self._distinct.items()}, "at_end": self._at_end, "count": self._count,
                "early": self._early}
        whole = copy(self)
        whole._distinct, whole._at_end, whole._count, whole._early = {}, np.zeros_like(self._at_end), 0, 0
        for one in gather(mine):
            for key, count in one["distinct"].items():
                whole._distinct[key] = whole._distinct.get(key, 0) + count
            whole._at_end = whole._at_end + one["at_end"]
            whole._count, whole._early = whole._count + one["count"], whole._early + one["early"]
        return whole

    def alarms(self) -> List[str]:
        if self._count < SEEN_AT_LEAST:
            return []
        found = []
        if self._early:
            often = ": the model no longer speaks actions there" if self._early >= 0.01 * self._count else ""
            found.append(f"{self._early} of {self._count} answers ended before all action tokens were out{often}; {self._stand_in}")
        share = max(self._distinct.values()) / self._count
        if share > 0.5 or len(self._distinct) <= 0.01 * self._count:
            found.append(f"the policy has collapsed: {len(self._distinct)} different actions in {self._count} steps, one of them in "
                         f"{share:.0%}")
        stuck = [int(d) for d in np.flatnonzero(self._at_end > 0.9 * self._count)]
        if stuck:
            found.append(f"action dimensions {stuck} are at an end of their range in more than nine steps of ten: wrong statistics (key "
                         "--backbone.unnorm_key), or a model that has diverged")
        return found


def orientation_alarm(trained: np.ndarray, seen: np.ndarray) -> List[str]:
    """Compare the mean training picture with the mean picture of an evaluation, both [H, W, 3]; one line when another turn fits better.

    Scenes of one benchmark share table, robot and camera, so that their mean pictures agree where the orientation does.
    """
    def flat(picture):
        grey = np.asarray(picture, dtype=float).mean(-1)
        rows, columns = (np.linspace(0, size - 1, 32).astype(int) for size in grey.shape)
        return grey[np.ix_(rows, columns)]

    reference = flat(trained)
    fits = {name: float(np.corrcoef(reference.ravel(), turn(flat(seen)).ravel())[0, 1]) for name, turn in TURNS.items()}
    best = max(fits, key=lambda name: fits[name])
    if best == "as they are" or not fits[best] > fits["as they are"] + 0.1:
        return []
    return [f"the evaluation's pictures fit the training data better {best} (correlation {fits[best]:.2f}) than as they are "
            f"({fits['as they are']:.2f}): see --data.rotate and docs/formats.md"]
