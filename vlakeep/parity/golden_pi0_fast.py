"""Golden data of pi0-FAST: what lerobot's own classes computed on a tiny model, against vlakeep/pi0_fast/.

The folder is a checkpoint in lerobot's format with its sizes beside it, and golden.npz; its README says how it was made. Whatever sizes,
cameras and texts it has are read from it. Compared at columns that are no padding: what stands there means nothing.

Axes: B rows, L language columns, A action columns, S sequence, D hidden, V vocabulary.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import torch

from vlakeep.core.config import BackboneConfig
from vlakeep.data.sample import Row, Sample
from vlakeep.models.adapters import attach_lora, load_adapter_state
from vlakeep.models.base import Backbone
from vlakeep.models.load import make_backbone
from vlakeep.parity.golden import difference
from vlakeep.pi0_fast.backbone import allowed, positions
from vlakeep.pi0_fast.codec import FastCodec
from vlakeep.probe.masks import mask_from_prompt

HIDDEN, LOGITS, LOSS, GRADIENT = 5e-5, 5e-5, 2e-5, 1e-4  # of the README


def golden_samples(folder: Path, data: Dict[str, np.ndarray]) -> List[Sample]:
    """The raw pictures with the normalised states and actions; the camera that is missing is left out."""
    text = json.loads((folder / "text.json").read_text())
    names = [name for name in text["cameras"] if f"image_{name}" in data]
    return [Sample(None, task, data["norm_action"][i], cameras={name: data[f"image_{name}"][i] for name in names},
                   state=data["norm_state"][i]) for i, task in enumerate(text["tasks"])]


def _exact(name: str, ours, official, note: str = "") -> Row:
    """Discrete values: the deviation counts those that differ."""
    ours, official = np.asarray(ours), np.asarray(official)
    return Row(name, float("inf") if ours.shape != official.shape else float((ours != official).sum()), 0, note)


class _Golden:
    def __init__(self, folder: Path):
        self.folder = Path(folder)
        with np.load(self.folder / "golden.npz", allow_pickle=False) as found:
            self.data = {name: found[name] for name in found.files}
        self.samples = golden_samples(self.folder, self.data)
        self.backbone: Any = self.make()
        self.batch = self.backbone.processor.encode_batch(self.samples)

    def make(self, **settings) -> Any:
        return make_backbone(BackboneConfig(checkpoint=str(self.folder), **settings))

    def columns(self, per_picture: int) -> List[np.ndarray]:
        """Per row the columns of lerobot's padded sequence that are no padding, in order: ours are the same without the gaps."""
        data = self.data
        pictures = np.repeat(data["image_masks"].astype(bool), per_picture, axis=1)
        return [np.flatnonzero(np.r_[p, m, a]) for p, m, a in zip(pictures, data["language_mask"], data["action_token_mask"])]


def _inputs(golden: _Golden) -> List[Row]:
    data, batch, processor = golden.data, golden.batch, golden.backbone.processor
    text = json.loads((golden.folder / "text.json").read_text())
    ids = [row[mask].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask)]
    wanted = [np.r_[row[m], actions[a]].tolist() for row, m, actions, a in zip(
        data["language_tokens"], data["language_mask"], data["action_tokens"], data["action_token_mask"])]
    kept = [i for i in range(data["image_masks"].shape[1]) if data["image_masks"][:, i].any()]
    pictures = max(difference(batch.pixel_values[:, at].numpy(), data[f"model_image_{i}"]) for at, i in enumerate(kept))
    mask_BL = mask_from_prompt(processor.encode_prompts(golden.samples), golden.samples, processor).numpy()
    instruction = [_cut(row, size) for row, size in zip(mask_BL, data["language_mask"].sum(1))]
    expected = [row[m] for row, m in zip(data["instruction_mask"], data["language_mask"])]
    return [
        Row("prompts that differ", float(sum(processor.prompt_text(s) != p for s, p in zip(golden.samples, text["prompts"]))), 0),
        Row("rows of tokens that differ", float(sum(a != b for a, b in zip(ids, wanted))), 0),
        Row("pictures", pictures, 0),
        Row("instruction masks that differ", float(sum(not np.array_equal(a, b) for a, b in zip(instruction, expected))), 0),
        Row("labels that differ", float(sum(
            row[row != -100].tolist() != actions[a][1:].tolist()
            for row, actions, a in zip(batch.labels, data["action_tokens"], data["action_token_mask"]))), 0)]


def _cut(row: np.ndarray, size: int) -> np.ndarray:
    return row[:int(size)]


