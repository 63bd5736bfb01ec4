"""Stage `vlakeep verify-pi0-fast`: is a folder the pi0-FAST that we think it is? With lerobot installed, do lerobot's classes agree?

    vlakeep verify-pi0-fast --checkpoint FOLDER                                    loss in both layouts, answers, codec: no lerobot needed
    vlakeep verify-pi0-fast --checkpoint FOLDER --data DATASET --frames 100        the same on real frames of a data set
    vlakeep verify-pi0-fast --checkpoint FOLDER --lerobot                          in lerobot's environment: weights, loss, logits, chunks

The first thing to run with real weights: which layout a checkpoint speaks is documented nowhere, and the loss on real frames tells. lerobot
needs Python 3.12 (pip install "lerobot[pi,peft]==0.6.1" into an environment of its own, then vlakeep beside it); its from_pretrained gives
random weights when loading fails, so that every tensor is compared with the file's first.

Exit status: 0 when all lines are within tolerance, 1 when one is not, 2 when something is missing.
"""

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import numpy as np
import torch

from vlakeep.core.config import BackboneConfig
from vlakeep.core.options import read
from vlakeep.core.parallel import pick_device
from vlakeep.core.storage import Storage, find_checkpoint
from vlakeep.data.formats import open_dataset
from vlakeep.data.sample import IGNORE_INDEX, Row, Sample
from vlakeep.models.files import read_tensors, weight_files
from vlakeep.models.load import make_backbone
from vlakeep.parity.golden import UNCHECKED, difference
from vlakeep.parity.stages import PI0_FAST
from vlakeep.parity.verify_golden import print_rows
from vlakeep.pi0_fast import format as checkpoint_format
from vlakeep.pi0_fast.model import EMBEDDING, HEAD, Sizes
from vlakeep.pi0_fast.processor import CODEC, TEXT, Pi0FastBatch, beside
from vlakeep.pi0_fast.prompts import LAYOUTS

LOSS, LOGITS, CHUNK = {"float32": 1e-4, "bfloat16": 2e-2}, {"float32": 1e-3, "bfloat16": 0.5}, 1e-5
INSTALL = ('lerobot cannot be imported ({error}): in an environment of its own with Python 3.12, pip install "lerobot[pi,peft]==0.6.1" and '
           "vlakeep, and run this command there; without --lerobot everything else is checked")


def random_samples(processor, dims: int, count: int, seed: int = 0) -> List[Sample]:
    """Pictures of noise, smooth chunks, states of which some lie outside [-1, 1]."""
    rng, spec = np.random.default_rng(seed), processor.spec
    found = []
    for i in range(count):
        one = spec.blank(0, processor.picture_size, ["pick up the red block", "Open_the top drawer, and close it"][i % 2])
        one = one.with_pictures(lambda picture: rng.integers(0, 256, picture.shape, dtype=np.uint8))
        state = rng.uniform(-1.1, 1.1, spec.state).astype(np.float32) if spec.state else None
        chunk = np.cumsum(rng.normal(0, 0.1, (spec.chunk, dims)), 0).clip(-1, 1).astype(np.float32)
        found.append(replace(one, state=state, action=chunk))
    return found


def lerobot_batch(processor, batch: Pi0FastBatch, samples: List[Sample]) -> Dict[str, torch.Tensor]:
    """The batch of the same rows as PI0FastPolicy takes it: prompt and actions padded apart, pictures in [0, 1] by camera."""
    config = processor.config
    width, wide = int(config["tokenizer_max_length"]), int(config["max_action_tokens"])
    rows = len(samples)
    found = {"observation.language.tokens": torch.full((rows, width), processor.pad_token_id),
             "action.tokens": torch.zeros(rows, wide, dtype=torch.int64)}
    masks = {"observation.language.attention_mask": torch.zeros(rows, width, dtype=torch.bool),
             "action.token_mask": torch.zeros(rows, wide, dtype=torch.bool)}
    for row in range(rows):
        ids, prefix = batch.input_ids[row][batch.attention_mask[row]], int(batch.prefix[row])
        for name, mask, part in zip(found, masks, (ids[:prefix], ids[prefix:])):
            if len(part) > found[name].shape[1]:
                raise ValueError(f"{name}: {len(part)} tokens, and lerobot's config.json has room for {found[name].shape[1]}, so "
                                 "that it would cut "
                                 "them off: shorten the instruction, or raise tokenizer_max_length or max_action_tokens there")
            found[name][row, :len(part)], masks[mask][row, :len(part)] = part, True
    names = [name for name in processor.named if not name.startswith("empty_camera_")]
    for number, name in enumerate(names):
        pictures = [processor.spec.pictures(sample)[number] for sample in samples]
        found[checkpoint_format.PICTURE + name] = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return {**found, **masks}


def our_logits(backbone, batch: Pi0FastBatch) -> torch.Tensor:
    """Logits [N, V] that predict the labelled tokens, row by row."""
    prefix = backbone.embed(batch)
    normed_BSD = backbone.run_layers(prefix)
    columns_BL = backbone.text_columns(prefix, batch.input_ids.shape[1])
    rows_N, places_N = (batch.labels != IGNORE_INDEX).to(columns_BL.device).nonzero(as_tuple=True)
    return backbone.logits(normed_BSD[rows_N, columns_BL[rows_N, places_N] - 1]).float()


