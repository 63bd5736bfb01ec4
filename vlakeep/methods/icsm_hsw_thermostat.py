"""Method `icsm_hsw_thermostat`, the authors' frozen form: ICSM subspaces, HSW surgery at the residual stream and / or the LoRA inputs,
gains held by the Thermostat.

reads: artifact_dir/icms_<backbone>/ (teacher/icsm_artifact.py), which `vlakeep offline` makes (methods/icsm_hsw_thermostat_offline.py)
"""

from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import torch

from vlakeep.core.config import Config, to_dict
from vlakeep.core.errors import TrainingStopped
from vlakeep.core.storage import Storage
from vlakeep.hsw.lora_input import LoraInputSite
from vlakeep.hsw.residual import ResidualSite
from vlakeep.hsw.transform import Gains, random_basis
from vlakeep.methods import costs, icsm_hsw_thermostat_offline
from vlakeep.methods.base import CALMER, Method, Problem, never_measured
from vlakeep.probe.batches import prompt_batches
from vlakeep.probe.probe_set import open_probe
from vlakeep.teacher import icsm_artifact
from vlakeep.teacher.decompose import fix_signs
from vlakeep.teacher.folder import note_attention, of_weights, recorded_problems
from vlakeep.teacher.icsm_artifact import ArtifactError
from vlakeep.thermostat.controller import Controller, Law
from vlakeep.thermostat.thermometer import Thermometer

CALMER_RESIDUAL = ("Residual surgery at small gains does this: raise --thermostat.gamma_min and --thermostat.beta_min, or use "
                   "--hsw.site lora_input")


