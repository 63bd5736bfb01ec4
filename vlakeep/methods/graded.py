"""Method `graded`: gains per direction at the inputs of the adapted linears, opened by the Thermostat to what may be forgotten.

reads: artifact_dir/graded_<backbone>/ (teacher/artifact.py), which `vlakeep offline` makes (methods/graded_offline.py); with
gains.start_of_a new_inputs the run's data before training, again in a run that goes on, whose A is then that of its checkpoint
"""

from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

import torch

from vlakeep.core.config import Config, ConfigError
from vlakeep.core.storage import Storage
from vlakeep.hsw.graded import GradedSite, make_site
from vlakeep.hsw.transform import random_basis
from vlakeep.methods import costs, graded_offline
from vlakeep.methods.base import Method, Problem, never_measured
from vlakeep.models.adapters import adapters_disabled, layer_numbers
from vlakeep.probe.probe_set import open_probe
from vlakeep.teacher.answers import Answered, run_below, teacher_answers
from vlakeep.teacher.artifact import GradedArtifact, check, load_artifact
from vlakeep.teacher.collect import passes, token_moments
from vlakeep.teacher.folder import ArtifactError, note_attention, recorded_problems
from vlakeep.teacher.spectrum import Spectrum
from vlakeep.thermostat.kl_sensor import KLSensor, batched
from vlakeep.thermostat.loop import Loop, set_point, starting_opening
from vlakeep.thermostat.setpoint import SetPoint

START_FRAMES = 256  # of the run's data, for gains.start_of_a; as many as the rivals take that begin at new inputs (methods/subspace.py)


