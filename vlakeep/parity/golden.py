"""Golden checks of the model room: what the official OpenVLA code computed against what this implementation computes.

Weights follow from a formula over their names (golden_weights.py), so no weights are stored. A golden model folder holds
config.json, state_dict.json and golden.npz, and may hold grad_norms.json, grad_hook_norms.json and lora.json.
Tolerances are those of float32 sums taken in another order: vision 1e-5, hidden states 5e-5, logits 2e-4, loss 1e-4, gradients
1e-3 of the largest.

Axes: B batch, L text, P patches, S sequence, D hidden, V vocabulary, C chosen vocabulary columns.
"""

import json
from pathlib import Path
from typing import Dict, List

import numpy as np
import torch
from torch.nn import functional as F

from vlakeep.data.sample import IGNORE_INDEX, Batch, Row
from vlakeep.models.adapters import ADAPTER, attach_lora, merged_state
from vlakeep.openvla.backbone import OpenVLABackbone
from vlakeep.openvla.model import OpenVLA, VisionBackbone, parameters_on_meta
from vlakeep.parity.golden_weights import (
    EMPTY_TOKEN,
    fill,
    formula_tensor,
    golden_backbone,
    golden_config,
    named_shapes,
    uniform,
)

UNCHECKED = float("inf")  # tolerance of a row that says what could not be checked


def unchecked(name: str, why: str) -> Row:
    return Row(name, 0.0, UNCHECKED, why)


def difference(a, b) -> float:
    """Largest absolute difference, NaN counted as inf; inf when the shapes differ."""
    a, b = (np.asarray(x.detach().cpu() if torch.is_tensor(x) else x, dtype=np.float64) for x in (a, b))
    if a.shape != b.shape:
        return float("inf")
    largest = float(np.abs(a - b).max()) if a.size else 0.0
    return largest if largest == largest else float("inf")


def _rows_of_keys(shapes: Dict[str, list], model: torch.nn.Module) -> Row:
    ours = {name: list(t.shape) for name, t in model.state_dict().items()}
    wrong = [n for n in ours.keys() | shapes.keys() if ours.get(n) != shapes.get(n)]
    order = list(ours) != list(shapes)
    return Row(
        "state dict, keys and shapes that differ",
        len(wrong),
        0,
        f"{len(shapes)} keys"
        + (f"; {sorted(wrong)[:3]}" if wrong else "")
        + ("; in another order" if order and not wrong else ""),
    )


def verify_shapes(folder) -> List[Row]:
    """Rows for a folder with config.json and shapes alone: every key of the model, and every LoRA tensor."""
    folder = Path(folder)
    tables = {path: named_shapes(json.loads(path.read_text())) for path in sorted(folder.glob("*.json")) if path.name not in
              ("config.json", "generation_config.json")}
    weights = {path: t for path, t in tables.items() if "language_model.lm_head.weight" in t}
    adapters = {path: t for path, t in tables.items() if any(".lora_A" in name for name in t)}
    if not weights:
        raise ValueError(f"no table in {folder} names language_model.lm_head.weight, so there is nothing to compare")
    shapes = next(iter(weights.values()))
    with parameters_on_meta():
        model = OpenVLA(golden_config(folder, shapes))
    rows, state = [_rows_of_keys(shapes, model)], model.state_dict()
    for table in adapters.values():
        wrong = []
        for name, shape in table.items():
            inner = name.replace("base_model.model.", "", 1)
            weight = state.get(inner.split(".lora_")[0] + ".weight")
            rank = shape[0] if ".lora_A" in name else shape[1]
            need = (
                None
                if weight is None
                else [rank, *weight.shape[1:]]
                if ".lora_A" in name
                else [weight.shape[0], rank] + [1] * (weight.ndim - 2)
            )
            if shape != need:
                wrong.append(name)
        rows.append(
            Row("LoRA tensors, shapes that differ", len(wrong), 0, f"{len(table)} tensors" + (f"; {wrong[:2]}" if wrong else ""))
        )
    return rows


# Checks of one model

