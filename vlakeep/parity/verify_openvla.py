"""Stage `vlakeep verify-openvla`: the official code of the user's checkout and vlakeep's own, side by side on the same weights and data.

    vlakeep verify-openvla --openvla_dir DIR [--checkpoint DIR] [--tokenizer DIR] [--dtype float32] [--device cpu]

Runs in the official environment (transformers 4.40.1, timm 0.9.x, peft). `--checkpoint` is a folder in the official format; a golden folder
(config.json and state_dict.json without weights) is filled by its formula; without it the small model that ships with vlakeep is taken.
Prints a table of the largest deviations and exits non-zero past a tolerance. Nothing that lies in the checkpoint is run.
"""

import json
import sys
from pathlib import Path
from typing import List

import numpy as np
import torch
from PIL import Image

from vlakeep.core.config import BackboneConfig
from vlakeep.core.official_code import load_official, versions
from vlakeep.core.options import read
from vlakeep.core.parallel import pick_device
from vlakeep.core.storage import Storage, find_checkpoint
from vlakeep.data.sample import Batch, Row, Sample
from vlakeep.models.adapters import all_linear, attach_lora
from vlakeep.models.load import DTYPES, make_backbone
from vlakeep.openvla.backbone import OpenVLABackbone
from vlakeep.openvla.format import complete_config
from vlakeep.openvla.model import OpenVLA, parameters_on_meta
from vlakeep.openvla.official import official_model
from vlakeep.openvla.processor import PREPROCESSOR_FILE, ImageProcessor, Processor, load_tokenizer
from vlakeep.openvla.prompts import action_prompt, encode, encode_batch, encode_prompts, prompt_ids
from vlakeep.openvla.workload import SEVEN_B
from vlakeep.parity.golden import UNCHECKED, difference, unchecked
from vlakeep.parity.golden_weights import EMPTY_TOKEN, golden_backbone
from vlakeep.parity.stages import OPENVLA

INSTRUCTIONS = ["pick up the red block", "Put the bowl ON the plate", "open the top drawer and put the bowl inside"]
# float32 sums in another order; bfloat16 carries eight bits, and a deviation grows through the layers.
TOLERANCES = {"float32": {"features": 1e-5, "hidden": 5e-5, "logits": 2e-4, "loss": 1e-4, "gradient": 1e-3, "weights": 1e-2},
              "bfloat16": {"features": 0.1, "hidden": 0.25, "logits": 0.5, "loss": 2e-2, "gradient": 0.1, "weights": 0.5}}


class Pair:
    """The same weights in both implementations, and a processor. `processor` is None where no tokenizer is at hand."""

    def __init__(self, code, checkpoint: str, cache: Path, tokenizer, dtype: str, device: torch.device):
        folder = find_checkpoint(checkpoint, cache)
        self.code, self.dtype, self.device, self.folder = code, DTYPES[dtype], device, folder
        golden = (folder / "state_dict.json").is_file() and not (folder / "model.safetensors").is_file()
        if golden:
            state = golden_backbone(folder).openvla.state_dict()  # only weights are rounded: rotary tables stay float32 in both
            self.native = golden_backbone(folder, {name: tensor.to(self.dtype) for name, tensor in state.items()}).to(device).eval()
            self.processor = _golden_processor(self.native, tokenizer)
            if self.processor is not None:
                self.native.processor = self.processor
        else:
            self.native = make_backbone(BackboneConfig(checkpoint=str(folder), dtype=dtype), device)
            self.processor = self.native.processor
        self.official = self.fresh_official()

    def fresh_official(self):
        state = {name: tensor.detach().clone() for name, tensor in self.native.openvla.state_dict().items() if ".lora_" not in name}
        state = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}
        return official_model(self.code, self.native.config, self.dtype, "sdpa", state).to(self.device)

    def fresh_native(self) -> OpenVLABackbone:
        with parameters_on_meta():
            model = OpenVLA(self.native.config)
        state = {name: tensor.detach().clone() for name, tensor in self.native.openvla.state_dict().items()}
        model.load_state_dict(state, strict=True, assign=True)
        return OpenVLABackbone(model.to(self.device), self.native.processor, self.native.norm_stats, self.folder).eval()


