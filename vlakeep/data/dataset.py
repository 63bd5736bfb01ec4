"""What all data sets of demonstrations share, whatever their files: index, split, statistics, normalised actions, samples.

A format adds how its files are indexed and how one picture is read: rlds.py, hdf5.py, lerobot.py. formats.py picks the format.
As officially: statistics over all episodes, training on the first part of the split, episodes without language left out.
Axes: E episodes, N frames, A action dimensions, Q numbers of a robot's state.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from vlakeep.data import suggest
from vlakeep.data.bad import in_words
from vlakeep.data.conventions import USUAL_WIDTH, DataCard, Gripper, as_declared, card_place, check_values, to_open, usual_gripper
from vlakeep.data.degenerate import demonstrated, kinds
from vlakeep.data.index import CONTENT, STATES, VALID, EpisodeIndex, optional
from vlakeep.data.sample import ONE_PICTURE, Episode, Sample, SampleSpec
from vlakeep.data.statistics import action_statistics, normalise, normalise_state, standardise, state_statistics


@dataclass(frozen=True)
class Conventions:
    """What the files do not say of themselves; the fields of the same names in the `data` section. None is the format's usual."""

    camera: Optional[str] = None
    gripper: Optional[str] = None
    rotate: Optional[bool] = None
    card: Optional[DataCard] = None  # what the data set's own card says; it goes before the others
    degenerate: Optional[str] = None  # `official`, or None for what was demonstrated (degenerate.py)
    cameras: Optional[Tuple[str, ...]] = None  # for models of several cameras: what these are called here, in the model's order
    state: Optional[Tuple[str, ...]] = None  # for models that take it: the features whose numbers, one after the other, are the state

    def state_names(self, wanted: bool) -> Optional[Tuple[str, ...]]:
        """The features of the state; () for the format's usual ones, None where no state is wanted."""
        return (self.state or ()) if wanted else None

    def __bool__(self) -> bool:
        return any(value is not None for value in vars(self).values())

    def told(self) -> Dict[str, Any]:
        """For a hash: without what is not said, but for the three that were always there."""
        said = {"card": self.card.identity() if self.card else None, "degenerate": self.degenerate, "cameras": self.cameras,
                "state": self.state}
        return {"camera": self.camera, "gripper": self.gripper, "rotate": self.rotate,
                **{name: value for name, value in said.items() if value is not None}}

    def with_card(self, card: Optional[DataCard]) -> "Conventions":
        """With what a card says in the place of what it does not leave open."""
        if card is None:
            return self
        return replace(self, card=card, camera=card.camera or self.camera, rotate=self.rotate if card.rotate is None else card.rotate)


USUAL = Conventions()


