"""The LIBERO suites as `vlakeep evaluate` plays them: the official protocol, questions about a probe's pictures, and two controls.

`--evaluate.target replay` plays demonstrations back, and `--evaluate.blank true` shows grey pictures.
"""

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

import numpy as np

from vlakeep.benchmarks.amount import SAID, Amount, beside, share
from vlakeep.benchmarks.base import NEW, OPTIONAL, QUESTION, REPLAY, SKILL, Ability, Benchmark
from vlakeep.benchmarks.specs import ActionSpec, ObservationSpec, Questions, Retention
from vlakeep.core.config import Config, EvaluateConfig
from vlakeep.core.findings import GREEN, RED, Line
from vlakeep.core.log import log
from vlakeep.core.storage import Storage, find_checkpoint
from vlakeep.language.evaluation import Language
from vlakeep.libero import benchmark as libero
from vlakeep.libero import setup as libero_setup
from vlakeep.libero.env import CAMERA, MAX_STEPS, SETTLE, SUITES, TASKS, WRIST

GREY = 128
FIRST_PICTURES = 20  # of an evaluation, compared with the training data's
# For a plan: seconds of a step without a picture, and of rendering one: on a GPU what eight processes took, resets and their start counted
# in (127.5 episodes of 100 steps a minute; one alone took 26 ms a step, sixteen 53), in software two on two cores (docs/log.md,
# 2026-11-23).
PHYSICS, ON_GPU, SOFTWARE = 0.008, 0.03, 0.11
KINDS = 10  # of questions that `vlakeep libero-vqa` asks


