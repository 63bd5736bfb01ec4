"""The finetune.py of OpenVLA-OFT on a CPU at tiny size, with and without examples/patches/openvla_oft_finetune.diff.

    python scripts/official_oft.py --oft_dir DIR --dlimp_dir DIR --tokenizer tokenizer.model --rlds DIR --out DIR [--kinds l1 film]

A model of random weights with Llama's token numbers is trained by the script as it lies in the checkout on libero_spatial_no_noops, so
that there is an action head and something to keep, and then on libero_goal_no_noops from that checkpoint, plain and with the patch. Of the
script's text only what stands for a GPU is edited in memory (device calls, W&B, one line that notes the time). What is printed: seconds
of processor time a step, and how far the saved adapter, loaded by PEFT alone, has gone from the base on items that no gain has seen.
`--tokenizer` is a SentencePiece model of 32,000 pieces of Llama's kind; `--rlds` holds the golden data (tests/golden/rlds/tfds). Needs the
environment of the checkout: transformers from its fork, TensorFlow 2.15, diffusers.
"""

import argparse
import importlib.machinery
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[1]
PATCH = REPO / "examples" / "patches" / "openvla_oft_finetune.diff"
OLD, NEW = "libero_spatial_no_noops", "libero_goal_no_noops"
EDITS = {
    "distributed_state = PartialState()": "distributed_state = PartialState(cpu=True)",
    "device_id = distributed_state.local_process_index": 'device_id = "cpu"',
    "torch.cuda.set_device(device_id)": "pass",
    "torch.cuda.empty_cache()": "pass",
    "device_ids=[device_id], ": "",
    'torch.autocast("cuda"': 'torch.autocast("cpu"',
    "                optimizer.step()\n": "                TRIAL.tick(); optimizer.step()\n",
}
OPTIMIZER = "optimizer = AdamW(trainable_params, "
KINDS = {"l1": {}, "film": {"use_film": True}, "diffusion": {"use_l1_regression": False, "use_diffusion": True}}
LAPS = 4
ITEMS = 16  # for the bases, as many held out for the loop, as many that judge


class Trial:
    """What the edited script calls."""

    def __init__(self):
        self.times = []

    def tick(self):
        self.times.append(time.thread_time())


def surroundings(options) -> None:
    """What the script finds: its sources, a group of one process, a W&B that keeps what is logged, and all that it imports."""
    sys.path[:0] = [str(Path(options.oft_dir).resolve()), str(Path(options.dlimp_dir).resolve()), str(REPO)]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0", HF_HUB_OFFLINE="1",
                      TF_CPP_MIN_LOG_LEVEL="2", CUDA_VISIBLE_DEVICES="")
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)  # transformers asks whether it is installed
    wandb.rows, wandb.init = [], lambda **more: None
    wandb.log = lambda row, step=None: wandb.rows.append(row)
    sys.modules["wandb"] = wandb
    torch.set_num_threads(1)
    from vlakeep.openvla.tiny import register_tiny_vits

    register_tiny_vits()  # mends torchvision beside a CPU build of torch, before transformers imports it
    import experiments.robot.openvla_utils  # noqa: F401  with TensorFlow and all that the script imports
    import prismatic.vla.datasets  # noqa: F401