class DemoDataset:
    """The labelled episodes of one split, addressed as (episode, frame).

    A subclass calls this constructor with its index and reads pictures in `_picture`. split_range: first episode and number of
    episodes of the split. fraction: share of them, from the start, rounded as TFDS rounds `train[:95%]`.
    Raises ValueError, naming the folder and the remedy.
    """

    kind = ""  # the format in one word
    files: Tuple[str, ...] = ()  # patterns of the files that hold the data
    needs: Tuple[str, ...] = ()  # packages of the extra that is called like the format
    rotated = False  # whether the format's pictures stand on their heads, so that they have to be turned
    spec = ONE_PICTURE  # of the model that the samples are for
    # What the files say of themselves, for the data card; a subclass sets them before it calls the constructor.
    action_names: Tuple[str, ...] = ()
    fps: Optional[float] = None
    robot: str = ""
    camera: str = ""  # the key of the pictures that are looked at

    def __init__(self, folder: Path, name: str, index: EpisodeIndex, split_range: Tuple[int, int], fraction: float,
                 conventions: Conventions):
        self.folder, self.name, self.conventions = folder, name, conventions
        self.index = index = self._declared(index)
        before, count = split_range
        self.split_episodes = int(round(round(fraction * 100, 9) * count / 100))
        first = index.start_E[before:before + self.split_episodes]
        last = index.start_E[before + 1:before + 1 + self.split_episodes]
        empty = index.texts.index("") if "" in index.texts else -1
        labelled = np.array([(index.text_N[a:b] != empty).any() for a, b in zip(first, last)], dtype=bool)
        if not labelled.any():
            raise ValueError(f"{folder}: none of the {count} episodes of the split is left with fraction {fraction} and a "
                             f"language instruction; raise --data.train_fraction, or write `instruction: WORDS` to {card_place(folder)} "
                             "for episodes without a text")
        self._before = before
        self._first = first[labelled]
        self._numbers = before + np.flatnonzero(labelled)
        self.lengths = (last - first)[labelled]  # int64: frames of each usable episode
        self.unlabelled = int((~labelled & (last > first)).sum())
        self.left_out = list(map(in_words, index.bad.items()))

        self._standard_NA, self.grippers = self._standard(index)
        episodes = int((np.diff(index.start_E) > 0).sum())
        self._own = action_statistics(self._standard_NA, episodes, [one.dimension for one in self.grippers])
        if conventions.degenerate == "official":
            self.degenerate = kinds(self._standard_NA, self._own)
        else:
            self._standard_NA, self._own, self.degenerate = demonstrated(self._standard_NA, self._own)
        self._views: Dict[str, DemoDataset] = {}
        self._state_NQ = index.places.get(STATES)
        if self._state_NQ is not None:
            self._own["proprio"] = state_statistics(self._state_NQ)
        self.scale(self._own)

    def _declared(self, index: EpisodeIndex) -> EpisodeIndex:
        """The index as the data card says; without one an action must be one arm's seven values. ValueError with a card to confirm."""
        card, width = self.conventions.card, index.actions_NA.shape[1]
        if width != USUAL_WIDTH and (card is None or card.grippers is None):
            raise ValueError(suggest.refusal(self, index))
        index = as_declared(index, card)
        if card is not None:
            check_values(index.actions_NA, card)
        return index

    def _standard(self, index: EpisodeIndex) -> Tuple[np.ndarray, Tuple[Gripper, ...]]:
        """Actions with every gripper at 1 = open, 0 = close, and the grippers as stored."""
        card, gripper = self.conventions.card, self.conventions.gripper
        if card is None or card.grippers is None:
            try:
                standard_NA = standardise(index.actions_NA, self.name, gripper)
            except ValueError as error:
                raise ValueError(f"{error}\n{suggest.offer(self, index)}") from error
            words = gripper or ("libero" if self.name.startswith("libero") else "standard")
            return standard_NA, (usual_gripper(words, index.actions_NA.shape[1]),)
        standard_NA = np.array(index.actions_NA, dtype=np.float32)
        for one in card.grippers:
            standard_NA[:, one.dimension] = to_open(index.actions_NA[:, one.dimension], one, index.start_E)
        return standard_NA, card.grippers

    def scale(self, statistics: Dict) -> None:
        """Normalise the actions with these statistics (an entry of dataset_statistics.json) instead of the data set's own."""
        expected, width = self._standard_NA.shape[1], len(statistics["action"]["q01"])
        if width != expected:
            raise ValueError(f"{self.folder} has actions of {expected} values, the statistics are of {width} (--data.statistics)")
        self.statistics = statistics
        self.scale_state(statistics)
        official = self.conventions.degenerate == "official"
        self.actions_NA, _ = normalise(self._standard_NA, statistics, official)
        used = np.concatenate([np.arange(a, a + n) for a, n in zip(self._first, self.lengths)])
        self.clipped = normalise(self._standard_NA[used], statistics)[1]  # action values of usable frames outside the statistics

    def scale_state(self, statistics: Dict) -> None:
        """Normalise the state with these statistics, as those of the model that looks at it. ValueError when they are of no such state."""
        self._states_NQ = None if self._state_NQ is None else normalise_state(self._state_NQ, statistics)

    def take(self, spec: SampleSpec, views: Dict[str, "DemoDataset"]) -> None:
        """Give samples as a model takes them: pictures by name, the state, chunks of actions.

        views: for a model of several cameras, the same files read through each of them (this data set is one of these). ValueError when
        they do not hold the same frames, or when the state has another size.
        """
        if spec.state and (self._state_NQ is None or self._state_NQ.shape[1] != spec.state):
            size = "none" if self._state_NQ is None else f"one of {self._state_NQ.shape[1]} numbers"
            raise ValueError(f"{self.folder}: the model takes a state of {spec.state} numbers, and there is {size}: name its features with "
                             "--data.state")
        for name, view in views.items():
            if not (np.array_equal(view.index.start_E, self.index.start_E) and np.array_equal(view.actions_NA, self.actions_NA)):
                raise ValueError(f"{self.folder}: the camera {name!r} ({view.conventions.camera}) shows other episodes than the others do; "
                                 "download or make the data set again")
        self.spec, self._views = spec, views

    def seen(self, fraction: float) -> np.ndarray:
        """bool [E]: which of the usable episodes a training on this share of the split, opened whole here, has seen."""
        return self._numbers - self._before < int(round(round(fraction * 100, 9) * self.split_episodes / 100))

    def leave_out(self, fraction: float) -> None:
        """Keep only the episodes that a training on this share of the split, opened whole here, has not seen. ValueError without any."""
        kept_E = ~self.seen(fraction)
        if not kept_E.any():
            raise ValueError(f"{self.folder}: no episode of {self.split_episodes} is held out with --data.train_fraction {fraction}; train "
                             "and evaluate with a smaller one, such as 0.9")
        self._first, self._numbers, self.lengths = self._first[kept_E], self._numbers[kept_E], self.lengths[kept_E]
        for view in self._others():
            view.leave_out(fraction)

    def _others(self) -> List["DemoDataset"]:
        return [view for view in self._views.values() if view is not self]

    @classmethod
    def check_extra(cls, folder) -> None:
        """ModuleNotFoundError, with the pip command, when a package that the format needs cannot be imported."""
        for module in cls.needs:
            optional(module, cls.kind, f"reading the data set {folder}")

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_frames(self) -> int:
        return int(self.lengths.sum())

    @property
    def languages(self) -> List[str]:
        """Instruction of each usable episode (of its first frame; frames keep their own)."""
        return [self.index.texts[self.index.text_N[start]] for start in self._first]

    def origins(self) -> List[str]:
        """What the files say of where each usable episode comes from, as far as they do: a path, or SUITE/TASK/SEED of LIBERO. Some formats
        read them anew for it."""
        return [""] * len(self)

    def _row(self, episode: int, frame: int) -> int:
        if not 0 <= episode < len(self.lengths) or not 0 <= frame < self.lengths[episode]:
            raise IndexError(f"{self.name}: no frame {frame} of episode {episode} (it has {len(self.lengths)} episodes)")
        return int(self._first[episode] + frame)

    def actions(self, episode: int) -> np.ndarray:
        """float32 [T, A], normalised."""
        start = self._row(episode, 0)
        return self.actions_NA[start:start + self.lengths[episode]]

    def standard_actions(self, episode: int) -> np.ndarray:
        """float32 [T, A], standardised and neither normalised nor clipped: what a policy should have done, gripper 1 = open."""
        start = self._row(episode, 0)
        return self._standard_NA[start:start + self.lengths[episode]]

    def number(self, episode: int) -> int:
        """The episode's number in its files."""
        return int(self._numbers[episode])

    @property
    def standard_NA(self) -> np.ndarray:
        """float32 [N, A] of all frames of the files: as standard_actions."""
        return self._standard_NA

    @property
    def starts(self) -> np.ndarray:
        """int64: first row of each usable episode."""
        return self._first

    @property
    def of_validation(self) -> int:
        """How many of the usable episodes the files themselves call those of validation or test."""
        return int(self.index.places[VALID][self._numbers].sum()) if VALID in self.index.places else 0

    @property
    def own_statistics(self) -> bool:
        """Whether the labels are scaled by this set's statistics, not by those that `scale` was given."""
        return self.statistics is self._own

    def last_of_files(self) -> List[int]:
        """The usable episode that ends last in each file whose end is only found by reading, such as a video."""
        return []

    def instruction(self, episode: int, frame: int) -> str:
        return self.index.texts[self.index.text_N[self._row(episode, frame)]]

    def _picture(self, number: int, row: int, frame: int, where: str) -> np.ndarray:
        """uint8 [H, W, 3] as stored. number: episode of the index; row: frame of the index. Called from several threads."""
        raise NotImplementedError

    @property
    def turned(self) -> bool:
        """Whether pictures are turned by 180 degrees."""
        return self.rotated if self.conventions.rotate is None else self.conventions.rotate

    def _upright(self, image_HWC: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(image_HWC[::-1, ::-1] if self.turned else image_HWC)

    def image(self, episode: int, frame: int) -> np.ndarray:
        """uint8 [H, W, 3]: upright, not resized."""
        row = self._row(episode, frame)
        where = f"{self.name} episode {episode} frame {frame}"
        picture, card = self._picture(int(self._numbers[episode]), row, int(frame), where), self.conventions.card
        return self._upright(picture[..., ::-1] if card is not None and card.colours == "bgr" else picture)

    def frame(self, episode: int, frame: int) -> Sample:
        """The frame's pictures at stored size, its instruction, its state, and its normalised action, or the chunk that begins with it.

        After the last action of an episode a chunk repeats it, as openpi's and lerobot's data sets do.
        """
        row = self._row(episode, frame)
        text, chunk = self.index.texts[self.index.text_N[row]], self.spec.chunk
        last = self._first[episode] + self.lengths[episode] - 1
        action = self.actions_NA[row] if chunk == 1 else self.actions_NA[np.minimum(np.arange(row, row + chunk), last)]
        cameras = {name: view.image(episode, frame) for name, view in self._views.items()}
        return Sample(None if cameras else self.image(episode, frame), text, action, dataset=self.name, cameras=cameras,
                      state=self._states_NQ[row] if self.spec.state and self._states_NQ is not None else None)

    def episode(self, episode: int) -> Episode:
        """A whole episode with its actions as stored."""
        start, length = self._row(episode, 0), int(self.lengths[episode])
        return Episode(np.stack([self.image(episode, t) for t in range(length)]), self.index.actions_NA[start:start + length],
                       self.instruction(episode, 0))

    def fingerprint(self) -> str:
        """sha256 of what the order and content of the samples depend on, pictures excepted.

        RLDS with its usual conventions adds nothing of its own, so that runs saved before there were other formats resume.
        """
        own: List[Any] = [] if self.kind == "rlds" and not self.conventions else [[self.kind, self.conventions.told()]]
        own += [] if self.spec == ONE_PICTURE else [[vars(self.spec), [view.conventions.camera for view in self._views.values()]]]
        # Labels that were others before these dimensions were taught as demonstrated.
        one = self.statistics["action"]
        changed = [d for d, kind in self.degenerate.items() if kind != "constant" or not (one["mask"][d] or one["min"][d] == 0)]
        own += [["demonstrated", changed]] if changed and self.conventions.degenerate is None else []
        digest = hashlib.sha256(json.dumps([self.name, self.lengths.tolist(), self.languages, *own]).encode())
        digest.update(np.ascontiguousarray(self.index.actions_NA).tobytes())
        if self.statistics is not self._own:
            digest.update(json.dumps(self.statistics["action"], sort_keys=True).encode())
        if self._states_NQ is not None:
            digest.update(np.ascontiguousarray(self._states_NQ).tobytes())
        return digest.hexdigest()

    @property
    def content(self) -> str:
        """Hash of everything that the episodes hold, pictures too; empty where only reading all of it again would tell."""
        return str(self.index.places.get(CONTENT, ""))

    def close(self) -> None:
        """Close the files; a picture that is asked for later opens them again."""

    def close_all(self) -> None:
        """Also those of its other cameras."""
        for view in (self, *self._others()):
            view.close()

    def __enter__(self) -> "DemoDataset":
        return self

    def __exit__(self, *error) -> None:
        self.close_all()
