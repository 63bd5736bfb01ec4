"""The tabletop as `vlakeep evaluate` plays it: skills in many tables at once, visual questions, the KL on frames of known skills."""

from dataclasses import replace
from typing import Any, Dict, Iterator, List, Optional

from tqdm import tqdm

from vlakeep.benchmarks.amount import Amount, lockstep
from vlakeep.benchmarks.base import CONTROL, NEW, OLD, QUESTION, SKILL, Ability, Benchmark
from vlakeep.benchmarks.specs import ActionSpec, ObservationSpec, Questions, Retention, from_list
from vlakeep.core.config import Config
from vlakeep.core.storage import Storage
from vlakeep.tabletop.questions import QUESTION_KINDS
from vlakeep.tabletop.skills import ALL_SKILLS, CONTROLS, NEW_SKILLS
from vlakeep.tabletop.world import MAX_STEPS

STEP = 2.5e-4  # for a plan: seconds of a core for one table's picture and step


class Tabletop(Benchmark):
    names = ("tabletop",)
    actions = ActionSpec(7, units="motion of the hand per step, in hundredths of the table's side",
                         statistics="tabletop_SKILL for a new skill, tabletop for the known ones")
    seed = 1000
    divides = True

    def __init__(self, config: Config, storage: Storage):
        from vlakeep.tabletop import benchmark

        super().__init__(config, storage)
        self._table, self._old_key = benchmark, ""

    @property
    def observations(self) -> ObservationSpec:
        from vlakeep.tabletop.render import SIZE

        return ObservationSpec(("top",), (SIZE, SIZE))

    def abilities(self) -> List[Ability]:
        new = self.settings.new_skill
        roles = {new: NEW, CONTROLS.get(new): CONTROL}
        skills = [Ability(name, SKILL, roles.get(name, OLD)) for name in self._asked()]
        return skills + [Ability(kind, QUESTION) for kind in self.settings.questions or QUESTION_KINDS]

    def _asked(self) -> List[str]:
        return self._table.asked_skills(self.settings.skills, self.settings.new_skill)

    @classmethod
    def amount(cls, config: Config, ranks: int = 1, gpu: bool = True) -> Amount:
        """Known and new skills are played one after the other, with statistics of their own."""
        from vlakeep.tabletop.benchmark import asked_skills

        settings = config.evaluate
        asked = asked_skills(settings.skills, settings.new_skill)
        parts = [[skill for skill in asked if (skill in NEW_SKILLS) == new and skill in MAX_STEPS] for new in (False, True)]
        plays = [lockstep(", ".join(part), {skill: MAX_STEPS[skill] for skill in part}, settings.episodes, ranks, settings.parallel, STEP,
                          f"tables one after the other, {1000 * STEP:g} ms a step") for part in parts if part]
        return Amount(plays, [settings.questions_per_kind] * len(settings.questions or QUESTION_KINDS), [settings.retention_frames])

    def check(self) -> None:
        settings = self.settings
        asked = (("skills", settings.skills, ALL_SKILLS), ("questions", settings.questions, QUESTION_KINDS),
                 ("new_skill", [settings.new_skill], NEW_SKILLS))
        for key, names, known in asked:
            wrong = [name for name in names if name not in known or names.count(name) > 1]
            if wrong:
                raise ValueError(f"--evaluate.{key} {wrong}: must be among {', '.join(known)}, each once")

    def pick_key(self, given: Optional[str], known: Dict[str, Any], own: Optional[str]) -> Optional[str]:
        return self._table.pick_key(self.settings.new_skill, own if given is None else given, known)

    def old_key(self, known: Dict[str, Any]) -> Optional[str]:
        """An old skill keeps the statistics that it was learnt with: those of new data may not even hold its motions."""
        return self._table.old_key(known)

    def identity(self) -> Dict[str, Any]:
        """How long an episode of each skill may take."""
        return {"tabletop": {"max_steps": {skill: MAX_STEPS[skill] for skill in self.settings.skills or ALL_SKILLS}}}

    def play(self, target, records, folder) -> None:
        old_key = self.old_key(target.known) or target.key
        for own in dict.fromkeys((old_key, target.key)):
            skills = [skill for skill in self._asked() if own == (target.key if skill in NEW_SKILLS else old_key)]
            policy = target.policy(own, most=self.settings.chunk)
            self._table.run_skill_episodes(policy, skills, self.settings.episodes, self._table.EVALUATION + self.settings.seed,
                                           self.settings.parallel, records, target.name)
            records.add_alarms(policy.watch.with_others(records.gather).alarms())

    def questions(self) -> Iterator[Questions]:
        for kind in tqdm(self.settings.questions or QUESTION_KINDS, desc="questions", leave=False):
            trials = self._table.question_trials(kind, self.settings.questions_per_kind, self.settings.seed)
            samples = [trial.sample for trial in trials]
            yield Questions(kind, from_list(samples), [trial.seed for trial in trials], [sample.answer or "" for sample in samples])

    def retention(self) -> Retention:
        frames = self._table.retention_frames(self.settings.retention_frames, self.settings.seed)
        # Without the action, of which a model of chunks takes several, and which nothing reads.
        return Retention(from_list([replace(frame, action=None) for frame in frames]), [self.settings.seed] * len(frames))

    def alarms(self, target) -> List[str]:
        from vlakeep.benchmarks.trained import trained_data

        return self._table.skill_alarm(trained_data(self.config, self.storage).get("datasets") or [], self.settings.new_skill)

    def counted(self, rows: List[dict]) -> List[dict]:
        return self._table.asked_rows(rows, self.settings)

    def additions(self, rows: List[dict]) -> Dict[str, Any]:
        return self._table.followed(rows)

    def lines_of(self, summary: Dict[str, Any]) -> List[str]:
        return [f"  {'prompt of ' + skill:24s} ends at " + ", ".join(f"{end} {ends[end]:.3f}" for end in self._table.ENDS)
                for skill, ends in summary.get("followed", {}).items()]


BENCHMARK = Tabletop