def in_child(options, function, *args) -> None:
    """A process for each run, since the script registers classes and starts process groups. The libraries are imported in it: with those
    of TensorFlow in the parent, the script's dist.barrier() never came back."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            surroundings(options)
            function(*args)
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"{function.__name__}{args[:1]} has failed, as said above")


def make_data(source: Path, folder: Path) -> None:
    """A copy of the golden data with each episode LAPS times on end: the script makes chunks of eight actions, and these are shorter."""
    import tensorflow as tf

    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("dataset_statistics_*"))
    for file in part.rglob("*.tfrecord-*"):
        episodes = [tf.train.Example.FromString(raw.numpy()) for raw in tf.data.TFRecordDataset(str(file))]
        with tf.io.TFRecordWriter(str(file)) as writer:
            for episode in episodes:
                for name, feature in episode.features.feature.items():
                    values = getattr(feature, feature.WhichOneof("kind")).value
                    values.extend(list(values) * (LAPS - 1) if name.startswith("steps/") else [])
                writer.write(episode.SerializeToString())
    part.rename(folder)


def make_base(folder: Path, tokenizer: str) -> None:
    """A tiny OpenVLA in the official classes' own files."""
    from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
    from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
    from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor, PrismaticProcessor
    from transformers import LlamaTokenizerFast

    config = json.loads((REPO / "tests" / "golden" / "fused_tiny" / "config.json").read_text())
    config = {key: config[key] for key in ("arch_specifier", "hf_llm_id", "image_resize_strategy", "llm_backbone_id", "llm_max_length",
                                           "n_action_bins", "pad_to_multiple_of", "pad_token_id", "text_config",
                                           "timm_override_act_layers", "use_fused_vision_backbone", "vision_backbone_id")}
    kinds = ("dinov2", "siglip")
    torch.manual_seed(0)
    model = OpenVLAForActionPrediction(OpenVLAConfig(**config, norm_stats={}, image_sizes=[64, 64],
                                                     timm_model_ids=[f"vlakeep_vit_tiny_patch16_{kind}" for kind in kinds]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0, 1.0 if "embed_tokens" in name else weight.shape[1] ** -0.5)
            elif "scale_factor" in name:
                weight.fill_(1.0)
    model.to(torch.bfloat16).save_pretrained(folder)
    text = LlamaTokenizerFast(vocab_file=tokenizer, model_max_length=2048, padding_side="right")
    text.add_special_tokens({"pad_token": "<PAD>"})
    pictures = PrismaticImageProcessor(use_fused_vision_backbone=True, image_resize_strategy="resize-naive", input_sizes=[(3, 64, 64)] * 2,
                                       interpolations=["bicubic"] * 2, means=[(0.485, 0.456, 0.406), (0.5, 0.5, 0.5)],
                                       stds=[(0.229, 0.224, 0.225), (0.5, 0.5, 0.5)])
    PrismaticProcessor(image_processor=pictures, tokenizer=text).save_pretrained(folder)


def make_probe(base: Path, data: str, file: Path, diffusion: bool) -> None:
    """Batches of one item from the script's own pipeline: two lists for the patch, and a file beside it that judges."""
    from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor
    from prismatic.models.action_heads import DiffusionActionHead
    from prismatic.models.backbones.llm.prompting import PurePromptBuilder
    from prismatic.util.data_utils import PaddedCollatorForActionPrediction
    from prismatic.vla.action_tokenizer import ActionTokenizer
    from prismatic.vla.datasets import RLDSBatchTransform, RLDSDataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    transform = RLDSBatchTransform(ActionTokenizer(tokenizer), tokenizer, prompt_builder_fn=PurePromptBuilder, use_proprio=True,
                                   image_transform=PrismaticImageProcessor.from_pretrained(base).apply_transform)
    rows = iter(RLDSDataset(Path(data), OLD, transform, resize_resolution=(64, 64), shuffle_buffer_size=200, image_aug=False))
    collate = PaddedCollatorForActionPrediction(2048, tokenizer.pad_token_id, padding_side="right")
    torch.manual_seed(0)
    head, found = DiffusionActionHead(64, 64, 7), []
    for _ in range(3 * ITEMS):
        batch = collate([next(rows)])
        noisy = head.sample_noisy_actions(batch["actions"].to(torch.bfloat16))
        noisy = {name: noisy[name] for name in ("noisy_actions", "diffusion_timestep_embeddings")} if diffusion else {}
        found.append({**{name: batch[name] for name in ("input_ids", "attention_mask", "labels", "proprio")}, **noisy,
                      "pixel_values": batch["pixel_values"].to(torch.bfloat16)})
    torch.save([found[:ITEMS], found[ITEMS:2 * ITEMS]], file)
    torch.save(found[2 * ITEMS:], judging(file))


def judging(file: Path) -> Path:
    return file.with_name(f"{file.stem}-judging.pt")


def run_script(name: str, args, arguments, patched: bool = False) -> None:
    """The script, edited for a CPU, in the folder OUT/NAME; probe.pt lies there for the patch."""
    folder = Path(args.out) / name
    (folder / "vla-scripts").mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(args.oft_dir) / "vla-scripts" / "finetune.py", folder / "vla-scripts")
    if patched:
        subprocess.run(["git", "apply", "--unidiff-zero", str(PATCH)], cwd=folder, check=True,
                       env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)})
    text = (folder / "vla-scripts" / "finetune.py").read_text()
    assert ("vlakeep" in text) == patched, "the patch was not applied"
    for old, new in EDITS.items():
        assert old in text, f"finetune.py has changed: {old}"
        text = text.replace(old, new)
    if args.keep_head and "resume" in arguments and not patched:
        assert OPTIMIZER in text
        text = text.replace(OPTIMIZER, "optimizer = AdamW([p for p in vla.parameters() if p.requires_grad], ")
    text = text.replace('"probe.pt"', repr(str(Path(args.out) / arguments.pop("probe", "probe.pt"))))
    import vlakeep.protect as library

    handles, protect = [], library.protect
    library.protect = lambda *rest, **options: handles.append(protect(*rest, **options)) or handles[-1]
    module, trial = types.ModuleType("oft_finetune"), Trial()
    module.__dict__["TRIAL"], sys.modules["oft_finetune"] = trial, module
    os.chdir(args.oft_dir)  # the script copies files from below the current folder
    torch.manual_seed(0)
    exec(compile(text, str(folder / "finetune.py"), "exec"), module.__dict__)
    try:
        module.finetune.__wrapped__(module.FinetuneConfig(**arguments))
    except ValueError as error:  # what the patch or protect refuses
        if not patched:
            raise
        (folder / "row.json").write_text(json.dumps({"refused": str(error)}))
        return
    steps = [later - before for before, later in zip(trial.times, trial.times[1:])]
    row = {"losses": [one["VLA Train/Loss"] for one in sys.modules["wandb"].rows if "VLA Train/Loss" in one], "steps": steps}
    for handle in handles:
        row.update(history=handle.history, linears=len(handle._adapted.layers), unprotected=handle.unprotected)
    (folder / "row.json").write_text(json.dumps(row))


