"""What a method is: everything that the stages ask an arm, with answers that add nothing. A method overrides what it needs.

    configuration   Options, problems        its own options, and what is wrong with them
    offline         needs_offline, offline   what it needs of the frozen teacher, made once by `vlakeep offline`
    preflight       check_model, check_artifact; costs for `vlakeep plan`
    training        prepare -> attach, before_training, then for every step before_step, penalty, after_step; detach
    checkpoints     state_dict, load_state_dict
    report          label, label_zh

"What does the method add?" is the difference between its class and `methods/baseline.py`.
"""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional, Tuple

from vlakeep.core.config import Config
from vlakeep.methods.costs import Costs
from vlakeep.models.workload import Adapters, Numbers, Workload

if TYPE_CHECKING:  # configurations are checked without it
    import torch

CALMER = "Lower --train.lr, and keep --train.clip 1.0"


class Problem(NamedTuple):
    """Something that preflight shows: of what, what is wrong, and what mends it."""

    what: str
    where: str
    remedy: str
    severe: bool = True  # else it is shown in yellow and stops nothing


@dataclass
class NoOptions:
    """A method without options of its own."""


class Method:
    """An arm. `attach` comes after LoRA and before DDP and the optimizer are built."""

    label: Optional[str] = None  # in reports; None gives the run's name
    label_zh: Optional[str] = None
    Options: Any = NoOptions  # a dataclass, filled from the section `options` of the configuration
    # Whether the processes of a job divide `offline` and leave writing to the first (core/parallel.py: Distributed.here); else that one
    # does it alone.
    divides_offline = False
    decoder_only = False  # whether it acts on linears of decoder layers alone
    artifact_name = "artefact"  # as preflight calls what the offline step leaves
    # Sections and keys of the configuration that are a method's business and that it reads in training: a run goes on when others change.
    reads: Tuple[str, ...] = ("probe", "icsm", "hsw", "gains", "thermostat", "options")

    # Before a model is loaded

    @classmethod
    def options(cls, config: Config):
        """The method's Options with the values of the configuration. ValueError for an unknown name or a wrong type."""
        known = {f.name: f for f in fields(cls.Options)}
        wrong = [name for name in config.options if name not in known]
        if wrong:
            raise ValueError(f"--options.{wrong[0]}: method {config.method} has {_listed(known)}")
        defaults = asdict(cls.Options())
        for name, value in config.options.items():
            kind = type(defaults[name])
            if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
                raise ValueError(f"--options.{name} {value!r}: must be of type {kind.__name__}, such as {defaults[name]!r}")
            if kind is float and not math.isfinite(value):
                raise ValueError(f"--options.{name} {value}: must be a finite number")
        return cls.Options(**{name: type(defaults[name])(value) for name, value in config.options.items()})

    @classmethod
    def problems(cls, config: Config) -> List[str]:
        """What is wrong with the configuration for this method, one line each."""
        try:
            cls.options(config)
        except ValueError as error:
            return [str(error)]
        return []

    @classmethod
    def needs_offline(cls, config: Config) -> bool:
        """Whether this configuration trains with what the offline step leaves."""
        return False

    @classmethod
    def data_sets(cls, config: Config) -> List[str]:
        """Names of the data sets that training reads."""
        return list(config.data.datasets)

    @classmethod
    def check_model(cls, config: Config, depth: int, width: int) -> List[Problem]:
        """What of the configuration does not fit a model of this many decoder layers and this hidden size."""
        return []

    @classmethod
    def artifact_folder(cls, config: Config, storage, backbone_name: str) -> Path:
        """Where the offline step leaves its results."""
        raise NotImplementedError

    @classmethod
    def artifact_problems(cls, config: Config, folder: Path, weights_sha256: Optional[str], probe_sha256: Optional[str],
                          depth: Optional[int]) -> List[str]:
        """Why the artefact does not fit this run; what is None is not compared. May raise ValueError, KeyError or OSError."""
        return []

    @classmethod
    def offline(cls, config: Config, storage, backbone) -> Path:
        """Make the artefact of the frozen teacher `backbone` and return its folder."""
        raise ValueError(f"method {config.method} needs no offline step: name another with --config or --method")

    @classmethod
    def calmer(cls, config: Config) -> str:
        """What to change when training blows up."""
        return CALMER

    @classmethod
    def costs(cls, config: Config, work: Workload, adapters: Adapters, numbers: Numbers) -> Costs:
        """What the method adds to memory and time, for `vlakeep plan`."""
        return Costs()

    # Training

    @classmethod
    def prepare(cls, config: Config, storage, backbone) -> Tuple["Method", Dict[str, Any]]:
        """(the method for this run, hashes of what it was made from). Raises for a missing or mismatched artefact."""
        return cls(), {}

    def attach(self, backbone) -> None:
        """Put in place what acts in training; every hook goes again in `detach`."""

    def before_training(self) -> List[Dict[str, float]]:
        """Rows to log as step 0 of a fresh run (not of a resumed one)."""
        return []

    def before_step(self, step: int, observe: bool) -> None:
        """`observe` says whether this step's metrics will be logged."""

    def penalty(self) -> "Optional[torch.Tensor]":
        """A differentiable addition to the loss of each micro-batch, or None."""

    def after_step(self, step: int, loss_scale: float) -> Dict[str, float]:
        """Metrics of the step; `loss_scale` is the factor that mixed precision put on the gradients."""
        return {}

    def logs(self, step: int) -> bool:
        """Whether this step must be logged even if it is not observed: a loop has to be replayable from the log."""
        return False

    def state_dict(self) -> dict:
        """Everything that changes while training and is no parameter of the model."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a state_dict."""

    def detach(self) -> None:
        """Leave the model as it was before `attach`, but for the adapter's weights."""


def never_measured(config: Config) -> List[Problem]:
    """For methods with a Thermostat: a schedule that never comes to act."""
    every, steps = config.thermostat.every, config.train.steps
    return [] if not config.thermostat.enabled or every <= steps else [Problem(
        "--thermostat.every", f"one measurement in {every} steps, but training takes {steps}: the gains never move",
        f"--thermostat.every {max(1, steps // 20)}", severe=False)]


def _listed(known: dict) -> str:
    return "the options " + ", ".join(known) if known else "no options"