class _Golden:
    """golden.npz that remembers which entries were looked at."""

    def __init__(self, folder: Path):
        with np.load(folder / "golden.npz", allow_pickle=False) as data:
            self.values = {key: data[key] for key in data.files}
        self.seen = set()

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __getitem__(self, key: str) -> np.ndarray:
        self.seen.add(key)
        return self.values[key]

    def batch(self) -> Batch:
        ids = torch.from_numpy(self["input_ids"])
        return Batch(ids, torch.from_numpy(self["attention_mask"]).bool(), torch.from_numpy(self["labels"]),
                     torch.from_numpy(self["pixel_values"]), [""] * len(ids))


def verify_model(folder) -> List[Row]:
    """Rows for a golden model folder of any size, fused or single. Raises ValueError for files that do not belong together."""
    folder = Path(folder)
    golden = _Golden(folder)
    table = json.loads((folder / "state_dict.json").read_text())
    backbone = golden_backbone(folder)
    state = backbone.openvla.state_dict()
    rows = [_rows_of_keys(named_shapes(table), backbone.openvla)]
    if isinstance(table, list) and table and "sum" in table[0]:
        sums = [(state[e["name"]].double(), e) for e in table if e["name"] in state]
        rows.append(
            Row(
                "formula weights, sum of values",
                max(abs(t.sum().item() - e["sum"]) / max(1.0, e["abs_sum"]) for t, e in sums),
                1e-9,
            )
        )
        rows.append(Row("formula weights, first and last value", max(
            max(abs(t.flatten()[0].item() - e["first"]), abs(t.flatten()[-1].item() - e["last"])) for t, e in sums), 0))
    batch = golden.batch()
    rows += _forward(backbone, golden, batch, folder)
    rows += _hooked_gradients(backbone, batch, folder)
    rows += _generation(backbone, golden, batch)
    if "full_finetune_losses" in golden:
        rows.append(_losses("full fine-tuning, losses of 4 steps", backbone, batch, golden["full_finetune_losses"]))
    if (folder / "lora.json").is_file():
        rows += _lora(folder, golden, batch)
    left = sorted(set(golden.values) - golden.seen)
    return rows + ([unchecked("golden.npz: " + ", ".join(left), "no check knows these entries")] if left else [])


def _largest_ratio(ours, official) -> float:
    return difference(ours, official) / max(float(np.abs(official).max()), 1e-30)


