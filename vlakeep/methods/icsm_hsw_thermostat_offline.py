"""The offline step of method `icsm_hsw_thermostat`: ICSM subspaces and the Thermostat's statistics of the frozen teacher.

reads:  probe_root_dir/<probe.name>
writes: artifact_dir/icms_<backbone>/ (teacher/icsm_artifact.py lists the files)
"""

import time
from pathlib import Path

import torch
from tqdm import tqdm

import vlakeep
from vlakeep.core.config import Config, to_dict
from vlakeep.core.log import log
from vlakeep.core.provenance import library_versions, source_commit
from vlakeep.core.storage import Storage, need_free
from vlakeep.models.adapters import select_linears
from vlakeep.probe.batches import prompt_batches
from vlakeep.probe.probe_set import ProbeSet, evenly
from vlakeep.teacher import icsm_artifact as artifact
from vlakeep.teacher.collect import passes, pooled_states, token_moments, with_own_answers
from vlakeep.teacher.decompose import check_rank, pooled_candidates, token_bases
from vlakeep.teacher.folder import numerics, of_weights
from vlakeep.teacher.sensitivity import measured, order_by_fragility, sensitivities
from vlakeep.thermostat.drift import covariance


def build(config: Config, storage: Storage, backbone) -> Path:
    """Build the artefact folder and return it."""
    started = time.perf_counter()
    probe = ProbeSet(storage.probe_folder(config.probe.name))
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

    def batches(numbers):
        return prompt_batches(probe, numbers, backbone.processor, config.icsm.batch_size)

    steps = -(-len(items) // config.icsm.batch_size)
    pooled = pooled_states(backbone, batches(items), layers, total=steps, where=str(probe.folder))
    tensors, notes = {}, {}
    usable = [items[i] for i in pooled.kept]
    some = [usable[i] for i in evenly(len(usable), min(config.icsm.sensitivity_items, len(usable)))]
    for layer in layers:
        candidates_DK, values, mean_D = pooled_candidates(pooled.states[layer], config.icsm.rank)
        step = config.icsm.epsilon * pooled.scale[layer]
        if config.icsm.sensitivity:
            kl_K = sensitivities(backbone, list(batches(some)), layer, candidates_DK, step)
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

    tokens = _token_level(backbone, batches(items), linears, config, steps) if config.icsm.tokens else None
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


def _token_level(backbone, prompts, linears, config: Config, steps: int):
    """Bases of the inputs of every linear that the lora section adapts."""
    def inputs():
        for batch, _ in prompts:
            yield with_own_answers(backbone, batch, backbone.answer_tokens) if config.icsm.tokens_generated else batch

    groups = passes(linears, config.icsm.moments_gib * 2**30, backbone.input_key)
    # The teacher answers once: with several passes its answers are kept, with one they stream.
    answered = inputs() if len(groups) == 1 else list(tqdm(inputs(), desc="teacher's answers", total=steps, leave=False))
    bases = {}
    for group in groups:
        moments = token_moments(backbone, answered, group, total=steps)
        for key in tqdm(sorted(moments), desc="token bases", leave=False):
            found = token_bases(moments.pop(key), config.icsm.tokens_fragile_fraction, config.icsm.tokens_plastic_fraction)
            bases.update({f"{key}.{kind}": tensor for kind, tensor in found.items()})
    return bases
