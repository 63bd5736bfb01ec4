"""The stages that compare with the official code: what each reads (core/options.py says how it is written down)."""

from pathlib import Path

from vlakeep.core.options import Option, Stage

GOLDEN = Stage("verify-golden", "vlakeep.parity.verify_golden", "compare with numbers recorded from the official OpenVLA code", own=(
    Option("folders", None, "Folders of golden data, or ones that hold several.", Path, required=True, many=True),
    Option("--tokenizer", None, "Folder with tokenizer.json or tokenizer.model.", Path)))
OPENVLA = Stage("verify-openvla", "vlakeep.parity.verify_openvla", "compare vlakeep's model with the official code of your checkout", own=(
    Option("--openvla_dir", None, "The folder of an OpenVLA checkout.", required=True),
    Option("--checkpoint", "tabletop-base", "Base model that is compared."),
    Option("--tokenizer", None, "Folder with a Llama-2 tokenizer, for golden folders.", Path),
    Option("--dtype", "float32", "Data type of the weights.", choices=("bfloat16", "float32")),
    Option("--device", "auto", "cpu, cuda, or auto.")))
STAGES = (GOLDEN, OPENVLA)
