"""What a benchmark is: everything that `vlakeep evaluate`, preflight and the report ask one. A benchmark overrides what it needs.

    declared        names, actions, observations, abilities
    configuration   problems, check, lines (of preflight), settings
    records         identity, decides: what trials depend on; core/names.py says where they lie
    a model         pick_key, keys: which action statistics
    trials          play (episodes), questions, retention
    results         alarms, counted, additions, lines_of
    a plan          amount

An object is of one evaluation: of a configuration and a storage root. It touches no model but through the Target that it is given
(benchmarks/policy.py), and this file, as every one that ends in BENCHMARK, imports nothing heavy: configurations are checked with it.
"""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from vlakeep.benchmarks.amount import UNKNOWN, Amount, Play, share
from vlakeep.benchmarks.records import Records
from vlakeep.benchmarks.specs import ActionSpec, ObservationSpec, Questions, Retention, compare
from vlakeep.core.config import Config, EvaluateConfig
from vlakeep.core.findings import Line
from vlakeep.core.registry import benchmark_class, benchmark_names
from vlakeep.core.storage import Storage

if TYPE_CHECKING:
    from vlakeep.benchmarks.policy import Target
    from vlakeep.data.sample import SampleSpec

REPLAY = "replay"  # the target that is no model: demonstrations played back, for benchmarks that can
REQUIRED, OPTIONAL, NEVER = "required", "optional", "never"  # whether the drift over the probe is measured for a run
SKILL, QUESTION = "skill", "question"
OLD, NEW, CONTROL = "old", "new", "control"


class Ability(NamedTuple):
    """Something whose success is a row of the table: `kind` is that of its records; one is new, and a control is in no table."""

    name: str
    kind: str = SKILL
    role: str = OLD


