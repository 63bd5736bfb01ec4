"""What methods at the input of LoRA share: gains per direction, the start of A, and whether A is frozen (hsw/placed.py).

A method says what its gains are (`gains`), where LoRA starts (`start`), whether A is frozen and whether what it starts with is taken out
of W (`takes_out`). Everything is fixed before the first step: no loop.

reads: artifact_dir/graded_<backbone>/ where the method is about old inputs; the run's data where it is about new ones. What it makes of
them it makes at the start of training; what is not trained of it lies in the checkpoints, so that a resumed run has the same
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch
from tqdm import tqdm

from vlakeep.core.config import Config
from vlakeep.core.storage import Storage
from vlakeep.hsw import rules
from vlakeep.hsw.placed import FixedGains, PlacedSite, trained_rank
from vlakeep.hsw.rules import Start
from vlakeep.methods.base import Problem
from vlakeep.methods.graded_offline import training_batches
from vlakeep.methods.measured import Measured, weights
from vlakeep.teacher.collect import passes, token_moments
from vlakeep.teacher.coverage import InputWatch
from vlakeep.teacher.fisher import weight_gradients
from vlakeep.teacher.folder import ArtifactError
from vlakeep.teacher.spectrum import Spectrum


@dataclass
class Options:
    enabled: bool = True  # false trains plain LoRA


@dataclass
class NewOptions(Options):
    frames: int = 256  # of the run's data that are looked at before training


class Seen(NamedTuple):
    """What `start` may use for one linear; None where the method does not ask for it."""

    name: str
    W: torch.Tensor  # [O, D]
    spectrum: Optional[Spectrum]  # of its inputs on the probe, on the CPU
    C_new: Optional[torch.Tensor]  # [D, D], second moment of its inputs on the run's data
    G: Optional[torch.Tensor]  # [O, D], gradient of the run's loss
    rank: int  # of what is trained
    scale: float  # of the update: alpha / rank of the file


class Subspace(Measured):
    """See the module's first line."""

    Options = Options
    asks: Tuple[str, ...] = ("old",)  # what it looks at: old (the probe's spectra), inputs, gradient (of the new task), stream
    peft_since = ""  # the version of PEFT that has what it calls
    peft_imports = ("", "")  # (module, package) that PEFT imports there and does not ask for

    @classmethod
    def uses_probe(cls, config: Config) -> bool:
        return cls.options(config).enabled and "old" in cls.asks

    @classmethod
    def limits(cls, options) -> List[Tuple[str, object, bool, str]]:
        return [("frames", options.frames, options.frames > 0, "above 0")] if hasattr(options, "frames") else []

    @classmethod
    def freezes(cls, options) -> bool:
        """Whether A keeps its start."""
        return False

    @classmethod
    def takes_out(cls, options) -> bool:
        """Whether training begins at W - scale B0 A0: half of lora.rank is trained then."""
        return False

    @classmethod
    def problems(cls, config: Config) -> List[str]:
        found = super().problems(config)
        if not found and cls.takes_out(cls.options(config)) and config.lora.rank % 2:
            found.append(f"--lora.rank {config.lora.rank}: must be even with --method {config.method}, which trains half of it and keeps "
                         "what it takes out of the base weights in the other half")
        if not found and cls.options(config).enabled and config.lora.dropout and cls.takes_out(cls.options(config)):
            found.append(f"--lora.dropout {config.lora.dropout}: must be 0 with --method {config.method}, whose halves must see the same")
        return found

    @classmethod
    def check_model(cls, config: Config, depth: int, width: int) -> List[Problem]:
        missing, command = cls.lacking(config.method) if cls.options(config).enabled else ("", "")
        return [Problem("package peft", missing, f"{command}, or another --method")] if missing else []

    @classmethod
    def lacking(cls, name: str) -> Tuple[str, str]:
        """(what the method needs of PEFT and does not find, the command that mends it), or two empty texts."""
        if missing := too_old(cls.peft_since):
            return f"{missing}: method {name} calls what is in peft since {cls.peft_since}", f"pip install 'peft>={cls.peft_since}'"
        module, package = cls.peft_imports
        if module and find_spec(module) is None:
            return f"peft imports {package} for method {name}, which is not installed", f"pip install {package}"
        return "", ""

    def __init__(self, config: Config, artifact, make_sensors):
        super().__init__(config, artifact, make_sensors)
        self._gains: Dict[str, FixedGains] = {}
        self._starts: Dict[str, Start] = {}
        self._placed: Optional[PlacedSite] = None

    def gains(self, name: str, spectrum: Spectrum) -> Optional[Tuple[torch.Tensor, float]]:
        """(g [K] of the spectrum's directions, g of all others); None for none. `name` of the input, for messages."""
        return None

    def start(self, seen: Seen) -> Optional[Start]:
        """Where LoRA of a linear begins; None where it begins as ever."""
        return None

    @classmethod
    def prepare(cls, config: Config, storage: Storage, backbone):
        method, hashes = super().prepare(config, storage, backbone)
        if not method._options.enabled:
            return method, hashes
        missing, command = cls.lacking(config.method)
        if missing:
            raise ValueError(f"{missing}: {command}")
        training = backbone.training
        backbone.eval()
        method._look(storage, backbone)
        backbone.train(training)
        return method, hashes

    def _look(self, storage: Storage, backbone) -> None:
        """Gains and starts of all adapted linears."""
        config, options, linears = self._config, self._options, backbone.adapted_linears()
        spectra = self._artifact.spectra() if "old" in self.asks else {}
        missing = [name for name in linears if "old" in self.asks and backbone.input_key(name) not in spectra]
        if missing:
            raise ArtifactError(f"{self._artifact.folder} has no spectrum for {len(missing)} of {len(linears)} adapted linears, such as "
                                f"{missing[0]}: run `vlakeep offline` with the --lora.layers and --lora.modules of this run")
        made: Dict[str, Optional[FixedGains]] = {}
        for name in linears:
            key = backbone.input_key(name)
            if key in spectra and key not in made:
                found = self.gains(key, spectra[key])
                made[key] = FixedGains(spectra[key].vectors, *found, backbone.device) if found else None
        self._gains = {name: one for name in linears if (one := made.get(backbone.input_key(name))) is not None}
        new = training_batches(config, storage, backbone, options.frames) if set(self.asks) - {"old"} else []
        rank = trained_rank(config.lora.rank, self.takes_out(options))
        # In groups, because the second moments of a large model do not fit its device at once.
        for group in passes(linears, config.icsm.moments_gib * 2**30, backbone.input_key):
            moments = token_moments(backbone, new, group) if "inputs" in self.asks else {}
            gradients = weight_gradients(backbone, new, group) if "gradient" in self.asks else {}
            streams = _components(backbone, new, group, rank) if "stream" in self.asks else {}
            for name, W in tqdm(weights(group).items(), desc="starts", leave=False):
                key = backbone.input_key(name)
                scale = float(group[name].scaling["default"])
                start = streams[key].start() if key in streams else self.start(
                    Seen(name, W, spectra.get(key), moments.get(key), gradients.get(name), rank, scale))
                if start is not None:
                    self._starts[name] = start

    def attach(self, backbone) -> None:
        super().attach(backbone)
        if self._options.enabled:
            self._placed = PlacedSite(backbone.adapted_linears(), self._gains, self._starts, self.freezes(self._options))

    def state_dict(self) -> dict:
        return {**super().state_dict(), **({"placed": self._placed.state_dict()} if self._placed else {})}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        if self._placed:
            self._placed.load_state_dict(state["placed"])

    def detach(self) -> None:
        if self._placed:
            self._placed.detach()
            self._placed = None