class Libero(Benchmark):
    names = SUITES
    actions = ActionSpec(7, units="OSC_POSE deltas of LIBERO, gripper standardised", statistics="SUITE or SUITE_no_noops")
    seed = libero.SEED
    drift = OPTIONAL
    divides = True
    knows = ("other_suites", "language", "blank", REPLAY)

    def __init__(self, config: Config, storage: Storage):
        super().__init__(config, storage)
        self._probe: Any = None
        self._language = Language.beside(config, storage) if self.settings.language and self._sees else None

    @classmethod
    def suffix_of(cls, settings: EvaluateConfig) -> str:
        return "-blank" if settings.blank else ""

    @property
    def observations(self) -> ObservationSpec:
        return ObservationSpec((CAMERA, WRIST), (224, 224), cropped=bool(self.settings.center_crop), turned=True, state=True, by_order=True)

    def abilities(self) -> List[Ability]:
        suites = [Ability(self.name, SKILL, NEW), *(Ability(suite) for suite in self.settings.other_suites)]
        return suites + [Ability(kind, QUESTION) for kind in self._kinds_asked()] + (self._language.abilities() if self._language else [])

    @classmethod
    def problems(cls, config: Config) -> List[str]:
        others = config.evaluate.other_suites
        wrong = not set(others) <= set(SUITES) - {config.evaluate.benchmark}
        return super().problems(config) + wrong * [
            f"--evaluate.other_suites {others!r}: must be LIBERO suites other than evaluate.benchmark: {', '.join(SUITES)}"]

    def check(self) -> None:
        libero.check(self.settings)
        self._probe = self._open_probe() if self._asks else None
        known = sorted(set(self._probe_kinds()) - {"instruction"})
        wrong = [kind for kind in self.settings.questions if self._probe and kind not in known]
        if wrong:
            raise ValueError(f"--evaluate.questions {wrong}: the probe {self.settings.probe} asks {', '.join(known)}")
        if self._language:
            self._language.check()
            taken = set(self._kinds_asked()) & {one.name for one in self._language.abilities()}
            if taken:
                raise ValueError(f"--evaluate.texts has {', '.join(sorted(taken))}, as kinds of questions of the probe "
                                 f"{self.settings.probe} are called, and trials are told apart by these names: call the file otherwise")

    @property
    def _replays(self) -> bool:
        return self.settings.target == REPLAY

    @property
    def _sees(self) -> bool:
        """Whether a model is evaluated with its eyes open: no control."""
        return not self.settings.blank and not self._replays

    @property
    def _asks(self) -> bool:
        """Whether a probe is asked about."""
        return bool(self.settings.probe) and self._sees

    def _open_probe(self):
        """The probe of evaluate.probe, whose `answers` map item numbers to answers. ValueError when it is the protected one."""
        from vlakeep.probe.heldout import open_heldout

        return open_heldout(self.storage.probe_folder(self.settings.probe), self.storage.probe_folder(self.config.probe.name))

    @classmethod
    def amount(cls, config: Config, ranks: int = 1, gpu: bool = True) -> Amount:
        """Of a probe as many questions of each kind as may be asked, and all of its kinds."""
        settings = config.evaluate
        replays, sees = settings.target == REPLAY, settings.target != REPLAY and not settings.blank
        cameras = max(1, len(config.backbone.cameras or config.data.cameras))
        picture = ON_GPU if gpu else SOFTWARE
        step = PHYSICS + cameras * picture
        plays = []
        for suite in [settings.benchmark, *([] if replays else settings.other_suites)]:
            tasks = len(set(settings.skills)) if settings.skills and suite == settings.benchmark else TASKS[suite]
            own = share(tasks * settings.episodes, ranks)
            workers = min(settings.workers, own)
            rendering = f"{1000 * cameras * picture:g} rendering {'on a GPU' if gpu else 'in software'}"
            plays.append(beside(f"{suite}, {tasks} tasks", own, MAX_STEPS[suite], SAID, workers, settings.batch, step, SETTLE * PHYSICS,
                                f"{workers} simulator{'s' * (workers > 1)} with a core each, {1000 * step:.0f} ms a step, of which "
                                f"{1000 * PHYSICS:g} are physics and {rendering}"))
        probe = bool(settings.probe) and sees
        texts = Language.amount(config, ranks, gpu)._asdict() if settings.language and sees else {}
        return Amount(**{**texts, "plays": plays, "model": not replays,
                         "questions": [settings.questions_per_kind] * (len(settings.questions) or KINDS) if probe else [],
                         "retention": [settings.retention_frames] if probe else []})

    def lines(self) -> List[Line]:
        found = libero_setup.lines()
        if self._asks:
            try:
                probe = self._open_probe()
                found.append(Line(GREEN, "--evaluate.probe", f"{probe.folder}: {len(probe.answers)} questions with answers"))
            except (ValueError, OSError) as error:
                found.append(Line(RED, "--evaluate.probe", str(error), "vlakeep libero-vqa --split heldout --probe.name NAME, and "
                                  "--evaluate.probe NAME"))
        return found + (self._language.lines() if self._language else [])

    @property
    def reads_data(self) -> bool:
        return self._replays

    def stand_in(self):
        """The control without a model: demonstrations replayed open loop from the evaluation's initial states."""
        if not self._replays:
            return None
        from vlakeep.benchmarks.policy import Target
        from vlakeep.benchmarks.trained import open_as_configured
        from vlakeep.data.formats import closing_all

        tasks = libero.pick_tasks(self.name, self.settings.skills)
        with closing_all(open_as_configured(self.config, self.storage)) as datasets:
            self._replay = libero.Replay(demonstrations(datasets, self.name, tasks, self.settings.episodes))
            return Target(REPLAY, ",".join(dataset.fingerprint() for dataset in datasets))

    def pick_key(self, given: Optional[str], known: Dict[str, Any], own: Optional[str]) -> Optional[str]:
        return libero.pick_key(self.name, given, known, own)

    def keys(self, key: str, known: Dict[str, Any]) -> List[str]:
        return [key, *(self._key_of(suite, key, known) for suite in self.settings.other_suites)]

    def _key_of(self, suite: str, key: str, known: Dict[str, Any]) -> str:
        """An old suite keeps the statistics that it was learnt with; `key` is the benchmark's."""
        return key if suite == self.name else libero.pick_key(suite, None, known, key)

    @property
    def decides(self):
        """An episode does not depend on their number, so more of them can be added."""
        asked = ("questions", "questions_per_kind", "retention_frames") if self._probe else ("questions_per_kind",) * bool(self._language)
        return "benchmark", "skills", "seed", "batch", "center_crop", *asked

    def identity(self) -> Dict[str, Any]:
        found = libero_setup.versions()
        made = {"simulated_as": found[libero_setup.AS]} if libero_setup.AS in found else {}
        texts = self._language.identity() if self._language else {}
        # Said where it is so: headers without it are of evaluations that saw, and of any before it was in them.
        blank = {"blank": True} if self.settings.blank else {}
        # Of a suite whose tasks share instructions; before, any task's demonstrations of an instruction were played.
        shared = self._replays and len(libero.tasks_by_instruction(self.name)) < len(libero.pick_tasks(self.name, []))
        return {**({"probe": self._probe.sha256} if self._probe else {}), "mujoco": found.get("mujoco"), **made, **texts, **blank,
                **({"demonstrations": "by task"} if shared else {})}

    def play(self, target, records, folder) -> None:
        if target.backbone is None:
            libero.run_suite(self._replay, self.settings, self.settings.center_crop, records, folder / "videos", desc=target.name)
            return
        libero.say_idle_rows(self.settings)
        only = next(iter(target.known)) if len(target.known) == 1 else self.name
        if not only.startswith(self.name):
            log.warning(f"the model knows no action statistics but those of {only}: they are used for {self.name}")
        for suite in [self.name, *self.settings.other_suites]:
            self._play_suite(of_suite(self.settings, suite), target, records, folder)
        if self._language:
            self._language.play(target, records, folder)

    def _play_suite(self, settings: EvaluateConfig, target, records, folder: Path) -> None:
        from vlakeep.benchmarks.policy import ChunkQueue, FixedBatch
        from vlakeep.benchmarks.trained import training_picture
        from vlakeep.models.alarms import orientation_alarm
        from vlakeep.models.graphs import recorded

        suite, first = settings.benchmark, []
        spoken = libero.instructions(suite, libero.pick_tasks(suite, settings.skills))
        policy = target.policy(self._key_of(suite, target.key, target.known), spoken, settings.chunk)
        processor = target.backbone.processor
        named = processor.spec.cameras

        def chunks(images, texts, count, states=None):
            return policy.chunks(greyed(images) if settings.blank else images, texts, count, states)

        ask = FixedBatch(chunks, settings.batch, named)
        queue = ChunkQueue()

        def act(jobs, seen):
            for job, one in zip(jobs, seen):
                if one.step == 0:  # also of an episode that took its simulator down and is played once more
                    queue.forget(job)
            answers = queue(jobs, lambda rows: ask([jobs[row] for row in rows], [seen[row] for row in rows]))
            if len(first) < FIRST_PICTURES:
                first.extend(np.asarray(one.image, dtype=float) for one in seen)
            return answers

        videos = folder / "videos" if suite == self.name else folder / "videos" / suite
        with recorded(target.backbone) if settings.cuda_graph else nullcontext():
            restarts = libero.run_suite(act, settings, settings.center_crop, records, videos, target.name,
                                        self.observations.cameras[:max(1, len(named))], bool(processor.spec.state), processor.own_resize)
        if restarts:
            log.warning(f"{target.name}: {restarts} simulator processes died and were replaced")
        comparable = records.is_main and first and settings.target != "base" and suite == self.name
        trained = training_picture(self.config, self.storage) if comparable else None
        turned = [] if trained is None else orientation_alarm(trained, np.mean(first, axis=0))
        records.add_alarms(policy.watch.with_others(records.gather).alarms() + turned)

    # On the pictures of a probe, cut as those of the episodes are; a trial's `seed` is its item number

    def _items(self, kind: str, most: int) -> List[int]:
        return [item for item, own in enumerate(self._probe_kinds()) if own == kind][:most]

    def _kinds_asked(self) -> List[str]:
        return (self.settings.questions or sorted(set(self._probe_kinds()) - {"instruction"})) if self._probe else []

    def _probe_kinds(self) -> List[str]:
        """Of every item; [] without a probe."""
        return self._probe.kinds(range(len(self._probe))) if self._probe else []

    def _samples_of(self, items: Sequence[int]):
        from vlakeep.data.images import center_crop

        def samples(trials):
            found = self._probe.samples([items[trial] for trial in trials])
            return [sample.with_pictures(center_crop) for sample in found] if self.settings.center_crop else found
        return samples

    def questions(self) -> Iterator[Questions]:
        for kind in self._kinds_asked():
            items = self._items(kind, self.settings.questions_per_kind)
            yield Questions(kind, self._samples_of(items), items, [self._probe.answers[item] for item in items])

    def retention(self) -> Optional[Retention]:
        if not self._probe:
            return None
        items = self._items("instruction", self.settings.retention_frames)
        return Retention(self._samples_of(items), items)

    def alarms(self, target) -> List[str]:
        from vlakeep.benchmarks.trained import crop_alarm

        if target.backbone is None:
            return []
        return crop_alarm(self.config, self.storage, self.settings) + renderer_alarm(self.config, self.storage, target.key)

    def counted(self, rows: List[dict]) -> List[dict]:
        """Without episodes of an earlier evaluation that this one does not ask for."""
        asked = (self.name, *self.settings.other_suites)
        return [row for row in rows if row["kind"] != SKILL or (row["ability"] in asked and row.get("init", 0) < self.settings.episodes)]

    def additions(self, rows: List[dict]) -> Dict[str, Any]:
        """A suite is one skill, with its tasks listed below it."""
        return {"tasks": libero.by_task(rows), **(self._language.additions(rows) if self._language else {})}

    def lines_of(self, summary):
        return self._language.lines_of(summary) if self._language else []


