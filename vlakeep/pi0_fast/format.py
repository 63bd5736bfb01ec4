"""Checkpoint folders in lerobot's format: read, check, write, initialise.

    config.json                 lerobot's PI0FastConfig (type pi0_fast); it names the variant, and no sizes
    sizes.json                  the sizes of a model that is none of lerobot's variants; absent for these
    model.safetensors           or shards with an index; with or without the leading `model.`, with both vocabularies or with one
    dataset_statistics.json     ours, by data set; else dataset_stats.json or the state of lerobot's normaliser step
    text_tokenizer/ action_tokenizer/   or what config.json calls them: folders here, or names in the hub's cache
    policy_*processor*          lerobot's pipelines (pipelines.py), of a model whose statistics are known
    vlakeep_pi0_fast.json       {"layout"}: what lerobot's file has no room for (prompts.py)

Sources: lerobot 7427f318 configuration_pi0_fast.py, modeling_pi0_fast.py:793-940, processor/normalize_processor.py:386-401.
"""

import json
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch
from safetensors.torch import load_file

from vlakeep.core.errors import CheckpointError
from vlakeep.models.files import STATISTICS, read_tensors, tensor_table, weight_files, write_json, write_weights
from vlakeep.pi0_fast.model import EMBEDDING, HEAD, PALIGEMMA, Pi0Fast, Sizes, VisionSizes, expected_shapes, precise
from vlakeep.pi0_fast.pipelines import POSTPROCESSOR, PREPROCESSOR, remove_pipelines, write_pipelines
from vlakeep.pi0_fast.prompts import DEFAULT

SIZES_FILE, OWN_FILE, LEROBOT_STATISTICS = "sizes.json", "vlakeep_pi0_fast.json", "dataset_stats.json"
KIND, KEY = "pi0_fast", "lerobot"  # KEY: the name of the statistics of a folder that keeps none by data set
PICTURE, STATE, ACTION = "observation.images.", "observation.state", "action"
VARIANTS = {"gemma_2b": Sizes(), "gemma_300m": Sizes(width=1024, mlp_dim=4096)}
MODES = ("QUANTILES", "MEAN_STD", "MIN_MAX", "IDENTITY")
_REMEDY = "fetch the checkpoint again, or give the folder of another one with --backbone.checkpoint"


def _json(file: Path) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        return found
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}): {_REMEDY}") from error