def _components(backbone, batches, linears, rank: int) -> Dict[str, rules.Components]:
    """Input -> principal components of its tokens on the batches."""
    found: Dict[str, rules.Components] = {}
    mask = {}

    def add(key, x_BSD):
        found.setdefault(key, rules.Components(rank)).add(x_BSD[mask["BS"]])

    with torch.no_grad(), InputWatch(linears, backbone.input_key, add):
        for batch in batches:
            prefix = backbone.embed(batch)
            mask["BS"] = prefix.attention_mask_BS
            backbone.run_layers(prefix)
    return found


def whole(name: str, spectrum: Spectrum) -> Spectrum:
    """The spectrum, if it has all directions of its input; else ArtifactError, for methods about those of least energy."""
    dim, count = spectrum.vectors.shape
    if count < dim:
        raise ArtifactError(f"the artefact has {count} of the {dim} directions of {name}, and this method needs those of least energy: "
                            f"run `vlakeep offline` with --gains.columns {dim}, and train with it")
    return spectrum


def moment(spectrum: Spectrum, device: torch.device) -> torch.Tensor:
    """C [D, D] float32 of a spectrum: directions that are not stored share its mean."""
    vectors_DK = spectrum.vectors.double().to(device)
    excess_K = (spectrum.values.double() - spectrum.rest).to(device)
    return ((vectors_DK * excess_K) @ vectors_DK.T + spectrum.rest * torch.eye(len(vectors_DK), device=device).double()).float()


def trace(spectrum: Spectrum) -> float:
    return spectrum.mean * len(spectrum.vectors)


def too_old(since: str) -> str:
    """The installed PEFT in words if it is older than version `since`, else nothing."""
    from importlib.metadata import version

    found = version("peft")
    number = [int("".join(c for c in part if c.isdigit()) or 0) for part in found.split(".")[:2]]
    return f"peft {found} is installed" if since and number < [int(part) for part in since.split(".")] else ""