def greyed(images):
    """Nothing to be seen: of one camera, or of each."""
    return {name: greyed(own) for name, own in images.items()} if isinstance(images, dict) else np.full_like(images, GREY)


def of_suite(settings: EvaluateConfig, suite: str) -> EvaluateConfig:
    """The settings for one of the suites: the chosen tasks are those of the benchmark."""
    return settings if suite == settings.benchmark else replace(settings, benchmark=suite, skills=[])


def demonstrations(datasets, suite: str, tasks: List[int], count: int) -> Dict[int, List[np.ndarray]]:
    """Task -> actions [T, 7] of up to `count` demonstrations. FileNotFoundError names the instructions without one, ValueError one that
    several tasks share where the data do not say of which a demonstration is."""
    from vlakeep.data.statistics import unnormalise

    called, names = libero.tasks_by_instruction(suite), libero.load_suite(suite).get_task_names()
    found: Dict[int, List[np.ndarray]] = {task: [] for task in tasks}
    for dataset in datasets:
        origins: List[str] = []
        for episode, language in enumerate(dataset.languages):
            own = called.get(language, [])
            if all(len(found.get(task, range(count))) >= count for task in own):
                continue
            task: Optional[int] = own[0]
            if len(own) > 1:
                origins = origins or dataset.origins()
                task = task_of(origins[episode], suite, names)
                if task is None:
                    raise ValueError(f"{dataset.name}: {suite} has the tasks {', '.join(map(str, own))} of the instruction {language!r}, "
                                     f"and episode {episode} does not say of which it is (origin {origins[episode]!r}): choose other "
                                     "tasks with --evaluate.skills, or take a set of `vlakeep libero-demos` or LIBERO's HDF5 files")
            if len(found.get(task, range(count))) < count:
                found[task].append(unnormalise(dataset.actions(episode), dataset.statistics))
    missing = [language for task, language in zip(tasks, libero.instructions(suite, tasks)) if not found[task]]
    if missing:
        raise FileNotFoundError(f"--data.datasets [{', '.join(d.name for d in datasets)}] has no demonstration of {missing}: make "
                                f"them with `vlakeep libero-demos --suite {suite} --demos 1`")
    return found


