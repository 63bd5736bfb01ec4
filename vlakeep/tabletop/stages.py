"""The stages of the tabletop: what each reads (core/options.py says how it is written down)."""

from pathlib import Path

from vlakeep.core.options import Option, Stage, names, number, whole
from vlakeep.core.stages import FOLDERS
from vlakeep.openvla.sizes import model_options

DATA = Stage("tabletop-data", "vlakeep.tabletop.data", "make the demonstrations and the probe of the tabletop benchmark",
             f"{FOLDERS} seed data.datasets probe", own=(
    Option("--skills", None, "Names of skills, with commas between them; null takes the data sets of data.datasets.", names),
    Option("--episodes", None, "Demonstrations of each skill; null takes 200.", whole())))
PRETRAIN = Stage("pretrain-tabletop", "vlakeep.tabletop.pretrain", "rebuild the small model that ships with vlakeep (one GPU)", own=(
    *model_options(),
    Option("--frames", 800_000, "Frames that are trained on.", whole()),
    Option("--questions", 0.4, "Share of frames that carry a question.", number())))
PRETRAIN_PI0 = Stage("pretrain-tabletop-pi0", "vlakeep.tabletop.pretrain_pi0_fast", "make and train a small pi0-FAST on the tabletop", own=(
    Option("--out", None, "The folder that is written.", Path, required=True),
    Option("--minutes", 30.0, "Time for optimisation; making the data comes on top.", number()),
    Option("--episodes", 400, "Expert episodes of each known skill.", whole()),
    Option("--questions", 20_000, "Frames with a question.", whole(0)),
    Option("--chunk", 4, "Actions of an answer.", whole()),
    Option("--codes", 256, "Codes of the FAST codec.", whole()),
    Option("--batch", 128, "Samples per step.", whole()),
    Option("--lr", 1e-3, "Highest rate of the schedule.", number()),
    Option("--hidden", 128, "Width of both models.", whole()),
    Option("--layers", 6, "Decoder layers.", whole()),
    Option("--heads", 4, "Query heads; there is one key head.", whole()),
    Option("--mlp", 384, "Width of the decoder's MLPs.", whole()),
    Option("--seed", 0, "Seed of weights, data and order.", whole(0)),
    Option("--device", "cuda", "cuda or cpu.")))
STAGES = (DATA, PRETRAIN, PRETRAIN_PI0)