def _golden_processor(native: OpenVLABackbone, tokenizer):
    """Llama-2's tokenizer with an image processor of the golden model's size; None without a tokenizer folder."""
    if tokenizer is None:
        return None
    side = native.config["image_sizes"][0]
    views = len(native.config["image_sizes"])
    means, stds = [[0.484375, 0.455078125, 0.40625], [0.5] * 3], [[0.228515625, 0.2236328125, 0.224609375], [0.5] * 3]
    image_processor = ImageProcessor([[3, side, side]] * views, means[:views], stds[:views])
    return Processor(load_tokenizer(tokenizer), image_processor, Path(tokenizer))


def check_shapes(code) -> List[Row]:
    """All keys and shapes of OpenVLA-7B, both models built without memory."""
    config = complete_config(SEVEN_B)
    with parameters_on_meta():
        ours = {name: list(t.shape) for name, t in OpenVLA(config).state_dict().items()}
    theirs = {name: list(t.shape) for name, t in official_model(code, config, torch.float32, "sdpa").state_dict().items()}
    wrong = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    values = sum(int(np.prod(shape)) for shape in theirs.values())
    return [Row("7B shapes: keys and shapes that differ", len(wrong), 0, f"{len(theirs)} keys, {values:,} values"
                + (f"; {sorted(wrong)[:3]}" if wrong else ""))]


def pictures(count: int, seed: int = 0) -> List[np.ndarray]:
    """Smooth random pictures of several sizes, so that resizing has something to do."""
    rng = np.random.default_rng(seed)
    sizes = [(224, 224), (256, 256), (480, 640), (64, 64)]
    return [np.asarray(Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize(sizes[i % 4][::-1], Image.BICUBIC))
            for i in range(count)]


def check_text_and_images(pair: Pair) -> List[Row]:
    if pair.processor is None:
        return [unchecked("prompt, ids, labels, collation, pixels", "needs a tokenizer: --tokenizer DIR with Llama-2's files")]
    code, processor, rows = pair.code, pair.processor, []
    tokenizer = processor.tokenizer
    official_pixels = _official_image_processor(pair)
    images = pictures(4)
    ours = torch.cat([processor.image_processor([image]) for image in images])
    theirs = torch.stack([official_pixels(Image.fromarray(image)) for image in images])
    rows.append(Row("pixel values", difference(ours, theirs), 0, f"{len(images)} pictures of {len({i.shape for i in images})} sizes"))
    texts, ids = 0, 0
    for instruction in INSTRUCTIONS:
        builder = code.PurePromptBuilder("openvla")
        builder.add_turn("human", f"What action should the robot take to {instruction.lower()}?")
        texts += builder.get_prompt() != action_prompt(instruction)
        theirs = tokenizer(builder.get_prompt(), add_special_tokens=True).input_ids
        ids += list(theirs) != list(prompt_ids(action_prompt(instruction), tokenizer))
    rows += [Row("prompt text, prompts that differ", texts, 0), Row("prompt ids, prompts that differ", ids, 0)]
    official_tokenizer = code.ActionTokenizer(tokenizer)
    actions = np.random.default_rng(1).uniform(-1.2, 1.2, (2000, 7)).astype(np.float32)
    binned = np.clip(actions, -1, 1)
    theirs = tokenizer.vocab_size - np.digitize(binned, official_tokenizer.bins)
    rows.append(Row("action token ids that differ", int((processor.action_tokenizer.encode(actions) != theirs).sum()), 0, "14,000 values"))
    decoded = official_tokenizer.decode_token_ids_to_actions(theirs)
    rows.append(Row("decoded actions", difference(processor.action_tokenizer.decode(theirs), decoded), 0))
    rows += _check_batches(pair, images, actions, official_pixels)
    return rows


