"""The model's side of an evaluation: what a benchmark asks for actions. Axes: N pictures, A action dimensions."""

from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from vlakeep.benchmarks.questions import action_token_kl
from vlakeep.data.sample import Sample
from vlakeep.data.statistics import normalise
from vlakeep.models.alarms import ActionWatch

_NOT_FINITE = "ValueError: the policy gave an action that is not finite"


def attempt_actions(backbone, images, instructions, unnorm_key, width: int = 0) -> Tuple[np.ndarray, np.ndarray]:
    """(actions [N, A], bool [N]: whether the answer ended early), no row of which is an error: a policy that no longer speaks actions
    fails as it would on a robot. width: tokens that prompts are padded to at least."""
    samples = [Sample(image, text) for image, text in zip(images, instructions)]
    return backbone.attempt_batch(backbone.processor.encode_prompts(samples, width), unnorm_key)


class ActionPolicy:
    """(images [N], instructions [N]) -> un-normalised actions [N, A], one batched forward."""

    def __init__(self, backbone, unnorm_key, spoken: Sequence[str] = ()):
        """spoken: instructions to whose longest all prompts are padded, so that every batch of one size has one shape."""
        self._backbone, self._key = backbone, unnorm_key
        self._width = max((len(backbone.processor.whole_prompt(Sample(None, text))) for text in spoken), default=0)
        self.watch = ActionWatch(backbone.action_statistics(unnorm_key))

    def __call__(self, images, instructions, count: Optional[int] = None):
        """count: rows that are asked for; the others fill up a batch and are not watched."""
        actions_NA, early_N = attempt_actions(self._backbone, images, instructions, self._key, self._width)
        self.watch.add(actions_NA[:count], early_N[:count])
        return actions_NA


@dataclass
class Target:
    """What is evaluated: a model, or (backbone None) what a benchmark puts in its place, such as a replay of demonstrations."""

    name: str
    weights: str  # what identifies it
    backbone: Any = None
    key: str = ""  # of the action statistics that the benchmark has picked

    @property
    def base(self) -> str:
        """Hash of the base weights."""
        return self.backbone.weights_sha256 if self.backbone is not None else ""

    @property
    def is_base(self) -> bool:
        """Whether it is the model before training: the teacher, which has no distance from itself."""
        return self.name == "base"

    @property
    def known(self) -> Dict[str, dict]:
        """Action statistics by key."""
        return self.backbone.norm_stats

    @property
    def picture_size(self) -> Tuple[int, int]:
        """H, W of the model's input."""
        height, width = self.backbone.processor.picture_size
        return height, width

    def policy(self, key: Optional[str] = None, spoken: Sequence[str] = ()) -> ActionPolicy:
        return ActionPolicy(self.backbone, key or self.key, spoken)

    def attempt(self, images, instructions) -> Tuple[np.ndarray, np.ndarray]:
        """As attempt_actions, with the picked statistics."""
        return attempt_actions(self.backbone, images, instructions, self.key)

    def tokens(self, actions_NA: np.ndarray) -> np.ndarray:
        """Token ids of actions in the units of the picked statistics."""
        return self.backbone.processor.action_tokenizer.encode(normalise(actions_NA, self.known[self.key])[0])

    def distance(self, images, instructions) -> np.ndarray:
        """KL from the base [N] over its own action tokens, in nats."""
        return action_token_kl(self.backbone, [Sample(image, text) for image, text in zip(images, instructions)])


class FixedBatch:
    """A policy that is always asked for `rows` pictures: every call has one shape.

    policy(images, instructions, count) -> actions, of which the first `count` are used. It pads instructions to one length.
    """

    def __init__(self, policy: Callable, rows: int):
        self._policy, self._rows = policy, rows

    def __call__(self, jobs: Sequence, seen: Sequence) -> List:
        """Per job its action, or the text of an error. `seen`: what has an `image` and an `instruction`."""
        answers: List = []
        for start in range(0, len(seen), self._rows):
            part = list(seen[start:start + self._rows])
            try:
                answers += self._ask(part)
            except Exception:  # what one picture provokes must not take the other episodes along
                for one in part:
                    try:
                        answers += self._ask([one])
                    except Exception as error:
                        answers.append(f"{type(error).__name__}: {error}")
        return [a if isinstance(a, str) or np.isfinite(a).all() else _NOT_FINITE for a in answers]

    def _ask(self, part: List) -> List[np.ndarray]:
        fill = self._rows - len(part)
        images = np.stack([s.image for s in part] + [np.zeros_like(part[0].image)] * fill)
        return list(self._policy(images, [s.instruction for s in part] + [part[0].instruction] * fill, len(part))[:len(part)])
