"""The model's side of an evaluation: what a benchmark asks for actions, and the queue in which those of a chunk wait for their turn.

Axes: N pictures, C actions of a chunk, A action dimensions, Q numbers of the robot's state.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any, Callable, Deque, Dict, Hashable, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from vlakeep.benchmarks.questions import action_token_kl
from vlakeep.core.names import model_key
from vlakeep.data.sample import Sample, SampleSpec
from vlakeep.data.statistics import normalise, normalise_state
from vlakeep.models.alarms import ActionWatch

_NOT_FINITE = "ValueError: the policy gave an action that is not finite"


Pictures = Union[Sequence[np.ndarray], np.ndarray, Mapping[str, Sequence[np.ndarray]]]


def attempt(backbone, samples: List[Sample], unnorm_key, width: int = 0) -> Tuple[np.ndarray, np.ndarray]:
    """(chunks of actions [N, C, A], bool [N]: whether the answer ended early), no row of which is an error: a policy that no longer speaks
    actions fails as it would on a robot. width: tokens that prompts are padded to at least."""
    return backbone.attempt_chunks(backbone.processor.encode_prompts(samples, width), unnorm_key)


class ChunkQueue:
    """Actions of chunks, episode by episode: what is left of a chunk is played before the model is asked again."""

    def __init__(self):
        self._left: Dict[Hashable, Deque] = {}

    def __call__(self, episodes: Sequence[Hashable], ask: Callable[[List[int]], Sequence]) -> List:
        """Per episode its next action [A], or the text of an error. episodes: different ones, by whatever tells them apart. ask(rows): for
        those rows of `episodes` that have none left, a chunk [C, A] or the text of an error each."""
        due = [row for row, episode in enumerate(episodes) if not self._left.get(episode)]
        for row, chunk in zip(due, ask(due) if due else ()):
            self._left[episodes[row]] = deque([chunk] if isinstance(chunk, str) else chunk)
        return [self._left[episode].popleft() for episode in episodes]

    def forget(self, episode: Hashable) -> None:
        """It begins anew."""
        self._left.pop(episode, None)


class ActionPolicy:
    """(images [N], instructions [N]) -> un-normalised actions [N, A], one batched forward.

    chunk: how many actions of an answer are played before the model looks again. Where it is more than one, whoever plays episodes says
    which is which (`episodes`); without that the model is asked in every step, and the first action of each answer is played.
    """

    def __init__(self, backbone, unnorm_key, spoken: Sequence[str] = (), most: Optional[int] = None):
        """spoken: instructions to whose longest all prompts are padded, so that every batch of one size has one shape. most: actions of an
        answer that are played; None: all."""
        processor = backbone.processor
        self._backbone, self._key, self._queue = backbone, unnorm_key, ChunkQueue()
        blanks = [processor.spec.blank(0, processor.picture_size, text) for text in spoken]
        self._width = max((len(processor.whole_prompt(blank)) for blank in blanks), default=0)
        self.chunk = min(most or processor.spec.chunk, processor.spec.chunk)
        self.watch = ActionWatch(backbone.action_statistics(unnorm_key), backbone.stand_in)

    def __call__(self, images: Pictures, instructions: Sequence[str], count: Optional[int] = None,
                 episodes: Optional[Sequence[Hashable]] = None, states: Optional[np.ndarray] = None) -> np.ndarray:
        """images: of the only camera, or a dictionary with those of each. count: rows that are asked for; the others fill up a batch and
        are not watched. states [N, Q]: of the robots, in the units of the data."""
        if episodes is None:
            return self.chunks(images, instructions, count, states, 1)[:, 0]

        def ask(rows: List[int]) -> List[np.ndarray]:
            return list(self.chunks(_picked(images, rows), [instructions[row] for row in rows], None,
                                    None if states is None else states[rows]))
        return np.stack(self._queue(episodes, ask))

    def chunks(self, images: Pictures, instructions: Sequence[str], count: Optional[int] = None, states: Optional[np.ndarray] = None,
               most: Optional[int] = None) -> np.ndarray:
        """The actions of each answer that are played, [N, C, A]; the first `most` of them. See __call__."""
        samples = self._samples(images, instructions, states)
        chunks_NCA, early_N = attempt(self._backbone, samples, self._key, self._width)
        chunks_NCA = chunks_NCA[:, :most or self.chunk]
        self.watch.add(chunks_NCA[:count].reshape(-1, chunks_NCA.shape[-1]), early_N[:count])
        return chunks_NCA

    def _samples(self, images: Pictures, instructions: Sequence[str], states: Optional[np.ndarray]) -> List[Sample]:
        if self._backbone.processor.spec.state and states is not None:
            states = normalise_state(states, self._backbone.norm_stats[self._backbone.action_key(self._key)])
        found = []
        for row, text in enumerate(instructions):
            state = None if states is None else states[row]
            if isinstance(images, Mapping):
                found.append(Sample(None, text, cameras={name: own[row] for name, own in images.items()}, state=state))
            else:
                found.append(Sample(images[row], text, state=state))
        return found


def _picked(images: Pictures, rows: List[int]) -> Pictures:
    """Those of some rows."""
    if isinstance(images, Mapping):
        return {name: [own[row] for row in rows] for name, own in images.items()}
    return [images[row] for row in rows]


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
    def model(self) -> str:
        """Folder of the evaluations of the base model, or of what stands in its place (core/names.py)."""
        return model_key(self.backbone.name, self.base) if self.backbone is not None else self.name

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

    @property
    def spec(self) -> SampleSpec:
        """What the model takes of a sample."""
        return self.backbone.processor.spec

    def policy(self, key: Optional[str] = None, spoken: Sequence[str] = (), most: Optional[int] = None) -> ActionPolicy:
        return ActionPolicy(self.backbone, key or self.key, spoken, most)

    def attempt(self, samples: List[Sample]) -> Tuple[np.ndarray, np.ndarray]:
        """(chunks [N, C, A], bool [N]) as `attempt`, with the picked statistics."""
        return attempt(self.backbone, samples, self.key)

    def tokens(self, actions_NA: np.ndarray) -> np.ndarray:
        """Token ids of actions [N, A], or of chunks [N, C, A], in the units of the picked statistics."""
        return self.backbone.processor.encode_actions(normalise(actions_NA, self.known[self.key])[0])

    def distance(self, samples: List[Sample]) -> np.ndarray:
        """KL from the base [N] over its own action tokens, in nats."""
        return action_token_kl(self.backbone, samples)


class FixedBatch:
    """A policy that is always asked for `rows` pictures: every call has one shape.

    policy(images, instructions, count) -> actions, or chunks of them, of which the first `count` are used. It pads instructions to one
    length. cameras: what the model calls its cameras where it has several; images are a dictionary of them then. Where what is seen has a
    `state`, policy(images, instructions, count, states).
    """

    def __init__(self, policy: Callable, rows: int, cameras: Sequence[str] = ()):
        self._policy, self._rows, self._cameras = policy, rows, tuple(cameras)

    def __call__(self, jobs: Sequence, seen: Sequence) -> List:
        """Per job its action (or chunk), or the text of an error. `seen`: what has an `image` and an `instruction`; `others` are the
        pictures of the cameras behind the first."""
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
        def filled(rows: List[np.ndarray]) -> np.ndarray:
            return np.stack([*rows, *[np.zeros_like(rows[0])] * (self._rows - len(rows))])

        images: Any = filled([s.image for s in part])
        if self._cameras:
            views = [images, *(filled([s.others[i] for s in part]) for i in range(len(self._cameras) - 1))]
            images = dict(zip(self._cameras, views))
        states = [] if getattr(part[0], "state", None) is None else [filled([s.state for s in part])]
        texts = [s.instruction for s in part] + [part[0].instruction] * (self._rows - len(part))
        return list(self._policy(images, texts, len(part), *states)[:len(part)])