class Benchmark:
    """`names`: the values of evaluate.benchmark that the class serves."""

    names: Tuple[str, ...] = ()
    actions = ActionSpec()
    seed = 0  # of the start states where evaluate.seed is null
    drift = REQUIRED
    # Whether several processes play what Records.share or Records.missing deals to each of them; else the first of them plays alone.
    divides = False
    acts = True  # whether the model's actions are used, which takes action statistics
    # Of what only some benchmarks know: settings of the evaluate section by name, and the target REPLAY.
    knows: Tuple[str, ...] = ()

    def __init__(self, config: Config, storage: Storage):
        self.config, self.storage = config, storage
        self.settings = self.resolve(config)

    @property
    def name(self) -> str:
        return self.settings.benchmark

    @property
    def observations(self) -> ObservationSpec:
        """What the policy sees, with these settings."""
        return ObservationSpec()

    def abilities(self) -> List[Ability]:
        """What this evaluation measures, questions included."""
        raise NotImplementedError

    # Before a model is loaded

    @classmethod
    def resolve(cls, config: Config) -> EvaluateConfig:
        """The evaluate section with the values that follow from others."""
        settings = config.evaluate
        return replace(settings, seed=cls.seed if settings.seed is None else settings.seed,
                       center_crop=config.data.image_aug if settings.center_crop is None else settings.center_crop)

    @classmethod
    def problems(cls, config: Config) -> List[str]:
        """What is wrong with the configuration for this benchmark, one line each."""
        settings = config.evaluate
        asked = [key for key in _known_to_some() if (settings.target == key if key == REPLAY else getattr(settings, key))]
        unknown = [key for key in asked if key not in cls.knows]
        return [f"--evaluate.benchmark {settings.benchmark!r}: must be {_which_know(key)} for evaluate."
                f"{'target replay' if key == REPLAY else key}" for key in unknown]

    def check(self) -> None:
        """Raise for whatever the evaluation lacks that is known before a model is loaded; ValueError, or OSError for a missing file."""
        for key, kind, names in (("skills", SKILL, self.settings.skills), ("questions", QUESTION, self.settings.questions)):
            known = [one.name for one in self.abilities() if one.kind == kind]
            wrong = [name for name in names if name not in known or names.count(name) > 1]
            if wrong:
                allowed = f"must be among {', '.join(known)}, each once" if known else f"{self.name} has none; leave it out"
                raise ValueError(f"--evaluate.{key} {wrong}: {allowed}")

    def lines(self) -> List[Line]:
        """What preflight shows about the benchmark itself: a simulator, a probe of its own."""
        return []

    @property
    def reads_data(self) -> bool:
        """Whether the evaluation reads data.datasets."""
        return False

    @contextmanager
    def opened(self) -> Iterator[None]:
        """What the evaluation holds open from before the model is loaded until the summary is written."""
        yield

    def stand_in(self) -> "Optional[Target]":
        """What is evaluated in place of a model, if the settings ask for that."""
        return None

    # For a plan

    @classmethod
    def amount(cls, config: Config, ranks: int = 1, gpu: bool = True) -> Amount:
        """What one of `ranks` processes plays, and what all of them ask together, of a run; gpu: whether one renders pictures. Nothing is
        opened, and what that would tell is assumed (benchmarks/amount.py)."""
        settings = config.evaluate
        own = share(settings.episodes * max(1, len(settings.skills)), ranks)
        calls = own * UNKNOWN / settings.batch
        return Amount([Play(settings.benchmark, own, own * UNKNOWN, f"{UNKNOWN} each; without its simulator, of which nothing is known",
                            calls, settings.batch, calls, settings.batch)])

    # With the model

    @classmethod
    def suffix_of(cls, settings: EvaluateConfig) -> str:
        """Of the target's name, for evaluations that are kept apart; of the settings alone, so that a study finds its cells."""
        return ""

    def pick_key(self, given: Optional[str], known: Dict[str, Any], own: Optional[str]) -> Optional[str]:
        """The key of the action statistics with which the new ability is played. given: backbone.unnorm_key of the configuration; known:
        the model's statistics by key; own: the key of the run's only data set, or the only one there is. None: the model has to choose.
        """
        return own if given is None else given

    def old_key(self, known: Dict[str, Any]) -> Optional[str]:
        """The key with which old abilities are played, where that is another one for all of them; None: the same."""
        return None

    def keys(self, key: str, known: Dict[str, Any]) -> List[str]:
        """Every key that is used when the picked one is `key`, to be compared with `actions`. ValueError for one that is missing."""
        old = self.old_key(known)
        return [key] if old is None else [key, old]

    def compare(self, key: str, known: Dict[str, Any], taken: "Optional[SampleSpec]" = None) -> None:
        """ValueError, naming both sides and the remedy, when what the benchmark takes and shows does not fit the model's statistics, or
        what it takes of an observation (None where that is not known before it is loaded)."""
        compare(self.name, self.actions, self.observations, known, self.keys(key, known), taken)

    # Records

    @property
    def decides(self) -> Tuple[str, ...]:
        """Fields of the evaluate section on which a trial depends: records with other values are not continued."""
        return "benchmark", "skills", "questions", "episodes", "questions_per_kind", "retention_frames", "seed"

    def identity(self) -> Dict[str, Any]:
        """What else of the benchmark decides about a trial, in JSON's terms: versions, rules, data."""
        return {}

    # Trials

    def play(self, target: "Target", records: Records, folder: Path) -> None:
        """Every episode that `records` lacks; with `divides`, those of them that records.share or records.missing deals to this process. A
        policy or simulator that raised is a trial with `crash` set. folder: for videos."""
        raise NotImplementedError

    def questions(self) -> Iterator[Questions]:
        """Kind by kind."""
        return iter(())

    def retention(self) -> Optional[Retention]:
        """None: the KL is not measured on frames of its own."""
        return None

    # Results

    def alarms(self, target: "Target") -> List[str]:
        """What of the run's training does not fit this evaluation; alarms of single trials go to Records.add_alarms."""
        return []

    def counted(self, rows: List[dict]) -> List[dict]:
        """The trials that the summary is of."""
        return rows

    def additions(self, rows: List[dict]) -> Dict[str, Any]:
        """Keys of summary.json beside, or in place of, those that every benchmark has (docs/formats.md)."""
        return {}

    def lines_of(self, summary: Dict[str, Any]) -> List[str]:
        """What of its additions is printed."""
        return []


def _known_to_some() -> List[str]:
    return sorted({key for name in benchmark_names() for key in benchmark_class(name).knows})


def _which_know(key: str) -> str:
    able = [name for name in benchmark_names() if key in benchmark_class(name).knows]
    return f"one of {', '.join(able)}"