def _official_image_processor(pair: Pair):
    """The official image processor with the sizes, means and strategy of ours."""
    ours = pair.processor.image_processor
    file = (pair.processor.folder or pair.folder) / PREPROCESSOR_FILE
    settings = json.loads(file.read_text()) if file.is_file() else {}
    views = len(ours.input_sizes)
    official = pair.code.PrismaticImageProcessor(
        use_fused_vision_backbone=views == 2, image_resize_strategy=ours.strategy, input_sizes=[tuple(s) for s in ours.input_sizes],
        interpolations=settings.get("interpolations", ["bicubic"] * views)[:views], means=[tuple(m) for m in ours.means],
        stds=[tuple(s) for s in ours.stds])
    return official.apply_transform


def _check_batches(pair: Pair, images, actions, official_pixels) -> List[Row]:
    code, processor = pair.code, pair.processor
    samples = [Sample(image, text, action=np.clip(action, -1, 1), dataset="x")
               for image, text, action in zip(images, INSTRUCTIONS + [INSTRUCTIONS[0]], actions)]
    if code.RLDSBatchTransform is None:
        encoded = [dict(encode(sample, processor)) for sample in samples]
        rows = [unchecked("RLDSBatchTransform: ids and labels", f"the official data code cannot be imported here: {code.why_no_data}")]
    else:
        transform = code.RLDSBatchTransform(code.ActionTokenizer(processor.tokenizer), processor.tokenizer, official_pixels,
                                            code.PurePromptBuilder)
        encoded, wrong = [], 0
        for sample in samples:
            item = {"dataset_name": b"x", "action": sample.action[None], "observation": {"image_primary": sample.image[None]},
                    "task": {"language_instruction": sample.instruction.encode()}}
            theirs, ours = transform(item), encode(sample, processor)
            wrong += list(theirs["input_ids"]) != list(ours["input_ids"]) or list(theirs["labels"]) != list(ours["labels"])
            wrong += difference(theirs["pixel_values"], ours["pixel_values"]) > 0
            encoded.append(theirs)
        rows = [Row("RLDSBatchTransform: samples that differ", wrong, 0, f"{len(samples)} samples")]
    collator = code.PaddedCollatorForActionPrediction(processor.tokenizer.model_max_length, processor.pad_token_id, padding_side="right")
    for item in encoded:
        item["dataset_name"] = b"x"
    collated, batch = collator(encoded), encode_batch(samples, processor)
    worst = max(difference(collated[key], getattr(batch, key)) for key in ("input_ids", "labels", "attention_mask", "pixel_values"))
    return rows + [Row("collated batch: ids, labels, mask, pixels", worst, 0)]


def model_batch(pair: Pair) -> Batch:
    """Three samples of different lengths with labels; formula ids where there is no tokenizer."""
    config = pair.native.config
    vocabulary = config["text_config"]["vocab_size"] - config["pad_to_multiple_of"]
    side = config["image_sizes"][0]
    rng = np.random.default_rng(3)
    if pair.processor is not None:
        samples = [Sample(image, text, action=rng.uniform(-1, 1, 7).astype(np.float32))
                   for image, text in zip(pictures(3, 1), INSTRUCTIONS)]
        return encode_batch(samples, pair.processor)
    lengths = [20, 26, 31]
    ids = torch.full((3, 31), config["pad_token_id"])
    labels = torch.full((3, 31), -100)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.from_numpy(rng.integers(3, vocabulary - 256, length))
        ids[row, 0] = 1
        ids[row, length - 8:length - 1] = torch.from_numpy(rng.integers(vocabulary - 256, vocabulary, 7))
        ids[row, length - 1] = 2
        labels[row, length - 8:length] = ids[row, length - 8:length]
    channels = 3 * len(config["image_sizes"])
    pixels = torch.from_numpy(rng.normal(size=(3, channels, side, side)).astype(np.float32))
    return Batch(ids, ids != config["pad_token_id"], labels, pixels, [""] * 3)