def read_config(folder) -> dict:
    """config.json, validated and with lerobot's defaults; `sizes` and `layout` come from the files beside it.

    FileNotFoundError or CheckpointError listing everything that is wrong.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {folder}: --backbone.checkpoint must be a folder in lerobot's format")
    config = _json(folder / "config.json")
    if (folder / SIZES_FILE).is_file():
        config["sizes"] = _json(folder / SIZES_FILE)
    if (folder / OWN_FILE).is_file():
        config["layout"] = _json(folder / OWN_FILE).get("layout")
    return complete_config(config, str(folder / "config.json"))


def complete_config(config: dict, where: str = "config") -> dict:
    config = json.loads(json.dumps(config))
    problems = []
    if config.get("type", KIND) != KIND:
        problems.append(f"type is {config['type']!r}, must be {KIND!r}")
    for name, default in (("paligemma_variant", "gemma_2b"), ("chunk_size", 50), ("image_resolution", [224, 224]),
                          ("fast_skip_tokens", 128),
                          ("tokenizer_max_length", 200), ("max_action_tokens", 256), ("max_decoding_steps", 256), ("n_action_steps", 50),
                          ("text_tokenizer_name", "google/paligemma-3b-pt-224"), ("action_tokenizer_name", "lerobot/fast-action-tokenizer"),
                          ("normalization_mapping", {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"})):
        config.setdefault(name, default)
    features = [*(config.get("input_features") or {}).items(), *(config.get("output_features") or {}).items()]
    if not all(isinstance(one, dict) and isinstance(one.get("shape"), list) for _, one in features):
        problems.append("input_features and output_features must be objects with a shape each")
    elif not cameras(config):
        problems.append("input_features names no picture (observation.images.*)")
    elif ACTION not in (config.get("output_features") or {}):
        problems.append("output_features lacks the action")
    if config["paligemma_variant"] not in VARIANTS and "sizes" not in config:
        problems.append(f"paligemma_variant is {config['paligemma_variant']!r}, must be one of {', '.join(VARIANTS)}, or "
                        f"{SIZES_FILE} beside it")
    wrong = [f"{kind} {mode}" for kind, mode in config["normalization_mapping"].items() if mode not in MODES]
    problems += [f"normalization_mapping {', '.join(wrong)}: vlakeep knows {', '.join(MODES)}"] if wrong else []
    if not problems:
        try:
            sizes = sizes_of(config)
            if sizes.num_heads % sizes.num_kv_heads or sizes.head_dim % 2 or sizes.depth < 1:
                problems.append(f"{sizes.num_heads} heads, {sizes.num_kv_heads} key heads, {sizes.head_dim} columns each and {sizes.depth} "
                                "layers make no decoder")
            if list(config["image_resolution"]) != [sizes.vision.image_size] * 2:
                problems.append(f"image_resolution is {config['image_resolution']}, the vision model takes {sizes.vision.image_size}")
        except (TypeError, ValueError) as error:
            problems.append(f"{SIZES_FILE} does not hold the sizes of a model ({error})")
    if problems:
        raise CheckpointError(f"{where} is no configuration of pi0-FAST: " + "; ".join(problems) + f": {_REMEDY}")
    return config


def adapted(config: dict, layout: Optional[str] = None, named: Optional[List[str]] = None, state: Optional[int] = None) -> dict:
    """A copy that speaks this layout, of these cameras and a state of so many numbers; None leaves what is there.

    ValueError for no camera.
    """
    config = json.loads(json.dumps(config))
    features = config["input_features"]
    if named is not None:
        if not named or len(set(named)) != len(named):
            raise ValueError(f"--backbone.cameras {named}: name at least one camera, and each once")
        shape = [3, *config["image_resolution"]]
        pictures = {PICTURE + name: {"type": "VISUAL", "shape": shape} for name in named}
        features = config["input_features"] = {**pictures, **{k: v for k, v in features.items() if not k.startswith(PICTURE)}}
    if state is not None:
        features.pop(STATE, None)
        if state:
            features[STATE] = {"type": "STATE", "shape": [state]}
    return dict(config, layout=layout) if layout else config


def sizes_of(config: dict) -> Sizes:
    """From sizes.json, else of the variant."""
    if "sizes" not in config:
        base = VARIANTS[config["paligemma_variant"]]
        return base._replace(vision=base.vision._replace(image_size=int(config["image_resolution"][0])))
    own = dict(config["sizes"])
    vision = VisionSizes(**{k: v for k, v in (own.pop("vision", None) or {}).items() if k in VisionSizes._fields})
    return Sizes(**{k: v for k, v in own.items() if k in Sizes._fields}, vision=vision)


def cameras(config: dict) -> List[str]:
    """Names of the cameras without observation.images., in the model's order; `empty_camera_0` and so on are never there."""
    return [name[len(PICTURE):] for name in config.get("input_features") or {} if name.startswith(PICTURE)]


def state_size(config: dict) -> int:
    return int((config["input_features"].get(STATE) or {"shape": [0]})["shape"][0])


def action_size(config: dict) -> int:
    return int(config["output_features"][ACTION]["shape"][0])


# ---- weights ----


def tensor_name(stored: str) -> str:
    """The network's name of a tensor of a file. Files come with and without lerobot's leading `model.`; transformers of late writes SigLIP
    without the level vision_model."""
    name = stored if stored.startswith("model.paligemma_with_expert.") else f"model.{stored}"
    tower = PALIGEMMA + "model.vision_tower."
    if name.startswith(tower) and not name.startswith(tower + "vision_model."):
        name = f"{tower}vision_model.{name[len(tower):]}"
    return name


