"""The offline step of method `icsm_hsw_thermostat`: ICSM subspaces and the Thermostat's statistics of the frozen teacher.

reads:  probe_root_dir/<probe.name>
writes: artifact_dir/icms_<backbone>/ (teacher/icsm_artifact.py lists the files)
"""

import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import vlakeep
from vlakeep.core.config import Config, to_dict
from vlakeep.core.log import log
from vlakeep.core.parallel import Distributed
from vlakeep.core.provenance import library_versions, source_commit
from vlakeep.core.storage import Storage, need_free
from vlakeep.models.adapters import select_linears
from vlakeep.probe.batches import prompt_batches
from vlakeep.probe.probe_set import evenly, open_probe
from vlakeep.teacher import icsm_artifact as artifact
from vlakeep.teacher.collect import dealt, passes, pooled_batches, token_moments, with_own_answers
from vlakeep.teacher.collect import pooled as pooled_of
from vlakeep.teacher.decompose import check_rank, pooled_candidates, token_bases
from vlakeep.teacher.folder import numerics, of_weights
from vlakeep.teacher.sensitivity import batch_sensitivities, mean_sensitivity, measured, order_by_fragility
from vlakeep.thermostat.drift import covariance


def build(config: Config, storage: Storage, backbone) -> Path:
    """Build the artefact folder and return it."""
    started = time.perf_counter()
    probe = open_probe(config, storage)
    items = probe.spread(config.probe.size)
    layers = config.icsm.layers or artifact.default_layers(backbone.num_layers)
    mapping = artifact.layer_map(backbone.num_layers, layers)
    check_rank(config.icsm.rank, len(items), backbone.hidden_size)
    linears = select_linears(backbone, config.lora.layers, config.lora.modules) if config.icsm.tokens else {}
    folder = of_weights(storage.artifact_folder(config.icsm.name or artifact.artifact_name(backbone.name)), backbone.weights_sha256,
                        chosen=config.icsm.name is not None)
    need_free(folder, _bytes_needed(config, backbone, layers, linears, len(items)), "the ICSM artefact")
    log.info(f"teacher {backbone.name} ({backbone.num_layers} layers, D = {backbone.hidden_size}), probe {len(items)} items, "
             f"representative layers {layers}, r = {config.icsm.rank}")

    job, size = Distributed.here(), config.icsm.batch_size

    def batches(numbers):
        """Of this process's share of the batches that a single one has."""
        own = job.share([numbers[start:start + size] for start in range(0, len(numbers), size)])
        return (pair for part in own for pair in prompt_batches(probe, part, backbone.processor, size))

    steps = -(-len(items) // size)
    rows = job.merged(pooled_batches(backbone, batches(items), layers, total=-(-steps // job.world)))
    pooled = pooled_of(rows, layers, str(probe.folder))
    tensors, notes = {}, {}
    usable = [items[i] for i in pooled.kept]
    some = [usable[i] for i in evenly(len(usable), min(config.icsm.sensitivity_items, len(usable)))]
    for layer in layers:
        candidates_DK, values, mean_D = pooled_candidates(pooled.states[layer], config.icsm.rank)
        candidates_DK = job.broadcast(candidates_DK)
        step = config.icsm.epsilon * pooled.scale[layer]
        if config.icsm.sensitivity:
            kl_K = mean_sensitivity(job.merged(batch_sensitivities(backbone, list(batches(some)), layer, candidates_DK, step)),
                                    config.icsm.rank)
        else:
            # Falling numbers leave the candidates in the order of the SVD.
            kl_K = torch.arange(config.icsm.rank, 0, -1, dtype=torch.float64)
        fragile_DK, plastic_DK, order = order_by_fragility(candidates_DK, kl_K, config.icsm.fragile_fraction)
        tensors[layer] = {"U_f": fragile_DK, "U_p": plastic_DK, "mu": mean_D, "C_T": covariance(pooled.states[layer])}
        energy = (values.square() / values.square().sum())[:config.icsm.rank]
        notes[str(layer)] = {
            "r_f": fragile_DK.shape[1], "r_p": plastic_DK.shape[1], "epsilon_absolute": step,
            "explained_variance": float(energy.sum()), "svd_order": order.tolist(),
            "kl": [round(v, 9) for v in kl_K[order].tolist()] if config.icsm.sensitivity else None,
            **(measured(backbone, layer) if config.icsm.sensitivity and backbone.prompt_sees_itself else {}),
        }
        log.info(f"layer {layer}: {energy.sum():.1%} of the variance in {config.icsm.rank} directions"
                 + (f", KL per direction {kl_K.max():.2e} to {kl_K.min():.2e}" if config.icsm.sensitivity else ""))

    tokens = _token_level(backbone, partial(prompt_batches, probe, items, backbone.processor, size), batches(items), linears, config, steps
                          ) if config.icsm.tokens else None
    if not job.is_main:
        return folder
    meta = {
        "backbone": backbone.name, "weights_sha256": backbone.weights_sha256, **numerics(config.backbone), **backbone.recorded(),
        "depth": backbone.num_layers,
        "hidden_size": backbone.hidden_size, "layers": layers, "layer_map": {str(k): v for k, v in mapping.items()},
        "r": config.icsm.rank, "epsilon": config.icsm.epsilon, "per_layer": notes,
        "probe": config.probe.name, "probe_sha256": probe.sha256, "probe_items": len(items), "empty_masks": pooled.empty,
        "config": to_dict(config.icsm), "lora": {"layers": config.lora.layers, "modules": list(config.lora.modules)},
        "seed": config.seed, "vlakeep": vlakeep.__version__, "versions": library_versions(), "commit": source_commit(),
    }
    teacher = {f"pooled.{layer}": pooled.states[layer] for layer in layers}
    teacher["items"] = torch.tensor([items[i] for i in pooled.kept])
    artifact.write(folder, tensors, tokens, teacher, meta)
    if pooled.empty:
        log.info(f"{pooled.empty} of {len(items)} probe items had an empty instruction mask and were left out")
    log.info(f"wrote {folder} in {time.perf_counter() - started:.1f} s")
    return folder


def _bytes_needed(config: Config, backbone, layers, linears, items: int) -> int:
    """Size of the artefact, all float32: bases and covariance per layer, the teacher's states, a basis per distinct input."""
    dim, fragile, plastic = backbone.hidden_size, config.icsm.tokens_fragile_fraction, config.icsm.tokens_plastic_fraction
    share = plastic + min(fragile, 1 - fragile - plastic)
    inputs = {backbone.input_key(name): linear.in_features for name, linear in linears.items()}
    return int(4 * (len(layers) * dim * (config.icsm.rank + dim + items) + sum(share * d * d for d in inputs.values())))


def _token_level(backbone, prompts, own, linears, config: Config, steps: int):
    """Bases of the inputs of every linear that the lora section adapts, in process 0. prompts(): batches with their masks, of all items;
    own: those of this process's share. A process sums the moments of its inputs over all of them, as methods/graded_offline.py says."""
    job = Distributed.here()
    texts = None
    if config.icsm.tokens_generated and job.world > 1:
        mine = [with_own_answers(backbone, batch, backbone.answer_tokens)
                for batch, _ in tqdm(own, desc="teacher's answers", total=-(-steps // job.world), leave=False)]
        texts = job.merged([(whole.input_ids, whole.attention_mask) for whole in mine])

    def inputs():
        for number, (batch, _) in enumerate(prompts()):
            if texts is not None:
                yield batch.with_text(*texts[number])
            else:
                yield with_own_answers(backbone, batch, backbone.answer_tokens) if config.icsm.tokens_generated else batch

    groups = passes(dealt(linears, backbone.input_key, job.world)[job.rank], config.icsm.moments_gib * 2**30, backbone.input_key)
    # The teacher answers once: with several passes its answers are kept, with one they stream.
    kept = None if len(groups) <= 1 or texts is not None else list(tqdm(inputs(), desc="teacher's answers", total=steps, leave=False))
    bases = []
    for group in groups:
        moments = token_moments(backbone, kept or inputs(), group, total=steps)
        for key in tqdm(sorted(moments), desc="token bases", leave=False):
            bases.append((key, token_bases(moments.pop(key), config.icsm.tokens_fragile_fraction, config.icsm.tokens_plastic_fraction)))
            # The workspace is the largest block there is: kept, it would be cut up by the next pass, and missing in the next decomposition.
            if backbone.device.type == "cuda":
                torch.cuda.empty_cache()
    return {f"{key}.{kind}": tensor for key, found in job.merged(bases, 1, everywhere=False) for kind, tensor in found.items()}