def check_model(pair: Pair, tolerance: dict) -> List[Row]:
    batch, native, official = model_batch(pair).to(pair.device), pair.native, pair.official
    pixels = batch.pixel_values.to(pair.dtype)
    ours_keys = {name: list(t.shape) for name, t in native.openvla.state_dict().items()}
    theirs_keys = {name: list(t.shape) for name, t in official.state_dict().items()}
    wrong = sum(ours_keys.get(name) != theirs_keys.get(name) for name in ours_keys.keys() | theirs_keys.keys())
    rows = [Row("state dict: keys and shapes that differ", wrong, 0, f"{len(theirs_keys)} keys")]
    with torch.no_grad():
        out = official(input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=pixels, labels=batch.labels,
                       output_hidden_states=True, output_projector_features=True)
        features = official.vision_backbone(pixels)
        ours = native.openvla.vision_backbone(pixels)
        rows.append(Row("vision features", _scaled(ours, features), tolerance["features"], "of the largest"))
        ours = native.embed(batch).hidden_BSD[:, 1:1 + native.num_patches]
        rows.append(Row("projector", _scaled(ours, out.projector_features), tolerance["features"], "of the largest"))
        valid = native.embed(batch).attention_mask_BS
        worst = max(_scaled(a[valid], b[valid]) for a, b in zip(native.hidden_states(batch), out.hidden_states))
        rows.append(Row(f"hidden states, {len(out.hidden_states)} layers", worst, tolerance["hidden"], "of the largest"))
        ours_logits = native.logits(native.hidden_states(batch)[-1])
        rows.append(Row("logits", difference(ours_logits[valid].float(), out.logits[valid].float()), tolerance["logits"]))
        loss = native(batch)
        rows.append(Row("loss", abs(loss.loss.item() - out.loss.item()), tolerance["loss"], f"official {out.loss.item():.6f}"))
    return rows + _check_gradients(pair, batch, pixels, tolerance)


def _scaled(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return difference(ours.float(), theirs.float()) / max(1.0, float(theirs.float().abs().max()))


def _check_gradients(pair: Pair, batch: Batch, pixels, tolerance) -> List[Row]:
    native, official = pair.native, pair.official
    for model in (native, official):
        model.zero_grad(set_to_none=True)
        for p in model.parameters():
            p.requires_grad_(True)
    native(batch).loss.backward()
    out = official(input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=pixels, labels=batch.labels)
    out.loss.backward()
    ours = {name: p.grad for name, p in native.openvla.named_parameters()}
    theirs = {name: p.grad for name, p in official.named_parameters()}
    none = sum((ours[name] is None) != (theirs[name] is None) for name in theirs)
    worst = max(float((ours[n].double() - g.double()).norm() / g.double().norm().clamp(min=1e-12)) for n, g in theirs.items()
                if g is not None and float(g.double().norm()) > 1e-7)
    for model in (native, official):
        model.zero_grad(set_to_none=True)
    count = sum(grad is not None for grad in theirs.values())
    return [Row("gradients: parameters with one on one side only", none, 0, f"{count} with a gradient"),
            Row("gradients, largest relative difference of a parameter", worst, tolerance["gradient"])]


def check_generation(pair: Pair) -> List[Row]:
    """Eight frames: the official predict_action one by one, ours in one batch."""
    name = "generated actions that differ"
    if pair.processor is None:
        return [unchecked(name, "needs a tokenizer: --tokenizer DIR with Llama-2's files")]
    if pair.processor.empty_token_id != EMPTY_TOKEN:
        return [unchecked(name, f"the official code appends token {EMPTY_TOKEN}, which is '▁' in Llama-2 only; here that is "
                                f"{pair.processor.empty_token_id}")]
    stats = {"x": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}}}
    pair.native.norm_stats, pair.official.norm_stats = stats, stats
    images, texts = pictures(8, 2), [INSTRUCTIONS[i % 3] for i in range(8)]
    batch = encode_prompts([Sample(image, text) for image, text in zip(images, texts)], pair.processor).to(pair.device)
    ours, early_B = pair.native.attempt_batch(batch, "x")
    wrong = 0
    for row, (image, text) in enumerate(zip(images, texts)):
        batch = encode_prompts([Sample(image, text)], pair.processor).to(pair.device)
        prompt = batch.input_ids[:, :-1]  # the official code appends the empty token itself
        theirs = pair.official.predict_action(prompt, "x", pixel_values=batch.pixel_values.to(pair.dtype),
                                              attention_mask=torch.ones_like(prompt), do_sample=False)
        wrong += not np.array_equal(theirs, ours[row])
    return [Row(name, wrong, 0, f"8 frames, in {int(early_B.sum())} of which the model ended early")]