def task_of(origin: str, suite: str, names: Sequence[str]) -> Optional[int]:
    """The task of an episode by where it comes from: SUITE/TASK/SEED, as libero-demos says, or LIBERO's file TASK'S_NAME_demo.hdf5. -1 for
    another suite's, None where that cannot be told."""
    said = re.fullmatch(r"(\w+)/(\d+)/\d+", origin)
    if said and said[1] in SUITES:
        return int(said[2]) if said[1] == suite else -1
    name = Path(origin).stem.removesuffix("_demo")
    return list(names).index(name) if name in names else None


def renderer_alarm(config: Config, storage: Storage, key: str) -> List[str]:
    """One line per LIBERO data set that the target has learned from and that another version of mujoco has rendered.

    Of a base model pretrain-libero has noted it; one whose action statistics (`key`) are named as the official data was made from them.
    """
    from vlakeep.benchmarks.trained import trained_data
    from vlakeep.core.target import run_config

    if run_config(config.evaluate.target, storage) is not None:
        names = trained_data(config, storage).get("datasets") or []
        made = {name: libero_setup.rendered_with(storage.data / name) for name in names if name.startswith("libero")}
    else:
        notes = find_checkpoint(config.backbone.checkpoint, storage.cache) / "PROVENANCE.json"
        noted = json.loads(notes.read_text()).get("renderers") if notes.is_file() else None
        made = noted or ({key: None} if key.startswith("libero") and key.endswith("_no_noops") else {})
    return libero_setup.mixed_renderers(made, libero_setup.versions())


BENCHMARK = Libero