def judge(base: Path, folder: Path, probe: Path, out: Path) -> None:
    """Divergence of a saved adapter on items that judge, with its own head and with the base's; no code of this repository in it."""
    from peft import PeftModel
    from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
    from prismatic.models.action_heads import L1RegressionActionHead
    from prismatic.models.projectors import ProprioProjector
    from prismatic.training.train_utils import get_current_action_mask, get_next_actions_mask

    def load(module, folder, name):
        state = torch.load(next(folder.glob(f"{name}--*_checkpoint.pt")), weights_only=True)
        module.load_state_dict({key[len("module."):] if key.startswith("module.") else key: value for key, value in state.items()})
        return module.eval()

    @torch.no_grad()
    def actions(model, projector, head):
        found = []
        for batch in torch.load(judging(probe), weights_only=True):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = model(**batch, proprio_projector=projector, output_hidden_states=True).hidden_states[-1]
            targets = batch["labels"][:, 1:]
            wanted = get_current_action_mask(targets) | get_next_actions_mask(targets)
            hidden = hidden[:, 17:-1][wanted].view(1, 56, -1)  # 16 patches and the state
            found.append(head.predict_action(hidden.to(torch.bfloat16)).float())
        return torch.cat(found)

    model = OpenVLAForActionPrediction.from_pretrained(base, torch_dtype=torch.bfloat16).eval()
    head = load(L1RegressionActionHead(64, 64, 7).to(torch.bfloat16), base, "action_head")
    projector = load(ProprioProjector(64, 8), base, "proprio_projector")
    before = actions(model, projector, head)
    model = PeftModel.from_pretrained(model, folder / "lora_adapter").eval()
    with_base_head = actions(model, projector, head)
    own = [load(made, folder, name) for made, name in ((ProprioProjector(64, 8), "proprio_projector"),
                                                      (L1RegressionActionHead(64, 64, 7).to(torch.bfloat16), "action_head"))]
    after = actions(model, *own)
    out.write_text(json.dumps({key: float((one - before).square().mean() / (2 * 0.1 ** 2))
                               for key, one in (("whole", after), ("adapter alone", with_base_head))}))


