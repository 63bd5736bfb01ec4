"""The closing pass of `vlakeep export --export.close_to`: a finished adapter, closed until the divergence meets a budget.

reads:  artifact_dir/graded_<backbone>/ (the teacher's answers to the held-out probe items), the probe, the run's data
writes: run_root_dir/<run>-closed-<budget>/: the closed adapter as a checkpoint, which is evaluated and exported as that of any run

Belongs to export. The mathematics are in teacher/closing.py. The method that a run was trained with does not matter: an adapter is all that
is needed.
"""

import json
import shutil
from pathlib import Path
from typing import Iterator, List, Sequence, Tuple

from tqdm import tqdm

from vlakeep.core.base_models import model_name
from vlakeep.core.checkpoint import save_checkpoint
from vlakeep.core.config import Config
from vlakeep.core.errors import quoted
from vlakeep.core.log import log
from vlakeep.core.names import closed_name, run_name
from vlakeep.core.parallel import pick_device
from vlakeep.core.storage import Storage, atomic_write, find_checkpoint
from vlakeep.data.sample import Batch, Sample
from vlakeep.methods import graded_offline
from vlakeep.models.adapters import adapters_disabled, load_adapter, save_adapter
from vlakeep.models.chain import keep_chain, merge_chain, read_chain
from vlakeep.models.load import make_backbone
from vlakeep.probe.probe_set import ProbeSet, open_probe
from vlakeep.teacher import closing
from vlakeep.teacher.answers import Part, run_below
from vlakeep.teacher.artifact import GradedArtifact, check, load_artifact
from vlakeep.teacher.folder import ArtifactError, note_attention
from vlakeep.thermostat.kl_sensor import KLSensor, batched

NEW_FRAMES = 256  # of the run's data, over all data sets: 20,000 tokens on the tabletop, for moments of at most 512 x 512
RECORD = "closing.json"
OF_THE_RUN = ("config.yaml", "provenance.json", "metrics.jsonl")  # how the adapter was trained is told by the run's own files


def free_folder(storage: Storage, run: str, budget: float, overwrite: bool) -> Path:
    """The folder of the closed run. FileExistsError when something else is there, or without `overwrite` an earlier result."""
    folder = storage.run_folder(closed_name(run, budget))
    if folder.exists() and not (folder / RECORD).is_file():
        raise FileExistsError(f"{folder} is there and was not made by a closing pass: move it away, or choose another --export.close_to")
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists already: evaluate it with --evaluate.target {quoted(run_name(folder, storage))}, or make "
                              "it anew with --export.overwrite true")
    return folder


def open_answers(config: Config, storage: Storage, backbone, probe: ProbeSet, command: str) -> GradedArtifact:
    """The artefact whose answers the sensor compares with. ArtifactError says why it cannot be used, and `command`, which makes it."""
    remedy = f"the closing pass compares with the teacher's answers, which are made once for all runs by\n  {command}"
    try:
        artifact = load_artifact(graded_offline.artifact_folder(config, storage, backbone.name, backbone.weights_sha256))
    except ArtifactError as error:
        raise ArtifactError(f"{error}\n{remedy}") from error
    problems = check(artifact, backbone.weights_sha256, probe.sha256, config.probe.size, backbone.num_layers, config.backbone.dtype,
                     graded_offline.deciding(config), config.backbone.quantisation)
    if problems:
        raise ArtifactError("\n".join([*problems, remedy]))
    note_attention(artifact.folder, artifact.meta, config.backbone)
    return artifact


def make_sensor(config: Config, backbone, probe: ProbeSet, artifact: GradedArtifact) -> KLSensor:
    """The divergence on all held-out items, kinds of prompts counting as they do for the loop of method `graded`."""
    answered, items = artifact.answers()
    size, weights_N = config.icsm.batch_size, graded_offline.sensor_weights(config, probe.kinds(items))
    return KLSensor(backbone, answered, batched(probe.samples(items), backbone.processor, size), size, weights_N)


def _parts(backbone, samples: List[Sample], size: int, teacher: bool) -> List[Part]:
    """Prompts with the teacher's own answers, or the student's, run up to the first adapted layer as the student runs them."""
    def answered() -> Iterator[Tuple[Batch, Batch]]:
        pairs = graded_offline.answered_samples(backbone, samples, size)
        for _ in tqdm(range(0, len(samples), size), desc="answers to " + ("the probe" if teacher else "the new prompts"), leave=False):
            if teacher:
                with adapters_disabled(backbone):
                    pair = next(pairs)
            else:
                pair = next(pairs)
            yield pair

    return run_below(backbone, answered(), min(backbone.first_adapted_layer(), backbone.num_layers))


