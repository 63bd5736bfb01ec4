"""The seam between training and the anti-forgetting methods, and the method itself.

An arm is a Method; the loop in train.py asks it the same things whichever it is. "What does the method add?" is the
difference between `Baseline` and `IcsmHswThermostat`.
"""

from typing import Any, Dict, List, Optional, Protocol, Union

import torch

from vlakeep.config import Config
from vlakeep.hsw.lora_input import LoraInputSite
from vlakeep.hsw.residual import ResidualSite
from vlakeep.hsw.transform import Gains, random_basis
from vlakeep.icsm.artifact import ArtifactError
from vlakeep.icsm.collect import input_key
from vlakeep.icsm.decompose import fix_signs
from vlakeep.thermostat.controller import Controller, Law


class Method(Protocol):
    """What the training loop knows of an arm. `attach` comes after LoRA and before DDP and the optimizer are built."""

    def attach(self, backbone) -> None: ...

    def before_training(self) -> List[Dict[str, float]]: ...

    def before_step(self, step: int, observe: bool) -> None: ...

    def penalty(self) -> Optional[torch.Tensor]: ...

    def after_step(self, step: int, loss_scale: float) -> Dict[str, float]: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...

    def detach(self) -> None: ...


class Baseline:
    """Plain LoRA: adds nothing to training."""

    def attach(self, backbone) -> None:
        """Nothing is attached."""

    def before_training(self) -> List[Dict[str, float]]:
        """Rows to log as step 0 of a fresh run (not of a resumed one)."""
        return []

    def before_step(self, step: int, observe: bool) -> None:
        """Nothing to prepare; `observe` says whether this step's metrics will be logged."""

    def penalty(self) -> Optional[torch.Tensor]:
        """A differentiable addition to the loss of each micro-batch, or None."""

    def after_step(self, step: int, loss_scale: float) -> Dict[str, float]:
        """Metrics of the step; `loss_scale` is the factor that mixed precision put on the gradients."""
        return {}

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing is kept."""

    def detach(self) -> None:
        """Nothing was attached."""


class IcsmHswThermostat:
    """ICSM subspaces, HSW surgery at the residual stream and / or the LoRA inputs, gains held by the Thermostat."""

    def __init__(self, config: Config, artifact=None, make_thermometer=None):
        """`artifact` (icsm.artifact.Artifact) unless every feature is off; `make_thermometer(backbone)` builds the drift sensor."""
        self._config, self._artifact, self._make_thermometer = config, artifact, make_thermometer
        self._sites: Dict[str, Union[ResidualSite, LoraInputSite]] = {}  # by the names that hsw.site has
        self._thermometer: Any = None
        self._controller: Optional[Controller] = None
        self._fixed = Gains(beta=config.hsw.beta, gamma=config.hsw.gamma)
        self._observe = False

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
            self._sites["lora_input"] = LoraInputSite(adapted, self._input_bases(adapted))
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

    def _input_bases(self, adapted) -> Dict[str, Dict[str, torch.Tensor]]:
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
        basis_DK = fix_signs(random_basis(len(pair[0]), columns, seed=1_000 * self._config.seed + seed))
        return basis_DK[:, :fragile], basis_DK[:, fragile:]

    def _apply(self) -> None:
        for site in self._sites.values():
            site.set_gains(self.gains)

    def before_training(self) -> List[Dict[str, float]]:
        """Calibrate the Thermostat: measure while student and teacher are the same."""
        rows = []
        while self._controller and not self._controller.calibrated:
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


def acts_on_residual(config: Config) -> bool:
    """Whether the arm edits the gradient of the residual stream."""
    return config.method == "icsm_hsw_thermostat" and config.hsw.enabled and config.hsw.site in ("residual", "both")


def needs_artifact(config: Config) -> bool:
    """Whether the arm reads the ICSM artefact."""
    return config.method == "icsm_hsw_thermostat" and (config.hsw.enabled or config.thermostat.enabled)


def build_method(config: Config, artifact=None, make_thermometer=None) -> Method:
    """The arm named by `config.method`."""
    if config.method == "baseline":
        return Baseline()
    return IcsmHswThermostat(config, artifact, make_thermometer)