def _forward(backbone: OpenVLABackbone, golden: _Golden, batch: Batch, folder: Path) -> List[Row]:
    model, rows = backbone.openvla, []
    if "vision_patches" in golden:
        rows.append(Row("vision patches", difference(model.vision_backbone(batch.pixel_values), golden["vision_patches"]), 1e-5))
    if "featurizer_patch_embed" in golden:
        first = model.vision_backbone.featurizer.patch_embed(batch.pixel_values[:, :3])
        rows.append(Row("patch embedding of the first backbone", difference(first, golden["featurizer_patch_embed"]), 1e-5))
    if "projector_features" in golden:
        rows.append(
            Row(
                "projector",
                difference(model.projector(model.vision_backbone(batch.pixel_values)), golden["projector_features"]),
                1e-5,
            )
        )
    backbone.zero_grad(set_to_none=True)
    states = backbone.hidden_states(batch)
    for state in states:
        state.retain_grad()
    patches, labels = backbone.num_patches, batch.labels[:, 1:]
    logits = backbone.logits(states[-1])
    loss = F.cross_entropy(logits[:, patches:-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    loss.backward()
    stacked = torch.stack([s.detach() for s in states])
    rows.append(
        Row(f"hidden states, embeddings and {backbone.num_layers} layers", difference(stacked, golden["hidden_states"]), 5e-5)
    )
    if "hidden_state_grads" in golden:
        official = golden["hidden_state_grads"]
        rows.append(
            Row(
                "gradients of the hidden states",
                max(_largest_ratio(s.grad, g) for s, g in zip(states, official)),
                1e-3,
                "share of the largest",
            )
        )
    logits = logits.detach()
    if "logits_subset" in golden:
        rows.append(
            Row(
                "logits, chosen columns",
                difference(logits[..., torch.from_numpy(golden["logits_cols"])], golden["logits_subset"]),
                2e-4,
            )
        )
    for key, value in (("logits_max", lambda: logits.amax(-1)), ("logits_logsumexp", lambda: logits.double().logsumexp(-1)),
                       ("logits_full_sample0", lambda: logits[0, torch.from_numpy(golden["logits_full_sample0_pos"])])):
        if key in golden:
            rows.append(Row(key.replace("_", " "), difference(value(), golden[key]), 2e-4))
    if "logits_argmax" in golden:
        rows.append(
            Row("logits, positions with another argmax", int((logits.argmax(-1).numpy() != golden["logits_argmax"]).sum()), 0)
        )
    out = backbone(batch)
    rows.append(Row("loss", abs(out.loss.item() - float(golden["loss"])), 1e-4))
    rows += _finetune_metrics(backbone, golden, logits[:, patches:-1].argmax(-1), labels)
    if "text_only_loss" in golden:
        text = Batch(batch.input_ids, batch.attention_mask, batch.labels, None, batch.dataset_names)
        rows.append(Row("loss without an image", abs(backbone(text).loss.item() - float(golden["text_only_loss"])), 1e-4))
    if (folder / "grad_norms.json").is_file():
        rows += _gradient_rows("gradients of the parameters", backbone, json.loads((folder / "grad_norms.json").read_text()))
    return rows


def _finetune_metrics(backbone: OpenVLABackbone, golden: _Golden, predicted: torch.Tensor, labels: torch.Tensor) -> List[Row]:
    """What the official finetune.py:270-285 logs."""
    if "finetune_action_preds" not in golden:
        return []
    tokenizer = backbone.processor.action_tokenizer
    mask = labels > tokenizer.action_token_begin_idx
    error = np.abs(tokenizer.decode(predicted[mask].numpy()) - tokenizer.decode(labels[mask].numpy())).mean()
    accuracy = (predicted == labels)[mask].float().mean().item()
    return [
        Row(
            "fine-tuning metrics, predicted tokens that differ",
            int((predicted.numpy() != golden["finetune_action_preds"]).sum()),
            0,
        ),
        Row("fine-tuning metrics, action mask", int((mask.numpy() != golden["finetune_action_mask"]).sum()), 0),
        Row(
            "fine-tuning metrics, accuracy and L1",
            max(abs(accuracy - float(golden["finetune_action_accuracy"])), abs(error - float(golden["finetune_l1"]))),
            1e-6,
        ),
    ]


def _gradient_rows(name: str, backbone: OpenVLABackbone, official: Dict[str, float]) -> List[Row]:
    ours = {n: None if p.grad is None else p.grad.double().norm().item() for n, p in backbone.openvla.named_parameters()}
    absent = [n for n in official if (ours.get(n) is None) != (official[n] is None)]
    largest = max(v for v in official.values() if v is not None)
    # Parameters whose gradient is zero but for rounding (the bias of k in an attention, for one) have no relative error.
    worst = max(
        (abs(ours[n] - v) / max(v, 1e-6 * largest) for n, v in official.items() if v is not None and ours.get(n) is not None),
        default=np.inf,
    )
    return [Row(f"{name}, relative error of the norms", worst, 1e-3, f"{len(official)} parameters"),
            Row(f"{name}, parameters with and without one", len(absent), 0)]


def _hooked_gradients(backbone: OpenVLABackbone, batch: Batch, folder: Path) -> List[Row]:
    """Gradient surgery at a decoder layer's output, as every residual-stream method does it."""
    file = folder / "grad_hook_norms.json"
    if not file.is_file():
        return []
    golden, rows = json.loads(file.read_text()), []
    patches = golden.get("num_patches", backbone.num_patches)

    def zero_patches(grad_BSD):
        grad_BSD = grad_BSD.clone()
        grad_BSD[:, 1:1 + patches] = 0
        return grad_BSD

    edits = {"zero_patch_positions": zero_patches, "scale_all_by_0.5": lambda grad: grad * 0.5, "none": lambda grad: grad}
    for mode, official in golden.items():
        if not isinstance(official, dict):
            continue
        if mode not in edits:
            rows.append(unchecked(f"hook on layer {golden['layer']}, {mode}", "unknown edit"))
            continue

        def hook(module, args, output, edit=edits[mode]):
            (output[0] if isinstance(output, tuple) else output).register_hook(edit)

        handle = backbone.decoder_layers[golden["layer"]].register_forward_hook(hook)
        backbone.zero_grad(set_to_none=True)
        backbone(batch).loss.backward()
        handle.remove()
        rows += _gradient_rows(f"hook on layer {golden['layer']}, {mode}", backbone, official)
    return rows


def _generation(backbone: OpenVLABackbone, golden: _Golden, batch: Batch) -> List[Row]:
    rows, prompts = [], []
    numbers = sorted(
        int(key.split("_")[1]) for key in golden.values if key.startswith("generate_") and key.endswith("_input_ids")
    )
    for i in numbers:
        given = golden[f"generate_{i}_input_ids"]
        official = golden[f"generate_{i}_sequences"]
        ids = given if given[0, -1] == EMPTY_TOKEN else np.concatenate([given, [[EMPTY_TOKEN]]], axis=1)
        prompt = prompt_batch(torch.from_numpy(ids), batch.pixel_values[i:i + 1])
        count = official.shape[1] - ids.shape[1]
        new, _ = backbone.generate(prompt, count, stop_at_eos=True)
        prompts.append((ids[0], official[0, ids.shape[1]:], i))
        rows.append(
            Row(f"generation {i}, tokens that differ", int((np.concatenate([ids, new.numpy()], axis=1) != official).sum()), 0)
        )
        with torch.no_grad():  # the scores of each step, by one pass over the official sequence
            whole = prompt_batch(torch.from_numpy(official), batch.pixel_values[i:i + 1])
            steps = backbone.logits(backbone.run_layers(backbone.embed(whole)))[0, -count - 1:-1]
        if f"generate_{i}_scores_subset" in golden:
            rows.append(Row(f"generation {i}, scores", difference(steps[:, torch.from_numpy(golden["logits_cols"])],
                                                                  golden[f"generate_{i}_scores_subset"]), 2e-4))
        if f"generate_{i}_top2_gap" in golden:
            best = steps.topk(2).values
            rows.append(
                Row(
                    f"generation {i}, gap to the second best",
                    difference(best[:, 0] - best[:, 1], golden[f"generate_{i}_top2_gap"]),
                    2e-4,
                )
            )
        for key in backbone.norm_stats:
            if f"predict_action_{i}_{key}" in golden:
                rows.append(
                    Row(
                        f"predicted action {i}, {key}",
                        difference(backbone.predict_batch(prompt, key)[0], golden[f"predict_action_{i}_{key}"]),
                        1e-9,
                    )
                )
    if len(prompts) > 1 and len({len(new) for _, new, _ in prompts}) == 1:
        longest = max(len(ids) for ids, _, _ in prompts)
        padded = torch.full((len(prompts), longest), backbone.processor.pad_token_id)
        for row, (ids, _, _) in enumerate(prompts):
            padded[row, :len(ids)] = torch.from_numpy(ids)
        both = prompt_batch(padded, batch.pixel_values[[i for _, _, i in prompts]], padded != backbone.processor.pad_token_id)
        new, _ = backbone.generate(both, len(prompts[0][1]), stop_at_eos=True)
        rows.append(
            Row(
                "generation of all prompts in one batch, tokens that differ",
                int((new.numpy() != np.stack([n for _, n, _ in prompts])).sum()),
                0,
            )
        )
    return rows


def prompt_batch(ids: torch.Tensor, pixel_values: torch.Tensor, mask: torch.Tensor = None) -> Batch:
    return Batch(
        ids,
        torch.ones_like(ids, dtype=torch.bool) if mask is None else mask,
        torch.full_like(ids, IGNORE_INDEX),
        pixel_values,
        [""] * len(ids),
    )


def _losses(name: str, backbone: OpenVLABackbone, batch: Batch, official: np.ndarray) -> Row:
    """AdamW with the official settings on one batch; changes the weights of `backbone`."""
    backbone.zero_grad(set_to_none=True)
    optimizer = torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad], lr=5e-4)
    losses = []
    for _ in official:
        loss = backbone(batch).loss
        losses.append(loss.item())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return Row(name, difference(losses, official), 1e-3)


