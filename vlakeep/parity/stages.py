"""The stages that compare with the official code: what each reads (core/options.py says how it is written down)."""

from pathlib import Path

from vlakeep.core.options import Option, Stage, whole
from vlakeep.core.stages import FOLDERS

GOLDEN = Stage("verify-golden", "vlakeep.parity.verify_golden", "compare with numbers recorded from the official OpenVLA code",
               FOLDERS, file=False, own=(
    Option("folders", None, "Folders of golden data, or ones that hold several.", Path, required=True, many=True),
    Option("--tokenizer", None, "Folder with tokenizer.json or tokenizer.model.", Path)))
OPENVLA = Stage("verify-openvla", "vlakeep.parity.verify_openvla", "compare vlakeep's model with the official code of your checkout",
                FOLDERS, file=False, own=(
    Option("--openvla_dir", None, "The folder of an OpenVLA checkout.", required=True),
    Option("--checkpoint", "tabletop-base", "Base model that is compared."),
    Option("--tokenizer", None, "Folder with a Llama-2 tokenizer, for golden folders.", Path),
    Option("--dtype", "float32", "Data type of the weights.", choices=("bfloat16", "float32")),
    Option("--device", "auto", "cpu, cuda, or auto.")))
PI0_FAST = Stage("verify-pi0-fast", "vlakeep.parity.verify_pi0_fast", "check a pi0-FAST folder, and compare with lerobot's classes",
                 FOLDERS, file=False, own=(
    Option("--checkpoint", None, "A folder in lerobot's format, or a model of the cache.", required=True),
    Option("--lerobot", False, "Compare with lerobot's policy, which must be installed.", bool),
    Option("--data", None, "Folder of a data set whose frames are shown; null takes random ones."),
    Option("--frames", 4, "How many frames.", whole()),
    Option("--layout", None, "lerobot or openpi; null takes what the folder records.", choices=("lerobot", "openpi")),
    Option("--cameras", None, "Names of the model's cameras, with commas between them; null takes those of config.json."),
    Option("--state", None, "Numbers of the state; null takes those of config.json.", whole(0)),
    Option("--dtype", "float32", "Data type of the weights.", choices=("bfloat16", "float32")),
    Option("--device", "auto", "cpu, cuda, or auto.")))
STAGES = (GOLDEN, OPENVLA, PI0_FAST)
