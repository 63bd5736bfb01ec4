"""The stages of the tabletop: what each reads (core/options.py says how it is written down)."""

from vlakeep.core.options import Option, Stage, names, number, whole
from vlakeep.core.stages import FOLDERS
from vlakeep.openvla.sizes import model_options

DATA = Stage("tabletop-data", "vlakeep.tabletop.data", "make the demonstrations and the probe of the tabletop benchmark",
             f"{FOLDERS} seed data.datasets probe", own=(
    Option("--skills", None, "Names of skills, with commas between them; null takes the data sets of data.datasets.", names),
    Option("--episodes", None, "Demonstrations of each skill; null takes 200.", whole())))
PRETRAIN = Stage("pretrain-tabletop", "vlakeep.tabletop.pretrain", "rebuild the small model that ships with vlakeep (one GPU)",
                 FOLDERS, file=False, own=(
    *model_options(),
    Option("--frames", 800_000, "Frames that are trained on.", whole()),
    Option("--questions", 0.4, "Share of frames that carry a question.", number())))
PRETRAIN_PI0 = Stage("pretrain-tabletop-pi0", "vlakeep.tabletop.pretrain_pi0_fast", "make and train a small pi0-FAST on the tabletop",
                     FOLDERS, file=False, own=(
    *model_options(batch=512, vocab=512),
    Option("--frames", 600_000, "Frames that are trained on.", whole()),
    Option("--questions", 0.4, "Share of frames that carry a question.", number()),
    Option("--chunk", 4, "Actions of an answer.", whole()),
    Option("--codes", 512, "Codes of the FAST codec.", whole())))
STAGES = (DATA, PRETRAIN, PRETRAIN_PI0)