def judge_policy(backbone, policy, samples: List[Sample], dtype: str) -> List[Row]:
    """Weights, loss, logits and chunks of lerobot's policy against ours, in lerobot's layout."""
    stored = {checkpoint_format.tensor_name(name): tensor for name, tensor in read_tensors(weight_files(backbone.checkpoint))}
    one = stored.get(EMBEDDING, stored.get(HEAD))
    stored = {EMBEDDING: one, HEAD: one, **stored}
    theirs = policy.state_dict()
    wrong = [name for name, tensor in stored.items()
             if name not in theirs or not torch.equal(theirs[name].cpu(), tensor.to(theirs[name].dtype))]
    rows = [Row("lerobot: tensors that are not the file's", float(len(wrong)), 0, ", ".join(wrong[:3]))]
    processor, batch = backbone.processor, backbone.processor.encode_batch(samples)
    given = {name: value.to(backbone.device) for name, value in lerobot_batch(processor, batch, samples).items()}
    said: List[torch.Tensor] = []  # what lerobot's lm_head gives, one column for each action token
    hook = policy.model.paligemma_with_expert.paligemma.lm_head.register_forward_hook(lambda module, args, out: said.append(out))
    with torch.no_grad():
        loss, _ = policy.forward(given)
        hook.remove()
        rows.append(Row("lerobot: loss", abs(float(loss) - float(backbone(batch).loss)), LOSS[dtype]))
        theirs_NV = said[0][:, :-1][given["action.token_mask"][:, 1:]].float()
        rows.append(Row("lerobot: logits of the answer", difference(our_logits(backbone, batch), theirs_NV), LOGITS[dtype]))
        chunks = policy.predict_action_chunk(given)
        ids, _ = backbone.generate(processor.encode_prompts(samples), backbone.action_tokens(), bos_in_prefix=True)
    ours = processor.decode_actions(ids.cpu().numpy())[:, :chunks.shape[1]]
    rows.append(Row("lerobot: chunks, BOS in the prefix", difference(ours, chunks.cpu().double().numpy()), CHUNK,
                    "rounding may turn a token in half precision" if dtype != "float32" else ""))
    return rows


@contextmanager
def lerobot_classes(folder: Path, config: dict) -> Iterator[Any]:
    """lerobot's modeling_pi0_fast, in which the two names of the configuration mean the folders beside the checkpoint, and a model may have
    the sizes of sizes.json. All methods are lerobot's. ImportError without lerobot.

    The published codec comes as remote code; lerobot's own copy of that class reads the same two files, and it stands for AutoProcessor.
    lerobot has the sizes of two variants in its constructor; where sizes.json names others, a constructor of these sizes stands for it.
    """
    from lerobot.policies.molmoact2.molmoact2_hf_model.action_tokenizer import UniversalActionProcessor
    from lerobot.policies.pi0_fast import modeling_pi0_fast
    from lerobot.processor import tokenizer_processor

    codec = str(beside(folder, config["action_tokenizer_name"], CODEC, "FAST codec"))

    class Local:
        from_pretrained = staticmethod(lambda name, **_: UniversalActionProcessor.from_pretrained_local(codec))

    places: List[Tuple[Any, str, type]] = [(modeling_pi0_fast, "AutoProcessor", Local), (tokenizer_processor, "AutoProcessor", Local)]
    if "sizes" in config:
        places.append((modeling_pi0_fast, "PI0FastPaliGemma", _in_sizes(modeling_pi0_fast, checkpoint_format.sizes_of(config))))
    before = [(module, name, getattr(module, name)) for module, name, _ in places]
    try:
        for module, name, value in places:
            setattr(module, name, value)
        yield modeling_pi0_fast
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _in_sizes(modeling, sizes: Sizes) -> type:
    vision = sizes.vision
    text = dict(vocab_size=sizes.vocab_size, hidden_size=sizes.width, intermediate_size=sizes.mlp_dim, num_hidden_layers=sizes.depth,
                num_attention_heads=sizes.num_heads, num_key_value_heads=sizes.num_kv_heads, head_dim=sizes.head_dim,
                hidden_activation="gelu_pytorch_tanh", use_adarms=False, adarms_cond_dim=None)
    tower = dict(vision._asdict(), projection_dim=sizes.width, vision_use_head=False, hidden_act="gelu_pytorch_tanh")

    class InSizes(modeling.PI0FastPaliGemma):
        def __init__(self, vlm_config, use_adarms=None, precision="bfloat16"):
            torch.nn.Module.__init__(self)
            whole = modeling.CONFIG_MAPPING["paligemma"](text_config=dict(text, model_type="gemma"),
                                                         vision_config=dict(tower, model_type="siglip_vision_model"),
                                                         projection_dim=sizes.width, image_token_index=sizes.vocab_size)
            self.paligemma = modeling.PaliGemmaForConditionalGenerationWithPiGemma(config=whole)
            self.to_bfloat16_for_selected_params(precision)
    return InSizes