def check_lora(pair: Pair, tolerance: dict) -> List[Row]:
    """Names and shapes of LoRA on all-linear, and four AdamW steps from the same adapters."""
    from peft import LoraConfig, get_peft_model

    batch = model_batch(pair).to(pair.device)
    pixels = batch.pixel_values.to(pair.dtype)
    official = get_peft_model(pair.fresh_official(), LoraConfig(r=8, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear",
                                                                init_lora_weights="gaussian"))
    native = pair.fresh_native()
    attach_lora(native, all_linear(native), 8, 8, dtype=pair.dtype)
    theirs = {name: p for name, p in official.named_parameters() if p.requires_grad}
    ours = {name: p for name, p in native.model.named_parameters() if p.requires_grad}
    wrong = [n for n in ours.keys() | theirs.keys() if n not in ours or n not in theirs or ours[n].shape != theirs[n].shape]
    rows = [Row("LoRA all-linear: names and shapes that differ", len(wrong), 0,
                f"{len(theirs)} tensors" + (f"; {sorted(wrong)[:2]}" if wrong else ""))]
    if wrong:
        return rows
    with torch.no_grad():
        for name, p in ours.items():
            p.copy_(theirs[name])
    start = {name: p.detach().float().clone() for name, p in theirs.items()}
    losses = []
    for model, forward in ((native.model, lambda: native(batch).loss),
                           (official, lambda: official(input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=pixels,
                                                       labels=batch.labels).loss)):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
        trace = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = forward()
            loss.backward()
            optimizer.step()
            trace.append(loss.item())
        losses.append(trace)
    # Adam turns a gradient near zero into a full step of either sign, so single weights may differ by the step; the update as a whole not.
    apart = sum(float((ours[n].detach().float() - theirs[n].detach().float()).square().sum()) for n in ours)
    moved = sum(float((theirs[n].detach().float() - start[n]).square().sum()) for n in ours)
    text = " ".join(f"{value:.4f}" for value in losses[1])
    return rows + [Row("4 optimizer steps: loss", difference(losses[0], losses[1]), 10 * tolerance["loss"], f"official {text}"),
                   Row("4 optimizer steps: LoRA update", (apart / moved) ** 0.5, tolerance["weights"], "norm of the difference over norm")]


def main(argv: List[str]) -> int:
    args, config = read(OPENVLA, argv)
    try:
        code = load_official(args.openvla_dir)
        print(f"official code in {code.folder}; {', '.join(versions())}")
        rows = check_shapes(code)
        cache = Storage.from_config(config, create=False).cache
        pair = Pair(code, args.checkpoint, cache, args.tokenizer, args.dtype, pick_device(args.device))
        for check in (check_text_and_images, lambda pair: check_model(pair, TOLERANCES[args.dtype]), check_generation,
                      lambda pair: check_lora(pair, TOLERANCES[args.dtype])):
            rows += check(pair)
    except (FileNotFoundError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return print_table(f"{pair.folder} ({args.dtype}, {pair.device})", rows)


def print_table(title: str, rows: List[Row]) -> int:
    print(f"\n{title}")
    width = max(len(row.name) for row in rows)
    for row in rows:
        if row.tolerance == UNCHECKED:
            print(f"  -     {row.name:<{width}}  {'':>9}    {'':<7}  not checked: {row.note}")
        else:
            verdict = "ok  " if row.ok else "FAIL"
            print(f"  {verdict}  {row.name:<{width}}  {row.deviation:>9.2e} <= {row.tolerance:<7g}  {row.note}".rstrip())
    counted = [row for row in rows if row.tolerance != UNCHECKED]
    failed = [row for row in counted if not row.ok]
    print(f"\n{len(counted) - len(failed)} of {len(counted)} quantities within tolerance")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
