"""Benchmark `dataset`: what a model would do on held-out frames of demonstrations, without a simulator or a robot.

Every frame of an episode that training has not seen is shown to the model, which says one action; it is compared with the demonstrated one.
Of a model that answers with chunks, every action of an answer is compared with that of its own step, up to the end of the episode.

    error           |said - demonstrated| per dimension, in the data's units; over all dimensions, each divided by its q99 - q01
    token accuracy  share of action tokens that are those of the demonstrated action
    KL              from the base's answer, on a few frames of each episode

Frames of an episode are alike, so that an episode is one trial: intervals are over episodes. The error is no success rate: a policy that
is nearly right on every frame can fail, and one that takes another way succeed.
Axes: T frames, C actions of an answer, A action dimensions.
"""

from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Callable, Dict, Iterator, List

import numpy as np
from tqdm import tqdm

from vlakeep.benchmarks.amount import Amount, frames, share
from vlakeep.benchmarks.base import NEVER, Ability, Benchmark
from vlakeep.benchmarks.records import Records, mean_interval
from vlakeep.benchmarks.specs import ActionSpec, ObservationSpec
from vlakeep.core.hardware import PICTURE
from vlakeep.core.log import log

NAME = "dataset"
KIND = "open_loop"
LEAST_SPAN = 1e-6  # of an action dimension: below, the data never move it, and it has no error that could be compared


def spans(statistics: Dict) -> np.ndarray:
    """q99 - q01 of every dimension [A]; 1 where the values are not scaled (the gripper, from 0 to 1), 0 where the data do not move."""
    one = statistics["action"]
    span_A = np.array(one["q99"], dtype=float) - np.array(one["q01"], dtype=float)
    mask_A = np.array(one.get("mask", np.ones(len(span_A))), dtype=bool)
    moving_A = np.array(one["max"], dtype=float) > np.array(one["min"], dtype=float)
    return np.where(moving_A, np.where(mask_A, np.where(span_A > LEAST_SPAN, span_A, 0.0), 1.0), 0.0)


