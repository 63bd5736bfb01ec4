"""The stages of LIBERO: what each reads (core/options.py says how it is written down)."""

from pathlib import Path

from vlakeep.core.options import Option, Stage, names, number, whole
from vlakeep.core.stages import FOLDERS
from vlakeep.libero.env import CAMERA, CAMERAS, SUITES
from vlakeep.libero.expert import APPROACHES
from vlakeep.openvla.sizes import model_options

TASKS = Option("--tasks", [], "Numbers of tasks, with commas between them; none takes all of the suite.", names)
WORKERS = Option("--workers", 1, "Simulator processes; they do not change what is written.", whole())


def suite(default: str) -> Option:
    return Option("--suite", default, "The suite of tasks.", choices=SUITES)


CHECK = Stage("libero-check", "vlakeep.libero.check", "does the LIBERO simulator run here, and as the official data were rendered",
              f"{FOLDERS} evaluate.benchmark")
DEMOS = Stage("libero-demos", "vlakeep.libero.demos", "demonstrations of LIBERO tasks by a scripted expert, as RLDS or HDF5", FOLDERS, own=(
    suite("libero_object"), TASKS, WORKERS,
    Option("--demos", 20, "Demonstrations of each task.", whole()),
    Option("--resolution", 256, "Side of the pictures in pixels.", whole()),
    Option("--first", 1000, "Seed of the first demonstration.", whole(0)),
    Option("--noise", 0.0, "Noise that pushes the hand off its way, as a share of the expert's own motion.", number()),
    Option("--approach", "above", "How the hand comes to a thing.", choices=APPROACHES),
    Option("--format", "rlds", "What is written.", choices=("rlds", "hdf5", "both")),
    Option("--camera", CAMERA, "The picture of the RLDS set.", choices=CAMERAS),
    Option("--wrist", False, "The RLDS set has the camera on the hand too, as wrist_image, for models that take two.", bool),
    Option("--simulate", False, "Simulate only: `states/` may be copied to a machine that renders faster, where the same call without "
           "it goes on.", bool)))
VQA = Stage("libero-vqa", "vlakeep.libero.vqa", "a probe of LIBERO scenes: instructions, and visual questions with known answers",
            f"{FOLDERS} probe.name seed", own=(
    suite("libero_90"), TASKS, WORKERS,
    Option("--items", 500, "Items of the probe, instructions and questions together.", whole()),
    Option("--questions_per_scene", 1, "Questions of each scene, on average.", whole()),
    Option("--first", 0, "Number of the first scene in its split.", whole(0)),
    Option("--split", "probe", "Scenes for what the method protects, or for what --evaluate.probe asks.", choices=("probe", "heldout"))))
PRETRAIN = Stage("pretrain-libero", "vlakeep.libero.pretrain", "a small model of LIBERO demonstrations, from nothing (one GPU)", FOLDERS,
                 file=False, own=(
    *model_options(patch=8, vocab=1600, batch=512, lr=1e-3),
    Option("--data", None, "Names of data sets, with commas between them.", required=True),
    Option("--questions", "", "Names of probes with answers, with commas between them."),
    Option("--key", None, "Name under which the action statistics are stored, such as libero_object.", required=True),
    Option("--share", 0.2, "Part of each batch that asks a question.", number()),
    Option("--image", 128, "Side of the model's pictures in pixels.", whole())))
TRAIN_BASE = Stage("train-base", "vlakeep.libero.train_base", "a mid-size base: an assembled model learns LIBERO, in pieces (one GPU)",
                   FOLDERS, file=False, own=(
    Option("--base", None, "The model to begin with: a folder of assemble-openvla, or its name.", required=True),
    Option("--out", None, "The folder that is written, in float32; the state of the training lies in OUT-training.", Path, required=True),
    Option("--data", None, "KEY=NAME with commas between them: data sets, and the name of their action statistics; sets of one key share "
           "them.", names, required=True),
    Option("--questions", [], "Names of probes with answers, with commas between them.", names),
    Option("--texts", None, "A file of own-texts; null trains without.", Path),
    Option("--begin_with", None, "A difference of base-delta, from the same parts: the training goes on from there, with a schedule of its "
           "own; null begins with nothing.", Path),
    Option("--steps", 13_000, "Optimizer steps of the whole training.", whole()),
    Option("--stop_after", None, "Seconds after which this call saves and ends, reading the data included; the same call goes on.",
           number(above=True)),
    Option("--done_after", None, "Seconds after which the whole training is done, reading the data and compiling included: the schedule "
           "follows the clock, and --steps is not asked.", number(above=True)),
    Option("--batch", 256, "Samples per step.", whole()),
    Option("--text_rows", 32, "Texts per step beside the samples.", whole()),
    Option("--text_weight", 1.0, "Weight of the KL on texts.", number()),
    Option("--share", 0.15, "Part of the samples of a step that ask a question.", number()),
    Option("--rank", 64, "Of the change of every linear.", whole()),
    Option("--lr", 1e-3, "Highest rate of the schedule.", number(above=True)),
    Option("--processes", None, "Processes that read the pictures; null takes one per core.", whole()),
    Option("--near", False, "Pictures are resized by Pillow, in less than half the time, and off by a grey level here and there.", bool),
    Option("--seed", 0, "Seed of the adapters and of the order.", whole(0)),
    Option("--device", "cuda", "cuda or cpu."),
    Option("--compile", False, "Fuse the kernels of each layer, after a minute or two.", bool)))
STAGES = (CHECK, DEMOS, VQA, PRETRAIN, TRAIN_BASE)