def _lora(folder: Path, golden: _Golden, batch: Batch) -> List[Row]:
    table = json.loads((folder / "lora.json").read_text())
    peft = table["peft_config"]
    backbone = golden_backbone(folder)
    attach_lora(backbone, table["targets"], peft["r"], peft["lora_alpha"], peft["lora_dropout"])
    ours = {name: p for name, p in backbone.model.named_parameters() if p.requires_grad}
    official = named_shapes(table["params"])
    wrong = [n for n in ours.keys() | official.keys() if list(ours[n].shape if n in ours else ()) != official.get(n)]
    rows = [Row("LoRA, parameters that differ", len(wrong), 0, f"{len(official)} tensors, {table['trainable']:,} values"),
            Row("LoRA, trainable and total parameters", abs(sum(p.numel() for p in ours.values()) - table["trainable"])
                + abs(sum(p.numel() for p in backbone.model.parameters()) - table["total"]), 0)]
    with torch.no_grad():
        for name, p in ours.items():
            p.copy_(formula_tensor(name.replace(f".{ADAPTER}", "").replace(".weight", ""), p.shape))
        rows.append(Row("LoRA, loss", abs(backbone(batch).loss.item() - float(golden["lora_loss0"])), 1e-4))
        rows.append(
            Row("LoRA, last hidden states", difference(backbone.hidden_states(batch)[-1], golden["lora_hidden_last"]), 5e-5)
        )
    rows.append(_losses("LoRA, losses of 4 steps", backbone, batch, golden["lora_losses"]))
    norms = table.get("norm_after_4_steps", {})
    rows.append(
        Row(
            "LoRA, norms after 4 steps",
            max((abs(ours[n].detach().double().norm().item() - v) / v for n, v in norms.items() if n in ours), default=0.0),
            1e-3,
            "relative",
        )
    )
    with torch.no_grad():
        merged = golden_backbone(folder, merged_state(backbone))
        rows.append(Row("LoRA, loss after merging", abs(merged(batch).loss.item() - float(golden["lora_merged_loss"])), 1e-3))
    return rows