class IcsmHswThermostat(Method):
    """See the module's first line."""

    label, label_zh = "Method (residual)", "本方法（残差处）"
    decoder_only = divides_offline = True
    artifact_name = "ICSM artefact"
    reads = ("probe", "icsm", "hsw", "thermostat")

    def __init__(self, config: Config, artifact=None, make_thermometer=None):
        """`artifact` (icsm.artifact.Artifact) unless every feature is off; `make_thermometer(backbone)` builds the drift sensor."""
        self._config, self._artifact, self._make_thermometer = config, artifact, make_thermometer
        self._sites: Dict[str, Union[ResidualSite, LoraInputSite]] = {}  # by the names that hsw.site has
        self._thermometer: Any = None
        self._controller: Optional[Controller] = None
        self._fixed = Gains(beta=config.hsw.beta, gamma=config.hsw.gamma)
        self._observe = False

    @classmethod
    def needs_offline(cls, config: Config) -> bool:
        return config.hsw.enabled or config.thermostat.enabled

    @classmethod
    def offline(cls, config: Config, storage: Storage, backbone) -> Path:
        return icsm_hsw_thermostat_offline.build(config, storage, backbone)

    @classmethod
    def costs(cls, config: Config, work, adapters, numbers):
        return costs.frozen_form(config, work, adapters, numbers)

    @classmethod
    def calmer(cls, config: Config) -> str:
        residual = config.hsw.enabled and config.hsw.site in ("residual", "both")
        return CALMER_RESIDUAL if residual else CALMER

    @classmethod
    def check_model(cls, config: Config, depth: int, width: int) -> List[Problem]:
        found = []
        for key, layers in (("icsm.layers", config.icsm.layers), ("hsw.layers", config.hsw.layers)):
            wrong = [layer for layer in layers or [] if not 0 <= layer < depth]
            if wrong:
                found.append(Problem(f"--{key}", f"{wrong} out of range: the model has layers 0 to {depth - 1}",
                                     f"--{key} '[{depth - 3}, {depth - 1}]'"))
        if config.icsm.layers is None and depth < 4:
            found.append(Problem("--icsm.layers", f"the model has {depth} layers; two protection groups need 4",
                                 "--backbone.checkpoint of a deeper model"))
        limit = min(config.probe.size - 1, width)
        if config.icsm.rank > limit:
            found.append(Problem("--icsm.rank", f"r = {config.icsm.rank} is more than min(probe.size - 1, D) = {limit}",
                                 f"--icsm.rank {limit}, or a larger --probe.size"))
        t = config.thermostat
        if t.enabled and t.batch_size > config.probe.size:
            found.append(Problem("--thermostat.batch_size", f"{t.batch_size} is more than probe.size {config.probe.size}",
                                 f"--thermostat.batch_size {config.probe.size}"))
        return found + never_measured(config)

    @classmethod
    def artifact_folder(cls, config: Config, storage: Storage, backbone_name: str, weights_sha256: Optional[str] = None) -> Path:
        folder = storage.artifact_folder(config.icsm.name or icsm_artifact.artifact_name(backbone_name))
        return of_weights(folder, weights_sha256, chosen=config.icsm.name is not None)

    @classmethod
    def artifact_problems(cls, config: Config, folder: Path, weights_sha256: Optional[str], probe_sha256: Optional[str],
                          depth: Optional[int]) -> List[str]:
        found = icsm_artifact.load(folder)
        meta = found.meta
        return icsm_artifact.check(found, weights_sha256 or meta["weights_sha256"], probe_sha256 or meta["probe_sha256"],
                                   to_dict(config.icsm), meta["depth"] if depth is None else depth, config.probe.size,
                                   config.backbone.dtype, config.backbone.quantisation) + [
            f"{folder / name} is missing" for name in meta["files"] if not (folder / name).is_file()]

    @classmethod
    def prepare(cls, config: Config, storage: Storage, backbone):
        if not cls.needs_offline(config):
            return cls(config), {}
        probe = open_probe(config, storage)
        folder = cls.artifact_folder(config, storage, backbone.name, backbone.weights_sha256)
        problems = cls.artifact_problems(config, folder, backbone.weights_sha256, probe.sha256, backbone.num_layers)
        problems += recorded_problems(folder, icsm_artifact.load(folder).meta, backbone.recorded())
        if problems:
            raise ArtifactError("\n".join(problems))
        artifact = icsm_artifact.load(folder)
        note_attention(folder, artifact.meta, config.backbone)

        def make_thermometer(backbone):
            teacher, items = artifact.teacher_states()
            mean, covariance = {}, {}
            for layer in artifact.layers:
                mean[layer], covariance[layer] = artifact.teacher_statistics(layer)
            return Thermometer(
                backbone, prompt_batches(probe, items, backbone.processor, config.icsm.batch_size), items, artifact.layers,
                backbone.first_adapted_layer(), estimator(config), config.thermostat.batch_size, config.seed,
                mean, covariance, teacher, config.train.autocast)

        return cls(config, artifact, make_thermometer), {"artifact": artifact.meta["files"], "probe": probe.sha256}

    @property
    def gains(self) -> Gains:
        return Gains(self._controller.beta, self._controller.gamma) if self._controller else self._fixed

    def attach(self, backbone) -> None:
        hsw, thermostat = self._config.hsw, self._config.thermostat
        if hsw.enabled and hsw.site in ("residual", "both"):
            dtype = torch.float32 if hsw.dtype == "float32" else backbone.dtype
            self._sites["residual"] = ResidualSite(backbone.decoder_layers, self._residual_bases(backbone), hsw.eps, dtype)
        if hsw.enabled and hsw.site in ("lora_input", "both"):
            adapted = backbone.adapted_linears()
            self._sites["lora_input"] = LoraInputSite(adapted, self._input_bases(adapted, backbone.input_key))
        if thermostat.enabled:
            self._controller = Controller(control_law(self._config))
            self._thermometer = self._make_thermometer(backbone)
        self._apply()

    def _residual_bases(self, backbone) -> Dict[int, tuple]:
        mapping = self._artifact.layer_map
        layers = self._config.hsw.layers if self._config.hsw.layers is not None else sorted(mapping)
        unknown = [layer for layer in layers if layer not in mapping]
        if unknown:
            raise ValueError(f"hsw.layers {unknown}: the model has layers 0 to {backbone.num_layers - 1}, and the protection groups "
                             f"of {self._artifact.folder} hold {sorted(mapping)}; choose among these with --hsw.layers, or set "
                             "--icsm.layers and run `vlakeep offline` again")
        loaded = {rep: self._artifact.residual_basis(rep) for rep in sorted({mapping[layer] for layer in layers})}
        return {layer: self._ablate(loaded[mapping[layer]], mapping[layer]) for layer in layers}

    def _input_bases(self, adapted, input_key) -> Dict[str, Dict[str, torch.Tensor]]:
        bases = self._artifact.token_bases()
        missing = [name for name in adapted if input_key(name) not in bases]
        if missing:
            made = self._artifact.meta.get("lora")
            raise ArtifactError(f"{self._artifact.folder} has no input subspace for {len(missing)} of the {len(adapted)} adapted "
                                f"linears, such as {missing[0]}; it was made with lora {made}: run `vlakeep offline` with the "
                                "--lora.layers and --lora.modules of this run")
        ablated = {}
        for index, key in enumerate(sorted(bases)):  # either Uf or its complement comes with Up
            first = "n" if "n" in bases[key] else "f"
            pair = self._ablate((bases[key][first], bases[key]["p"]), index)
            ablated[key] = {first: pair[0], "p": pair[1]}
        return {name: ablated[input_key(name)] for name in adapted if input_key(name) in ablated}

    def _ablate(self, pair, seed: int):
        if self._config.hsw.subspace == "icsm":
            return pair
        fragile, columns = pair[0].shape[1], pair[0].shape[1] + pair[1].shape[1]
        # Another draw for each basis, all of them from the run's seed.
        basis_DK = fix_signs(random_basis(len(pair[0]), columns, seed=1_000 * self._config.seed + seed))
        return basis_DK[:, :fragile], basis_DK[:, fragile:]

    def _apply(self) -> None:
        for site in self._sites.values():
            site.set_gains(self.gains)

    def before_training(self) -> List[Dict[str, float]]:
        """Calibrate the Thermostat: measure while student and teacher are the same."""
        rows = []
        while self._controller and not self._controller.calibrated:
            if self._controller.rejected > self._config.thermostat.calibration:
                raise TrainingStopped(f"{self._controller.rejected} of {len(rows)} measurements of the drift before the first step gave "
                                      f"{rows[-1]['d']}: base weights or artefact hold numbers that are not finite, or too large for "
                                      f"--backbone.dtype {self._config.backbone.dtype}; use --backbone.dtype float32, and make the "
                                      "artefact again with `vlakeep offline`")
            rows.append(self._measure())
        return rows

    def _measure(self) -> Dict[str, float]:
        row = self._controller.update(self._thermometer.measure(self._controller.measurements))
        row["next_beta"], row["next_gamma"] = row.pop("beta"), row.pop("gamma")  # they act from the next step on
        return {key: value for key, value in row.items() if value is not None}

    def before_step(self, step: int, observe: bool) -> None:
        self._observe = observe
        for site in self._sites.values():
            site.meter.start(observe)

    def penalty(self) -> Optional[torch.Tensor]:
        """The method adds no loss (T2)."""

    def logs(self, step: int) -> bool:
        return self._controller is not None and step % self._config.thermostat.every == 0

    def after_step(self, step: int, loss_scale: float) -> Dict[str, float]:
        metrics = {}
        if self._observe and self._sites:
            metrics = {"beta": self.gains.beta, "gamma": self.gains.gamma}  # those that acted in this step
            for name, site in self._sites.items():
                prefix = "lora_input/" if name == "lora_input" and len(self._sites) > 1 else ""  # a single site needs no name
                metrics.update({prefix + key: value for key, value in site.meter.read(loss_scale).items()})
        if self._controller and step % self._config.thermostat.every == 0:
            metrics.update(self._measure())
            self._apply()
            site = self._sites.get("lora_input")
            if isinstance(site, LoraInputSite):
                metrics["leak"] = site.leak()
        for site in self._sites.values():
            site.meter.start(False)
        return metrics

    def state_dict(self) -> dict:
        return {"controller": self._controller.state_dict()} if self._controller else {}

    def load_state_dict(self, state: dict) -> None:
        if self._controller:
            self._controller.load_state_dict(state["controller"])
        self._apply()

    def detach(self) -> None:
        for site in self._sites.values():
            site.detach()
        self._sites.clear()