class Graded(Method):
    """See the module's first line. `make_sensors(backbone)` gives {"kl": KLSensor, "kl_new": KLSensor or None}."""

    label, label_zh = "Graded gains, set-point", "逐方向增益（设定点）"
    decoder_only = divides_offline = True
    artifact_name = "artefact of the graded method"
    reads: Tuple[str, ...] = ("probe", "icsm.batch_size", "gains", "thermostat")

    @classmethod
    def needs_offline(cls, config: Config) -> bool:
        return config.gains.enabled or config.thermostat.enabled

    @classmethod
    def offline(cls, config: Config, storage: Storage, backbone) -> Path:
        return graded_offline.build(config, storage, backbone)

    @classmethod
    def costs(cls, config: Config, work, adapters, numbers):
        return costs.graded(config, work, adapters, numbers)

    @classmethod
    def check_model(cls, config: Config, depth: int, width: int) -> List[Problem]:
        return never_measured(config)

    @classmethod
    def artifact_folder(cls, config: Config, storage: Storage, backbone_name: str, weights_sha256: Optional[str] = None) -> Path:
        if config.gains.of_first:
            backbone_name = backbone_name.partition("+")[0]
        return graded_offline.artifact_folder(config, storage, backbone_name, weights_sha256)

    @classmethod
    def artifact_problems(cls, config: Config, folder: Path, weights_sha256: Optional[str], probe_sha256: Optional[str],
                          depth: Optional[int]) -> List[str]:
        found = load_artifact(folder)
        meta = found.meta
        return check(found, weights_sha256 or meta["weights_sha256"], probe_sha256 or meta["probe_sha256"], config.probe.size,
                     meta["depth"] if depth is None else depth, config.backbone.dtype, graded_offline.deciding(config),
                     config.backbone.quantisation) + [
            f"{folder / name} is missing" for name in meta["files"] if not (folder / name).is_file()]

    @classmethod
    def prepare(cls, config: Config, storage: Storage, backbone):
        """With the sensors of the divergence on probe items and on the new task's own prompts. ArtifactError names every mismatch."""
        if not cls.needs_offline(config):
            return cls(config, None, None), {}
        probe = open_probe(config, storage)
        weights = backbone.first_weights_sha256 if config.gains.of_first else backbone.weights_sha256
        folder = cls.artifact_folder(config, storage, backbone.name, weights)
        problems = cls.artifact_problems(config, folder, weights, probe.sha256, backbone.num_layers)
        problems += recorded_problems(folder, load_artifact(folder).meta, backbone.recorded())
        if problems:
            raise ArtifactError("\n".join(problems))
        artifact = load_artifact(folder)
        note_attention(folder, artifact.meta, config.backbone)
        size = config.icsm.batch_size

        def make_sensors(backbone):
            answered, items = artifact.answers()
            count = min(config.thermostat.batch_size, len(items))
            # Spread evenly over the held-out items, and the same ones in every measurement.
            rows = torch.tensor([i * len(items) // count for i in range(count)])
            chosen = [items[i] for i in rows]
            sensor = KLSensor(backbone, Answered(*[value[rows] for value in answered]),
                              batched(probe.samples(chosen), backbone.processor, size), size,
                              graded_offline.sensor_weights(config, probe.kinds(chosen)), config.train.autocast)
            new = graded_offline.new_samples(config, storage, graded_offline.picture_size(backbone), max(1, count // 4),
                                             backbone.processor.spec)
            samples = [sample for group in new.values() for sample in group]
            if not samples:
                return {"kl": sensor, "kl_new": None}
            with adapters_disabled(backbone):
                first = backbone.first_adapted_layer()
                own = teacher_answers(backbone, run_below(backbone, graded_offline.answered_samples(backbone, samples, size), first), first)
            return {"kl": sensor, "kl_new": KLSensor(backbone, own, batched(samples, backbone.processor, size), size,
                                                       autocast=config.train.autocast)}

        method = cls(config, artifact, make_sensors)
        method._place_a(storage, backbone)
        return method, {"artifact": artifact.meta["files"], "probe": probe.sha256}

    def logs(self, step: int) -> bool:
        return bool(self._sensors) and step % self._config.thermostat.every == 0

    def __init__(self, config: Config, artifact: Optional[GradedArtifact], make_sensors: Callable):
        self._config, self._artifact, self._make_sensors = config, artifact, make_sensors
        self._site: Optional[GradedSite] = None
        self._loop: Optional[Loop] = None
        self._sensors: dict = {}
        self._observe = False

    def _place_a(self, storage: Storage, backbone) -> None:
        """Where A starts, unless it is as it was drawn. Before layers are compiled, which would keep what watches their inputs."""
        if not self._config.gains.enabled or self._config.gains.start_of_a == "random":
            return
        self._put_gains_on(backbone)
        if self._config.gains.start_of_a == "open":
            self._site.start_open()
            return
        training = backbone.training
        backbone.eval()
        new = graded_offline.training_batches(self._config, storage, backbone, START_FRAMES)
        for group in passes(self._with_gains(backbone), self._config.icsm.moments_gib * 2**30, backbone.input_key):
            moments = token_moments(backbone, new, group)
            self._site.start_at({name: moments[backbone.input_key(name)] for name in group})
        backbone.train(training)

    def _put_gains_on(self, backbone) -> None:
        """Put the gains on, at their starting opening."""
        settings = self._config.gains
        adapted, spectra = self._with_gains(backbone), self._spectra(backbone)
        sensitivity = self._artifact.sensitivity() if settings.allocation == "sensitivity" else None
        self._site = make_site(adapted, spectra, backbone.input_key, settings.steepness, settings.scale, settings.allocation, sensitivity)
        self._site.set_opening(settings.opening or starting_opening(self._site, settings.start))

    def _with_gains(self, backbone) -> dict:
        """The adapted linears of gains.layers by name. ConfigError when there is none."""
        chosen = layer_numbers(self._config.gains.layers, backbone.num_layers, "--gains.layers")
        found = {name: linear for name, linear in backbone.adapted_linears().items() if int(name.split(".")[1]) in chosen}
        if not found:
            raise ConfigError(f"--gains.layers {self._config.gains.layers}: none of these layers has adapters, which --lora.layers "
                              f"{self._config.lora.layers} puts elsewhere")
        return found

    def attach(self, backbone) -> None:
        if self._config.gains.enabled and not self._site:
            self._put_gains_on(backbone)
        if self._config.thermostat.enabled:
            self._sensors = self._make_sensors(backbone)
            self._loop = Loop(self._sensors["kl"].measure, self._law(), self._act)

    def _law(self) -> Optional[SetPoint]:
        """The law of the loop; None when there is nothing that it could move."""
        thermostat = self._config.thermostat
        return set_point(thermostat.target, self._site.opening, self._config.gains.steepness, thermostat.open_factor,
                         thermostat.close_factor) if self._site else None

    def _act(self, opening: float) -> None:
        """What the controller moves takes its new value."""
        self._site.set_opening(opening)

    def _spectra(self, backbone) -> Dict[str, Spectrum]:
        spectra = self._artifact.spectra()
        adapted = self._with_gains(backbone)
        missing = [name for name in adapted if backbone.input_key(name) not in spectra]
        if missing:
            raise ArtifactError(
                f"{self._artifact.folder} has no spectrum for {len(missing)} of the {len(adapted)} adapted linears, such as {missing[0]}; "
                f"it was made with lora {self._artifact.meta['lora']}: run `vlakeep offline` with the --lora.layers and --lora.modules "
                "of this run")
        if self._config.gains.directions == "random":
            seed = 1_000 * self._config.seed  # every input has directions of its own
            return {name: own._replace(vectors=random_basis(len(own.vectors), own.vectors.shape[1], seed + number))
                    for number, (name, own) in enumerate(sorted(spectra.items()))}
        return spectra

    def before_training(self) -> List[Dict[str, float]]:
        """What student and teacher say while they are the same: the sensor's zero."""
        return [dict(self._measure(act=False))] if self._sensors else []

    def before_step(self, step: int, observe: bool) -> None:
        self._observe = observe
        if self._site:
            self._site.meter.start(observe)

    def after_step(self, step: int, loss_scale: float) -> Dict[str, float]:
        metrics = {}
        if self._observe and self._site:
            metrics = {"opening": self._site.opening, **self._site.meter.read(loss_scale)}
        if self._site:
            self._site.meter.start(False)
        if self._sensors and step % self._config.thermostat.every == 0:
            metrics.update(self._measure())
        if self._loop and self._loop.controller and step == self._config.train.steps:
            metrics.update(self._settle(metrics))
        return metrics

    def _settle(self, measured: Dict[str, float]) -> Dict[str, float]:
        return self._loop.settle(measured)

    def _measure(self, act: bool = True) -> Dict[str, float]:
        kl = self._loop.measure()
        row = {"d": kl, "kl": kl}
        if self._sensors.get("kl_new"):
            row["kl_new"] = self._sensors["kl_new"].measure()
        if self._site:
            row.update(self._where_it_learns())
        if act:
            row.update(self._loop.move(kl))
        return row

    def _where_it_learns(self) -> Dict[str, float]:
        """Norm of the update per decoder layer, and how many directions each distinct input has open."""
        squares: Dict[str, torch.Tensor] = {}
        for name, norm in self._site.update_norms().items():
            layer = name.split(".")[1]
            squares[layer] = squares.get(layer, 0) + norm.square()
        norms = torch.stack(list(squares.values())).sqrt().tolist()  # one wait for the device
        row = {f"update_norm/{layer}": norm for layer, norm in zip(squares, norms)}
        row.update({f"open_rank/{name}": space.open_rank() for name, space in self._site.distinct().items()})
        return row

    def state_dict(self) -> dict:
        return self._loop.state_dict() if self._loop else {}

    def load_state_dict(self, state: dict) -> None:
        if self._loop:
            self._loop.load_state_dict(state)

    def detach(self) -> None:
        if self._site:
            self._site.detach()
            self._site = None


METHOD = Graded
