"""lerobot's processing pipelines of a checkpoint: what it does to observations before the model, and to actions behind it.

    policy_preprocessor.json    policy_preprocessor_step_3_normalizer_processor.safetensors
    policy_postprocessor.json   policy_postprocessor_step_0_unnormalizer_processor.safetensors

As lerobot 0.6.1 saves them, which newer ones read too. Tokenizers are names of the hub, or folders beside these files; the latter
lerobot looks for where it is started. Nothing of lerobot is needed to write them.

Sources: lerobot v0.6.1 policies/pi0_fast/processor_pi0_fast.py:92-165 (the steps), processor/pipeline.py:361-466 (names and JSON),
normalize_processor.py:228-264, tokenizer_processor.py:272-294 and 540-560, relative_action_processor.py:149-206, device_processor.py:171.
"""

from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch
from safetensors.torch import save_file

from vlakeep.core.storage import atomic_path
from vlakeep.models.files import write_json

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
NORMALISE, UNNORMALISE = "normalizer_processor", "unnormalizer_processor"


def write_pipelines(folder: Path, config: dict, statistics: Dict[str, Dict[str, List[float]]]) -> None:
    """Replace both pipelines of a folder. config: its config.json; statistics: of action and state, by lerobot's names."""
    scaling = {"eps": 1e-8, "norm_map": config["normalization_mapping"]}
    inputs, outputs = config["input_features"], config["output_features"]
    relative = bool(config.get("use_relative_actions", False))
    text = config["text_tokenizer_name"]
    before: List[Tuple[str, Dict[str, Any]]] = [
        ("rename_observations_processor", {"rename_map": {}}),
        ("to_batch_processor", {}),
        ("relative_actions_processor", {"enabled": relative, "exclude_joints": config.get("relative_exclude_joints", ["gripper"]),
                                        "action_names": config.get("action_feature_names")}),
        (NORMALISE, {**scaling, "features": {**inputs, **outputs}}),
        ("pi0_fast_prepare_state_tokenizer_processor_step", {}),
        ("tokenizer_processor", {"max_length": config["tokenizer_max_length"], "task_key": "task", "padding_side": "right",
                                 "padding": "max_length", "truncation": True, "tokenizer_name": text}),
        ("action_tokenizer_processor", {"trust_remote_code": True, "max_action_tokens": config["max_action_tokens"],
                                        "fast_skip_tokens": config["fast_skip_tokens"], "paligemma_tokenizer_name": text,
                                        "action_tokenizer_name": config["action_tokenizer_name"]}),
        ("device_processor", {"device": config.get("device") or "cpu", "float_dtype": None}),
    ]
    behind: List[Tuple[str, Dict[str, Any]]] = [
        (UNNORMALISE, {**scaling, "features": outputs}), ("absolute_actions_processor", {"enabled": relative}),
        ("device_processor", {"device": "cpu", "float_dtype": None})]
    remove_pipelines(folder)
    state = {f"{feature}.{name}": torch.tensor(values, dtype=torch.float32)
             for feature, found in statistics.items() for name, values in found.items()}
    for file, steps in ((PREPROCESSOR, before), (POSTPROCESSOR, behind)):
        name, entries = Path(file).stem, []
        for number, (step, own) in enumerate(steps):
            entry: Dict[str, Any] = {"registry_name": step, "config": own}
            if step in (NORMALISE, UNNORMALISE):
                entry["state_file"] = state_file = f"{name}_step_{number}_{step}.safetensors"
                with atomic_path(folder / state_file) as partial:
                    save_file(state, str(partial))
            entries.append(entry)
        write_json(folder / file, {"name": name, "steps": entries})


def remove_pipelines(folder: Path) -> None:
    """Those of another training are worse than none."""
    for file in (PREPROCESSOR, POSTPROCESSOR):
        for old in (folder / file, *folder.glob(f"{Path(file).stem}_step_*.safetensors")):
            old.unlink(missing_ok=True)