def lerobot_policy(folder: Path, config: dict, device, dtype: str) -> Any:
    """lerobot's policy with the weights of the folder. ImportError without lerobot."""
    with lerobot_classes(folder, config) as modeling:
        from lerobot.configs.policies import PreTrainedConfig

        settings = PreTrainedConfig.from_pretrained(str(folder))
        settings.text_tokenizer_name = str(beside(folder, config["text_tokenizer_name"], TEXT, "text tokenizer"))
        settings.device, settings.dtype = str(device), dtype
        settings.validate_action_token_prefix, settings.gradient_checkpointing = False, False
        return modeling.PI0FastPolicy.from_pretrained(str(folder), config=settings).eval()


def layouts(folder: Path, settings: BackboneConfig, device, samples: List[Sample]) -> List[Tuple[str, float]]:
    """(what, loss in nats per labelled token) of the frames in either layout; uniform over the vocabulary would be log V."""
    found = []
    for name in LAYOUTS:
        backbone: Any = make_backbone(replace(settings, layout=name), device)
        with torch.no_grad():
            found.append((name, float(np.mean([float(backbone(backbone.processor.encode_batch([one])).loss) for one in samples]))))
    return found


def self_checks(backbone, samples: List[Sample]) -> List[Row]:
    """What needs no other code: batch-mates change nothing, codec and answers are well-formed."""
    processor = backbone.processor
    with torch.no_grad():
        together = backbone(processor.encode_batch(samples))
        each = [backbone(processor.encode_batch([one])) for one in samples]
        ids, _ = backbone.generate(processor.encode_prompts(samples), backbone.action_tokens())
    alone = sum(float(out.loss) * int(out.num_labelled) for out in each) / int(together.num_labelled)
    mean = float(np.mean([float(out.loss) for out in each])) if processor.layout.row_means else alone
    start = processor.words.action
    marked = sum(row[:len(start)].tolist() == start for row in ids.cpu())
    problems = [problem for problem in processor.read(ids.cpu().numpy())[1] if problem]
    worst = max(float(np.abs(processor.decode_actions(processor.encode_batch([one]).labels.numpy().clip(min=0)) - one.action).max())
                for one in samples)
    return [
        Row("loss alone and in a batch", abs(mean - float(together.loss)), 1e-4 if backbone.dtype == torch.float32 else 3e-2),
        Row("chunks through the codec", worst, 1.0, "normalised; what the rounding of the codec costs"),
        Row("answers that begin with the mark", float(marked), UNCHECKED,
            f"{marked} of {len(samples)} begin with {start}; malformed: {len(problems)}{' (' + problems[0] + ')' if problems else ''}")]


def frames_of(args, spec, cache: Path) -> List[Sample]:
    """Evenly spaced frames of a data set."""
    with open_dataset(Path(args.data), 1.0, cache, spec=spec) as dataset:
        keys = [(e, t) for e, length in enumerate(dataset.lengths) for t in range(int(length))]
        return [dataset.frame(*keys[i * len(keys) // args.frames]) for i in range(min(args.frames, len(keys)))]


def verify(args, cache: Path) -> int:
    folder = find_checkpoint(args.checkpoint, cache)
    device, config = pick_device(args.device), checkpoint_format.read_config(folder)
    checkpoint_format.check_weights(folder, config)
    settings = BackboneConfig(checkpoint=str(folder), dtype=args.dtype, layout=args.layout, state=args.state,
                              cameras=args.cameras.split(",") if args.cameras else None)
    backbone: Any = make_backbone(settings, device)
    dims = checkpoint_format.action_size(config)
    samples = frames_of(args, backbone.processor.spec, folder) if args.data else random_samples(backbone.processor, dims, args.frames)
    print(f"{folder}: {backbone.num_layers} layers, {sum(p.numel() for p in backbone.parameters()):,} parameters, "
          f"{'one vocabulary' if backbone.network.tied else 'two vocabularies'}; {len(samples)} "
          f"{'frames of ' + str(args.data) if args.data else 'random samples'}")
    rows = self_checks(backbone, samples)
    if args.lerobot:
        rows += judge_policy(backbone, lerobot_policy(folder, backbone.config, device, args.dtype), samples, args.dtype)
    print_rows(folder, rows)
    for name, loss in layouts(folder, settings, device, samples):
        print(f"  loss in the layout {name:8s} {loss:.4f} nats per token (uniform: {np.log(backbone.network.sizes.vocab_size):.2f})")
    labelled = sum(int((one.labels != IGNORE_INDEX).sum()) for one in map(backbone.processor.encode_batch, ([s] for s in samples)))
    print(f"  {labelled / len(samples):.1f} tokens an answer")
    return 0 if all(row.ok for row in rows) else 1


def main(argv: List[str]) -> int:
    args, config = read(PI0_FAST, argv)
    try:
        return verify(args, Storage.from_config(config, create=False).cache)
    except ImportError as error:
        print("error: " + INSTALL.format(error=error), file=sys.stderr)
        return 2
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