def chosen_episodes(count: int, most: int) -> List[int]:
    """Up to `most` of `count` episodes, evenly spaced."""
    most = min(most, count)
    return [(2 * i + 1) * count // (2 * most) for i in range(most)]


def looked_at(settings) -> int:
    """Frames of an episode on which the model is compared with its base."""
    return max(1, settings.retention_frames // max(1, settings.episodes))


def chunk_errors(said_TCA: np.ndarray, wanted_TA: np.ndarray) -> np.ndarray:
    """Mean |said - demonstrated| per dimension [A], over every action of every answer whose step is still of the episode."""
    steps, chunk = said_TCA.shape[:2]
    at_TC = np.arange(steps)[:, None] + np.arange(chunk)
    return np.abs(said_TCA - wanted_TA[np.minimum(at_TC, steps - 1)])[at_TC < steps].mean(0)


def token_accuracy(tokens: Callable, said_TCA: np.ndarray, wanted_TA: np.ndarray) -> float:
    """Share of tokens that are those of the demonstrated actions, which the last action continues behind the end as in the training. Of
    answers whose lengths differ, the longer one counts."""
    steps, chunk = said_TCA.shape[:2]
    wanted_TCA = wanted_TA[np.minimum(np.arange(steps)[:, None] + np.arange(chunk), steps - 1)]
    if chunk == 1:
        return float((tokens(said_TCA[:, 0]) == tokens(wanted_TCA[:, 0])).mean())
    pairs = [tuple(np.ravel(tokens(one[None])) for one in pair) for pair in zip(said_TCA, wanted_TCA)]
    shared = [(a[:len(b)] == b[:len(a)]).sum() / max(len(a), len(b)) for a, b in pairs]
    return float(np.mean(shared))


def run_episodes(datasets, act: Callable, tokens: Callable, distance: Callable, picture: Callable, settings, records: Records,
                 desc: str) -> None:
    """One record per held-out episode that `records` lacks.

    datasets: opened whole, without the episodes of training. act(samples) -> (actions [N, C, A] in the data's units, bool [N]: whether the
    answer ended early). tokens(actions [N, A] or [N, C, A]) -> ids. distance(samples) -> KL from the base [N], or None for the base itself.
    picture(image) as the model sees it.
    """
    todo = [(dataset, episode) for dataset in datasets for episode in chosen_episodes(len(dataset), settings.episodes)
            if not records.has(KIND, dataset.name, dataset.number(episode))]
    todo = records.share(todo)
    few = looked_at(settings)
    for dataset, episode in tqdm(todo, desc=f"{desc}: held-out episodes", leave=False):
        wanted_TA = dataset.standard_actions(episode).astype(float)
        samples = [dataset.frame(episode, t).with_pictures(picture) for t in range(len(wanted_TA))]
        said, early = [], 0
        for start in range(0, len(samples), settings.parallel):
            actions_NCA, early_N = act(samples[start:start + settings.parallel])
            said.append(actions_NCA)
            early += int(np.sum(early_N))
        said_TCA = np.concatenate(said)
        error_A, span_A = chunk_errors(said_TCA, wanted_TA), spans(dataset.statistics)
        looked = [i * len(samples) // few for i in range(min(few, len(samples)))]
        far = distance([samples[i] for i in looked]) if distance else []
        records.add(kind=KIND, ability=dataset.name, trial=dataset.number(episode), seed=None, success=None,
                    value=float((error_A[span_A > 0] / span_A[span_A > 0]).mean()), crash=None, steps=len(wanted_TA),
                    errors=error_A.tolist(), accuracy=token_accuracy(tokens, said_TCA, wanted_TA),
                    kl=float(np.mean(far)) if len(far) else None, early=early)


def summary(rows: List[dict]) -> Dict[str, Any]:
    """What summary.json has of its own, from the records: means with 95 % intervals over episodes."""
    found: Dict[str, Dict] = {}
    for ability in dict.fromkeys(row["ability"] for row in rows if row["kind"] == KIND):
        own = [row for row in rows if row["kind"] == KIND and row["ability"] == ability]
        found[ability] = {
            "error": mean_interval([row["value"] for row in own]),
            "per_dimension": [mean_interval(list(values)) for values in zip(*(row["errors"] for row in own))],
            "token_accuracy": mean_interval([row["accuracy"] for row in own]),
            "frames": sum(row["steps"] for row in own), "early": sum(row["early"] for row in own)}
    far = [row["kl"] for row in rows if row["kind"] == KIND and row["kl"] is not None]
    return {"retention_kl": mean_interval(far), "open_loop": found}


def lines(found: Dict[str, Dict]) -> List[str]:
    """For the eye."""
    said = []
    for name, one in found.items():
        error, tokens = one["error"], one["token_accuracy"]
        said += [f"  {name}: {error['n']} held-out episodes, {one['frames']} frames",
                 f"    error, share of the range {error['mean']:.4f} [{error['low']:.4f}, {error['high']:.4f}]   "
                 f"tokens {tokens['mean']:.3f} [{tokens['low']:.3f}, {tokens['high']:.3f}]",
                 "    error per dimension      " + " ".join(f"{dimension['mean']:.4f}" for dimension in one["per_dimension"])]
        said += [f"    {one['early']} answers ended before all action tokens were out"] if one["early"] else []
    return said


class OpenLoop(Benchmark):
    names = (NAME,)
    actions = ActionSpec(None, gripper=None, units="those of the data set, standardised")  # the width is known when the data are open
    seed = 1000
    drift = NEVER
    divides = True
    datasets: List[Any] = []

    @property
    def observations(self) -> ObservationSpec:
        return ObservationSpec(("data.camera",), cropped=bool(self.settings.center_crop))

    def abilities(self) -> List[Ability]:
        return [Ability(name, KIND) for name in self.config.data.datasets]

    @property
    def reads_data(self) -> bool:
        return True

    @classmethod
    def amount(cls, config, ranks: int = 1, gpu: bool = True) -> Amount:
        """Data sets are taken to hold out as many episodes as are asked for."""
        settings, names = config.evaluate, config.data.datasets
        episodes = settings.episodes * len(names)
        play = frames(f"held-out episodes of {', '.join(names)}", share(episodes, ranks), settings.parallel, PICTURE)
        return Amount([play] if episodes else [], retention=[looked_at(settings)] * episodes)

    def check(self) -> None:
        from vlakeep.benchmarks.trained import check_conventions

        super().check()
        check_conventions(self.config, self.storage)

    @contextmanager
    def opened(self) -> Iterator[None]:
        from vlakeep.benchmarks.trained import open_as_configured
        from vlakeep.data.card import refuse
        from vlakeep.data.formats import closing_all
        from vlakeep.models.look import look

        reports = look(self.config, self.storage)  # as before training: what is wrong with labels is wrong with what they are compared with
        for report in reports:
            for note in report["notes"]:
                log.info(f"data {report['name']}: note: {note}")
        refuse(reports)
        with closing_all(open_as_configured(self.config, self.storage)) as self.datasets:
            self._hold_out(self.datasets)
            widths = {dataset.name: dataset.standard_actions(0).shape[1] for dataset in self.datasets}
            if len(set(widths.values())) > 1:
                raise ValueError(f"--data.datasets have actions of {widths} values, a model speaks one width: evaluate them one by one")
            self.actions = replace(self.actions, dimensions=next(iter(widths.values())))
            yield

    def alarms(self, target) -> List[str]:
        from vlakeep.benchmarks.trained import crop_alarm, seen_alarm

        return crop_alarm(self.config, self.storage, self.settings) + seen_alarm(self.config, self.storage, self.datasets)

    def _hold_out(self, datasets) -> None:
        for dataset in datasets:
            dataset.leave_out(self.config.data.train_fraction)

    def compare(self, key, known, taken=None) -> None:
        """Whatever cameras and state the model takes are read from the data, which say what they lack."""
        super().compare(key, known)

    def identity(self) -> Dict[str, Any]:
        share, data = self.config.data.train_fraction, self.config.data
        named = {key: value for key, value in (("cameras", data.cameras), ("state", data.state)) if value}
        return {"data": ",".join(f"{dataset.fingerprint()}-{share}" for dataset in self.datasets), "center_crop": self.settings.center_crop,
                **named}

    def play(self, target, records, folder) -> None:
        from vlakeep.benchmarks.trained import open_as_configured
        from vlakeep.data.formats import closing_all
        from vlakeep.data.images import center_crop, resize_uint8

        def picture(image):
            return resize_uint8(center_crop(image) if self.settings.center_crop else image, target.picture_size)

        with closing_all(open_as_configured(self.config, self.storage, spec=target.spec)) as datasets:
            self._hold_out(datasets)
            for dataset in datasets:
                dataset.scale_state(target.known[target.key])
            run_episodes(datasets, target.attempt, target.tokens, None if target.is_base else target.distance, picture, self.settings,
                         records, target.name)

    def additions(self, rows: List[dict]) -> Dict[str, Any]:
        return summary(rows)

    def lines_of(self, summary: Dict[str, Any]) -> List[str]:
        return lines(summary["open_loop"])


BENCHMARK = OpenLoop