def verify_vision7b(folder) -> List[Row]:
    """Rows for the vision tower of OpenVLA-7B at its real size (3 GB of formula weights, minutes on a CPU)."""
    golden = _Golden(Path(folder))
    ids = ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]
    with parameters_on_meta():
        tower = VisionBackbone(ids, [224, 224], [None, None], fused=True)
    tower.load_state_dict(fill(tower, "vision_backbone."), strict=True, assign=True)
    pixels = torch.from_numpy(np.float32(1.2 * uniform("pixels7b", 6 * 224 * 224)).reshape(1, 6, 224, 224))
    with torch.inference_mode():
        features = tower.eval()(pixels)[0].double()
    # The entries are told apart by their shapes. A few channels of a ViT are hundreds of times larger than the others, so an
    # error is given as a share of the largest value, not as a number.
    parts = {tuple(features[::16].shape): ("features of every 16th patch", features[::16]),
             (features.shape[0],): ("norm of every patch", features.norm(dim=1)),
             (features.shape[1],): ("sum of every channel", features.sum(0)),
             tuple(pixels.squeeze().shape): ("pixels", pixels)}
    rows = []
    for key, value in golden.values.items():
        name, ours = parts.get(value.squeeze().shape, (None, None))
        if name is None:
            rows.append(unchecked(f"vision tower at 7B size, {key}", f"no check knows an entry of shape {list(value.shape)}"))
        else:
            share = _largest_ratio(ours, value.reshape(ours.shape))
            rows.append(Row(f"vision tower at 7B size, {name}", share, 2e-5, f"{key}, share of the largest"))
    return rows