# Site -> bounds of (gamma, beta) where the configuration sets none; ThermostatConfig says why.
BOUNDS = {"residual": ((0.5, 1.0), (0.8, 1.0)), "both": ((0.5, 1.0), (0.8, 1.0)), "lora_input": ((0.0, 0.0), (0.2, 0.5))}


def estimator(config: Config) -> str:
    """The Thermostat's drift estimator, which follows the site unless it is set."""
    return config.thermostat.estimator or ("paired" if config.hsw.enabled and config.hsw.site == "lora_input" else "covariance")


def control_law(config: Config) -> Law:
    """The Thermostat's law; bounds that are not set follow the site, and give way to those that are."""
    t = config.thermostat

    def bounds(low, high, default):
        high = high if high is not None else max(default[1], low or 0.0)
        return low if low is not None else min(default[0], high), high

    gamma, beta = BOUNDS[config.hsw.site]
    gamma_min, gamma_max = bounds(t.gamma_min, t.gamma_max, gamma)
    beta_min, beta_max = bounds(t.beta_min, t.beta_max, beta)
    return Law(gamma_min=gamma_min, gamma_max=gamma_max, beta_min=beta_min, beta_max=beta_max,
               calibration=t.calibration, threshold_sigmas=t.threshold_sigmas, half_excess=t.half_excess, ema=t.ema,
               dead_band=t.dead_band, rate_limit=t.rate_limit, noise_floor=t.paired_noise if estimator(config) == "paired" else 0.0)


METHOD = IcsmHswThermostat