def check_names(found: Dict[str, torch.Size], expected: Dict[str, torch.Size], where) -> None:
    """CheckpointError naming every tensor that is missing, too many or of another shape; lerobot returns random weights for such a file."""
    def some(names):
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    either = {EMBEDDING, HEAD}  # one of the two vocabularies stands for both
    missing = [name for name in expected if name not in found and not (name in either and either & set(found))]
    unexpected = [name for name in found if name not in expected]
    shapes = [f"{name} is {list(found[name])}, must be {list(expected[name])}" for name in expected
              if name in found and found[name] != expected[name]]
    problems = [text for names, text in ((missing, f"missing: {some(missing)}"), (unexpected, f"unexpected: {some(unexpected)}"),
                                         (shapes, f"other shape: {some(shapes)}")) if names]
    if problems:
        raise CheckpointError(f"the weights in {where} do not fit its config.json; " + "; ".join(problems) + f": {_REMEDY}")


def check_weights(folder, config: dict) -> None:
    """Raise CheckpointError unless the weight files hold exactly the tensors of this configuration; reads headers only."""
    found = {tensor_name(name): torch.Size(entry["shape"]) for file in weight_files(folder) for name, entry in tensor_table(file).items()}
    check_names(found, expected_shapes(sizes_of(config)), folder)


def load_checkpoint(folder, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa",
                    config: Optional[dict] = None) -> Tuple[Pi0Fast, dict]:
    """(network in evaluation mode on the CPU, config). CheckpointError or FileNotFoundError; nothing is loaded half, and every tensor that
    was asked for is one of the file's."""
    config = config or read_config(folder)
    check_weights(folder, config)
    with torch.device("meta"):
        network = Pi0Fast(config, sizes_of(config), attn_implementation)
    names = ((tensor_name(name), tensor) for name, tensor in read_tensors(weight_files(folder)))
    state = {name: tensor.to(torch.float32 if precise(name) else dtype) for name, tensor in names}
    tied = len({EMBEDDING, HEAD} & set(state)) == 1 or torch.equal(state[EMBEDDING], state[HEAD])
    if tied:  # one parameter: 1 GB less of the full model in half precision
        state[EMBEDDING] = state[HEAD] = state.get(EMBEDDING, state.get(HEAD))
    network.load_state_dict(state, strict=True, assign=True)
    if tied:
        network.paligemma.lm_head.weight = network.gemma.embed_tokens.weight
    return network.eval(), config


def init_state(sizes: Sizes, seed: int = 0) -> Dict[str, torch.Tensor]:
    """Random weights of these sizes: matrices of standard deviation fan_in^-0.5 or less, LayerNorms 1, Gemma's norms and biases 0."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in expected_shapes(sizes).items():
        if len(shape) == 1:
            ones = name.endswith("weight") and ".vision_tower." in name
            state[name] = torch.ones(shape) if ones else torch.zeros(shape)
        else:
            # The table is scaled by sqrt(D) when it is read.
            std = shape[-1] ** -0.5 if name in (EMBEDDING, HEAD) else min(0.05, shape[1:].numel() ** -0.5)
            state[name] = torch.randn(shape, generator=generator) * std
    state[HEAD] = state[EMBEDDING].clone()
    return state


# ---- folders ----


def write_checkpoint(folder: Path, state: Dict[str, torch.Tensor], config: dict, norm_stats: dict,
                     dtype: Optional[torch.dtype] = None) -> None:
    """Weights under lerobot's names, both vocabularies whether or not they are tied, and the files beside them; each appears whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept, seen = {}, set()
    for name, tensor in state.items():
        tensor = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        if tensor.data_ptr() in seen:  # safetensors refuses tensors that share memory
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        kept[name] = tensor
    write_weights(folder, kept)
    write_sidecars(folder, config, norm_stats)