def _forward(golden: _Golden) -> List[Row]:
    data, backbone, batch = golden.data, golden.backbone, golden.batch
    prefix = backbone.embed(batch)
    states = backbone.hidden_states(batch)
    normed_BSD = backbone.norm(states[-1])
    per_picture = int(data["num_image_tokens"]) // data["image_masks"].shape[1]
    theirs = golden.columns(per_picture)
    ours = [np.flatnonzero(row.numpy()) for row in prefix.attention_mask_BS]
    bits = np.unpackbits(data["attention_bits"], axis=-1)[..., :data["pad_masks"].shape[1]].astype(bool)
    seen_BSK = (allowed(prefix)[:, 0] & prefix.attention_mask_BS[:, :, None]).numpy()
    pairs = list(zip(range(len(ours)), ours, theirs))

    def most(mine, official):
        return max(difference(mine[b][at].numpy(), official[b][there]) for b, at, there in pairs)

    masks = sum(int((seen_BSK[b][np.ix_(at, at)] != bits[b][np.ix_(there, there)]).sum()) for b, at, there in pairs)
    place = positions(prefix)
    logits_BAV = backbone.logits(normed_BSD)
    answer = max(difference(logits_BAV[b][at[-n:]].numpy(), data["logits_action_columns"][b][:n])
                 for (b, at, _), n in zip(pairs, data["action_token_mask"].sum(1).astype(int)))
    prompts = backbone.hidden_states(backbone.processor.encode_prompts(golden.samples))[-1]
    lengths = [len(at) - int(n) for at, n in zip(ours, data["action_token_mask"].sum(1))]
    alone = max(difference(prompts[b][at[:n]].numpy(), data["prompt_hidden_last"][b][there[:n]])
                for (b, at, there), n in zip(pairs, lengths))
    return [
        Row("pairs that attend and should not, or the other way", float(masks), 0),
        Row("positions", float(sum(int((place[b][at].numpy() != data["position_ids"][b][there]).sum()) for b, at, there in pairs)), 0),
        Row("embeddings", most(states[0], data["embeddings"]), 1e-5),
        Row("hidden states", max(most(mine, official) for mine, official in zip(states[1:], data["hidden_states"])), HIDDEN),
        Row("hidden states after the last norm", most(normed_BSD, data["hidden_normed"]), HIDDEN),
        Row("logits of the action columns", answer, LOGITS),
        Row("hidden states of the prompt alone", alone, HIDDEN)]


def _losses(golden: _Golden) -> List[Row]:
    data, backbone, batch = golden.data, golden.backbone, golden.batch
    first = next(iter(golden.samples[0].cameras))
    alone = [replace(one, cameras={first: one.cameras[first]}) for one in golden.samples]
    openpi = golden.make(layout="openpi")
    rows = [openpi.processor.encode_batch([one]) for one in golden.samples]
    ids = [row.input_ids[0].tolist() for row in rows]
    wanted = [row[:n].tolist() for row, n in zip(data["openpi_tokens"], data["openpi_lengths"])]
    each = [float(openpi(row).loss) for row in rows]
    together = float(openpi(openpi.processor.encode_batch(golden.samples)).loss)
    half = golden.make(dtype="bfloat16")
    means = float(np.mean([float(backbone(backbone.processor.encode_batch([one])).loss) for one in golden.samples]))
    return [
        Row("loss", abs(float(backbone(batch).loss) - float(data["loss"])), LOSS),
        Row("loss by the base class", abs(float(Backbone.loss(backbone, batch).loss) - float(data["loss"])), LOSS),
        Row("loss with one camera", abs(float(backbone(backbone.processor.encode_batch(alone)).loss) - float(data["loss_one_camera"])),
            LOSS),
        Row("mean of the rows' losses", abs(means - float(data["loss_mean_of_row_means"])), LOSS),
        Row("openpi: rows of tokens that differ", float(sum(a != b for a, b in zip(ids, wanted))), 0),
        Row("openpi: loss of each row", difference(np.array(each), data["openpi_row_losses"]), LOSS),
        Row("openpi: loss of the batch", abs(together - float(data["openpi_row_losses"].mean())), LOSS, "the mean of the rows'"),
        Row("loss in bfloat16", abs(float(half(batch).loss) - float(data["loss_bfloat16_float32_rope"])), 1e-2,
            f"float32 rotary frequencies; with rounded ones lerobot has {float(data['loss_bfloat16']):.3f}")]


def _answers(golden: _Golden) -> List[Row]:
    data, backbone, processor = golden.data, golden.backbone, golden.backbone.processor
    prompts, steps = processor.encode_prompts(golden.samples), data["generated"].shape[1]
    ids, _ = backbone.generate(prompts, steps, stop_at_eos=False, bos_in_prefix=True)
    head = backbone.network.paligemma.lm_head.weight
    before = head[processor.words.bar].clone()
    head[processor.words.bar] = torch.from_numpy(data["bar_row_of_lm_head"])
    with_bar, _ = backbone.generate(prompts, data["generated_with_bar"].shape[1], bos_in_prefix=True)
    head[processor.words.bar] = before
    # lerobot lets ended rows go on until all have ended; ours hold padding, so that only what stands before the bar is compared.
    wanted = np.stack([_until(row, processor.words.bar, processor.pad_token_id) for row in data["generated_with_bar"]])
    return [
        _exact("generated ids, BOS in the prefix", ids.numpy(), data["generated"]),
        _exact("generated ids up to the bar", with_bar.numpy(), wanted),
        Row("first logits of the consistent generation", difference(backbone.next_logits(prompts).numpy(),
                                                                    data["logits_action_columns"][:, 0]),
            LOGITS, "BOS behind the prefix, as trained")]