def _new_samples(config: Config, storage: Storage, backbone) -> List[Sample]:
    share = max(1, NEW_FRAMES // max(1, len(config.data.datasets)))
    found = graded_offline.new_samples(config, storage, graded_offline.picture_size(backbone), share, backbone.processor.spec)
    samples = [sample for group in found.values() for sample in group]
    if not samples:
        raise FileNotFoundError(f"no data set {', '.join(config.data.datasets)} in {storage.data}: the closing pass needs the data that "
                                "the run was trained on, to know what its adapter is for; name them with --data.datasets")
    return samples


def close(config: Config, storage: Storage, checkpoint: Path, folder: Path, command: str) -> Tuple[Path, dict]:
    """Close the adapter of a checkpoint to `export.close_to` and write it to `folder`, a run's folder.

    Returns its checkpoint and the record. command: what makes the artefact, for messages.
    Raises ArtifactError without the teacher's answers, FileNotFoundError without data, ValueError when no mu reaches the budget.
    """
    budget = config.export.close_to
    assert budget is not None
    backbone = make_backbone(config.backbone, pick_device(config.device), storage.cache)
    chain = read_chain(checkpoint.absolute().parents[1])
    merge_chain(backbone, chain)
    probe = open_probe(config, storage)
    artifact = open_answers(config, storage, backbone, probe, command)
    load_adapter(backbone, checkpoint / "adapter")
    backbone.eval()
    sensor = make_sensor(config, backbone, probe, artifact)
    items = probe.spread(config.probe.size)
    fit, held = graded_offline.split_items(items, probe.kinds(items), config.gains.holdout)
    weights_N = graded_offline.item_weights(config, probe.kinds(fit))
    before = sensor.measure()
    own = {name: linear.lora_A["default"].weight.detach().clone() for name, linear in backbone.adapted_linears().items()}
    trail, used = [(0.0, before)], 0
    old: List[Part] = []
    new: List[Part] = []
    if not before <= budget:
        samples, size = _new_samples(config, storage, backbone), config.icsm.batch_size
        used = len(samples)
        old = _parts(backbone, probe.samples(fit), size, teacher=True)
        new = _parts(backbone, samples, size, teacher=False)

        def measure(mu: float) -> float:
            closing.sweep(backbone, old, new, own, mu, backbone.input_key, weights_N)
            return sensor.measure()

        trail = closing.search(measure, budget, before)
    mu, after = trail[-1]
    left = closing.sweep(backbone, old, new, own, mu, backbone.input_key, weights_N)
    run_manifest = json.loads((checkpoint / "manifest.json").read_text())
    record = {"budget": budget, "mu": mu, "kl_before": before, "kl_after": after, "tried": [list(pair) for pair in trail[:-1]],
              "left": {str(layer): shares for layer, shares in left.items()}, "run": run_name(checkpoint.parents[1], storage),
              "checkpoint": checkpoint.name, "adapter_sha256": run_manifest["files"]["adapter/adapter_model.safetensors"]["sha256"],
              "probe_sha256": probe.sha256, "probe_items": len(fit), "held_out_items": len(held), "new_frames": used,
              "datasets": list(config.data.datasets), "artifact": artifact.meta["files"]}
    show(record)
    written = _write(backbone, checkpoint, folder, run_manifest["step"], record)
    keep_chain(chain, folder)
    return written, record


def show(record: dict) -> None:
    before, after, budget = record["kl_before"], record["kl_after"], record["budget"]
    if record["mu"] == 0:
        log.info(f"closing pass: the divergence is {before:.3g} nats per answer token, within the {budget:g} allowed: nothing is closed")
        return
    log.info(f"closing pass: mu {record['mu']:.4g} after {len(record['tried'])} measurements, divergence {before:.3g} -> {after:.3g} of "
             f"{budget:g} nats per answer token on {record['held_out_items']} held-out probe items")
    log.info("  what is left of the update, by layer (its norm / what it adds to new inputs / to the probe's): "
             + ", ".join(f"{layer}: " + " / ".join(f"{v:.2g}" for v in shares.values()) for layer, shares in record["left"].items()))
    if after < closing.REACHED * budget:
        log.warning(f"note: the divergence jumps between {after:.3g} nats and more than {budget:g}; one probe item that flips can do that")


def _write(backbone, checkpoint: Path, folder: Path, step: int, record: dict) -> Path:
    """The closed adapter as the checkpoint of a run of its own."""
    def adapter(temporary: Path) -> None:
        save_adapter(backbone, temporary / "adapter")
        shutil.copyfile(checkpoint / "adapter" / "dataset_statistics.json", temporary / "adapter" / "dataset_statistics.json")

    if (folder / "checkpoints").is_dir():
        shutil.rmtree(folder / "checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / RECORD, "w") as file:  # first, so that what a kill leaves is known for ours
        file.write(json.dumps(record, indent=1) + "\n")
    written = save_checkpoint(folder, step, {}, {"step": step, "base_weights": backbone.weights_sha256}, adapter, keep_last=1)
    for name in OF_THE_RUN:
        if (checkpoint.parents[1] / name).is_file():
            shutil.copyfile(checkpoint.parents[1] / name, folder / name)
    return written


def divergence_of(config: Config, storage: Storage, folder: Path, base_sha256: str, before: Sequence[str] = ()) -> float:
    """The same divergence of a merged folder, read from disk as anyone would: what rounding its weights has changed is in it.

    base_sha256: of the teacher. before: runs that it was trained in (models/chain.py)."""
    base, settings = find_checkpoint(config.backbone.checkpoint, storage.cache), config.backbone
    merged = make_backbone(type(settings)(checkpoint=str(folder), dtype=settings.dtype, attn_implementation=settings.attn_implementation),
                           pick_device(config.device), storage.cache)
    artifact = load_artifact(graded_offline.artifact_folder(config, storage, "+".join([model_name(base), *before]), base_sha256))
    return make_sensor(config, merged.eval(), open_probe(config, storage), artifact).measure()