def write_sidecars(folder: Path, config: dict, norm_stats: dict) -> None:
    """The small files beside the weights; config.json is lerobot's alone, which refuses keys that it does not know."""
    own = {key: value for key, value in config.items() if key not in ("sizes", "layout")}
    if norm_stats:
        width = len(next(iter(norm_stats.values()))["action"]["q01"])  # of the data that the weights were last trained on
        own["output_features"] = {**own["output_features"], ACTION: {"type": "ACTION", "shape": [width]}}
        write_json(folder / STATISTICS, norm_stats)
        write_json(folder / LEROBOT_STATISTICS, lerobot_statistics(norm_stats))
        if "normalisation" not in next(iter(norm_stats.values()))["action"]:  # of the first, as the width and lerobot's files
            # vlakeep's readers normalise by quantiles, whatever the base did.
            own["normalization_mapping"] = {**own["normalization_mapping"], "STATE": "QUANTILES", "ACTION": "QUANTILES"}
    if "sizes" in config:
        write_json(folder / SIZES_FILE, config["sizes"])
    if config.get("layout"):
        write_json(folder / OWN_FILE, {"layout": config["layout"]})
    if norm_stats and config.get("layout") in (None, DEFAULT):
        write_pipelines(folder, own, lerobot_statistics(norm_stats))
    elif norm_stats:  # lerobot's steps speak its own layout alone
        remove_pipelines(folder)
    write_json(folder / "config.json", own)


def lerobot_statistics(norm_stats: dict) -> dict:
    """The first data set's statistics by lerobot's names, as its `dataset_stats` argument takes them. What vlakeep's readers do not scale
    (a gripper that is 0 or 1) gets quantiles that leave it as it is."""
    entry = next(iter(norm_stats.values()))
    action = entry["action"]
    mask = action.get("mask") or [True] * len(action["q01"])
    ends = {name: [value if scaled else end for value, scaled in zip(action[name], mask)] for name, end in (("q01", -1.0), ("q99", 1.0))}
    found = {ACTION: {**{k: v for k, v in action.items() if k in ("mean", "std", "min", "max")}, **ends}}
    if entry.get("proprio"):
        found[STATE] = {k: v for k, v in entry["proprio"].items() if k in ("mean", "std", "min", "max", "q01", "q99")}
    return found


def read_statistics(folder, config: dict) -> dict:
    """norm_stats by data set, from whichever of the three places has them."""
    folder = Path(folder)
    if (folder / STATISTICS).is_file():
        from vlakeep.models import files

        return files.read_statistics(folder, {})
    found = _json(folder / LEROBOT_STATISTICS) if (folder / LEROBOT_STATISTICS).is_file() else _normaliser_state(folder)
    if ACTION not in found:
        return {}
    mode = config["normalization_mapping"].get("ACTION", "MEAN_STD")
    needed = {"QUANTILES": ("q01", "q99"), "MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "IDENTITY": ()}[mode]
    action = {name: [float(x) for x in values] for name, values in found[ACTION].items() if isinstance(values, list)}
    lacking = [name for name in needed if name not in action]
    if lacking:
        raise CheckpointError(f"the statistics in {folder} lack {', '.join(lacking)} of the action, which normalization_mapping "
                              f"{mode} needs: {_REMEDY}")
    width = action_size(config)
    for name, fill in (("q01", -1.0), ("q99", 1.0)):  # what the rest of vlakeep asks for; MEAN_STD files need not have them
        other = {"q01": "min", "q99": "max"}[name]
        action.setdefault(name, action.get(other, [fill] * width))
        action.setdefault(other, action[name])
    action["mask"] = [True] * width
    if mode != "QUANTILES":
        action["normalisation"] = mode
    proprio = {name: [float(x) for x in values] for name, values in found.get(STATE, {}).items() if isinstance(values, list)}
    return {KEY: {"action": action, **({"proprio": proprio} if proprio else {})}}


def _normaliser_state(folder: Path) -> dict:
    """{feature: {statistic: list}} of lerobot's saved normaliser step; {} when there is none."""
    for name in (PREPROCESSOR, POSTPROCESSOR):
        if not (folder / name).is_file():
            continue
        for step in _json(folder / name).get("steps", []):
            file = folder / str(step.get("state_file"))
            if "normalizer" in str(step.get("registry_name", "")) and file.is_file():
                found: Dict[str, dict] = {}
                for key, tensor in load_file(str(file)).items():
                    feature, _, statistic = key.rpartition(".")
                    found.setdefault(feature, {})[statistic] = tensor.flatten().tolist()
                return found
    return {}