def _until(row: np.ndarray, end: int, pad: int) -> np.ndarray:
    ended = np.cumsum(row == end) - (row == end) > 0
    return np.where(ended, pad, row)


def _codec(golden: _Golden) -> List[Row]:
    data, processor = golden.data, golden.backbone.processor
    codec: FastCodec = processor.codec
    codes = [codec.encode(chunk) for chunk in data["norm_action"]]
    wanted = [row[row >= 0].tolist() for row in data["fast_ids"]]
    decoded = processor.decode_actions(data["action_tokens"])
    return [
        Row("FAST codes: rows that differ", float(sum(a != b for a, b in zip(codes, wanted))), 0),
        Row("decoded actions", difference(decoded, data["roundtrip_actions"]), 1e-6),
        Row("decoded actions in the data's units", difference(golden.backbone.unnormalise(decoded), data["roundtrip_unnormalised"]), 1e-6),
        Row("actions decoded from other ids", difference(processor.decode_actions(data["generated"]), data["garbage_actions"]), 1e-6)]


def _own_gradients(golden: _Golden, losses: List[Row]) -> List[Row]:
    data = golden.data
    backbone = golden.make()
    wanted = json.loads((golden.folder / "grad_norms.json").read_text())
    network = backbone.network
    network.paligemma.lm_head.weight.requires_grad_(True)
    kept: List[torch.Tensor] = []
    prefix = backbone.embed(golden.batch)
    backbone.pi0.run_layers(prefix.hidden_BSD, allowed(prefix), positions(prefix), each=kept.append)
    for hidden_BSD in kept:
        hidden_BSD.retain_grad()
    last = kept[-1]
    labels = golden.batch.labels
    columns = backbone.text_columns(prefix, labels.shape[1])[:, 1:] - 1
    logits = backbone.logits(backbone.norm(last[torch.arange(len(labels))[:, None], columns]))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100).backward()
    norms = {name: float(p.grad.norm()) for name, p in network.named_parameters() if p.grad is not None}
    relative = max(abs(norms.get(name, 0.0) - value) / max(abs(value), 1e-3) for name, value in wanted.items())
    per_layer = np.array([[float(row.norm()) for row in h.grad] for h in kept])
    theirs = golden.columns(int(data["num_image_tokens"]) // data["image_masks"].shape[1])
    full = max(difference(kept[-2].grad[b][prefix.attention_mask_BS[b]].numpy(), data["hidden_grad_last_but_one"][b][there])
               for b, there in enumerate(theirs))
    return [Row("gradient norms of the weights", relative, GRADIENT, "relative"),
            Row("gradient norms of the layers' outputs",
                float(np.abs(per_layer / np.maximum(data["hidden_grad_norms"], 1e-9) - 1).max()), GRADIENT, "relative"),
            Row("gradient of the last but one layer's output", full, 1e-5),
            Row("gradient of the last layer's output at the prefix", float((last.grad * prefix.both_ways_BS[..., None]).abs().max()), 0)]


def _lora(golden: _Golden) -> List[Row]:
    from safetensors.torch import load_file

    data, backbone = golden.data, golden.make()
    sizes = json.loads((golden.folder / "sizes.json").read_text())["lora"]
    state = load_file(str(golden.folder / "lora.safetensors"))
    targets = sorted({name[len("base_model.model."):].rpartition(".lora_")[0] for name in state})
    attach_lora(backbone, targets, sizes["r"], sizes["alpha"])
    load_adapter_state(backbone, state)
    wanted = json.loads((golden.folder / "lora_grad_norms.json").read_text())
    parameters = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01)
    losses, relative = [], 0.0
    for step in range(len(data["lora_adamw_losses"])):
        optimizer.zero_grad()
        loss = backbone(golden.batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
        if step == 0:
            ours = {_plain(name): float(p.grad.norm()) for name, p in parameters.items()}
            relative = max(abs(ours[_plain(name)] - value) / max(abs(value), 1e-3) for name, value in wanted.items())
        optimizer.step()
    return [Row("LoRA: loss", abs(losses[0] - float(data["lora_loss"])), LOSS),
            Row("LoRA: gradient norms", relative, GRADIENT, "relative"),
            Row("LoRA: losses of AdamW steps", difference(np.array(losses), data["lora_adamw_losses"]), LOSS)]


def _plain(name: str) -> str:
    """A LoRA parameter's name from `model.paligemma_with_expert` on, without the adapter's."""
    return name[name.index("paligemma_with_expert"):].replace(".default", "")


def verify_pi0_fast(folder: Path) -> List[Row]:
    """All of golden.npz; about two seconds."""
    golden = _Golden(Path(folder))
    with torch.no_grad():
        rows = _inputs(golden) + _forward(golden) + _losses(golden) + _answers(golden) + _codec(golden)
    return rows + _own_gradients(golden, rows) + _lora(golden)