def report(kind: str, plain: dict, kept: dict) -> None:
    step = {arm: statistics.median(row["steps"][2:]) for arm, row in (("plain", plain), ("patched", kept))}
    cells = [f"{row[key]:.4f}" if key in row else "" for row in (kept, plain) for key in ("whole", "adapter alone")]
    told = f"{kept['history'][-1]['kl']:.4f}" if kept["history"] else "not asked"  # the loop asks every 50 steps
    print(f"| {kind} | {kept['linears']} | {told} | "
          f"{' | '.join(cells)} | {step['patched']:.3f} | {step['patched'] / step['plain']:.3f} |", flush=True)
    print(f"  losses, first and last ten: plain {plain['losses'][0]:.4f}, {statistics.mean(plain['losses'][-10:]):.4f}; patched "
          f"{kept['losses'][0]:.4f}, {statistics.mean(kept['losses'][-10:]):.4f}; not bounded: {len(kept['unprotected'])}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oft_dir", required=True, help="moojink/openvla-oft at 213c5ff")
    parser.add_argument("--dlimp_dir", required=True, help="moojink/dlimp_openvla")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rlds", required=True)
    parser.add_argument("--out", required=True, help="a folder; what is there of an earlier call is not made again")
    parser.add_argument("--kinds", nargs="+", default=["l1"], choices=list(KINDS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--keep_head", action="store_true", help="plain too leaves head and projectors as they are, as the patch does")
    args = parser.parse_args()
    args.out = str(Path(args.out).resolve())
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    data = out / "rlds"  # the pipeline writes its statistics beside the data
    if not data.exists():
        in_child(args, make_data, Path(args.rlds), data)
    if not (out / "random").exists():
        in_child(args, make_base, out / "random", args.tokenizer)
    print("| kind | linears | kl of .01 allowed | judged: adapter and head | adapter alone | plain: adapter and head | adapter alone | "
          "step, s | over plain |\n|---|---|---|---|---|---|---|---|---|", flush=True)
    for kind in args.kinds:
        shared = {"data_root_dir": data, "run_root_dir": out / "runs", "shuffle_buffer_size": 200, "batch_size": 8, "lora_rank": 8,
                  "use_proprio": True, "learning_rate": 2e-3, "save_freq": args.steps, "wandb_log_freq": 1, **KINDS[kind]}
        base = out / "runs" / f"{kind}-base--{args.steps}_chkpt"
        if not base.exists():
            in_child(args, run_script, f"{kind}-base", args, {**shared, "vla_path": str(out / "random"), "dataset_name": OLD,
                                                        "max_steps": args.steps, "run_id_override": f"{kind}-base"})
        if not (out / f"probe-{kind}.pt").exists():
            in_child(args, make_probe, out / "random", str(data), out / f"probe-{kind}.pt", kind == "diffusion")
        found = {}
        for arm in ("plain", "patched"):
            name = f"{kind}-{arm}" + "-kept" * (args.keep_head and arm == "plain")
            in_child(args, run_script, name, args,
                     {**shared, "vla_path": str(base), "dataset_name": NEW, "max_steps": 2 * args.steps, "resume": True,
                      "resume_step": args.steps, "run_id_override": name, "probe": f"probe-{kind}.pt"}, arm == "patched")
            found[arm] = json.loads((out / name / "row.json").read_text())
            if "refused" in found[arm]:
                print(f"| {kind} | refused: {found[arm]['refused']} |" + " |" * 7, flush=True)
                break
            if kind == "l1":
                saved = out / "runs" / f"{name}--{2 * args.steps}_chkpt"
                in_child(args, judge, base, saved, out / f"probe-{kind}.pt", out / name / "judged.json")
                found[arm].update(json.loads((out / name / "judged.json").read_text()))
        else:
            report(kind, found["plain"], found["patched"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
