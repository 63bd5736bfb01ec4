"""The stages of no single benchmark: what each reads (options.py says how it is written down)."""

from pathlib import Path

from vlakeep.core.hardware import DECIDED, NAMES
from vlakeep.core.options import Option, Stage, names, number, numbers, together, whole, wholes
from vlakeep.core.storage import KEYS

FOLDERS = " ".join(["root", *KEYS])
STATE = "seed device threads"  # how a model is made and run
# Offline, the closing pass and the graded arm look at the same spectrum.
SPECTRUM = "gains.name gains.columns gains.holdout gains.balance"
SOURCES = ("data.datasets data.train_fraction data.camera data.cameras data.state data.gripper data.rotate data.degenerate data.cards "
           "data.skip_bad")
LARGE = Option("--large_file_gb", 1.0, "Files of this size and more in a source tree are red.", number(above=True))
HARDWARE = Option("--hardware", None, "The card: data type, attention, micro-batch and checkpointing are chosen for it and printed with "
                  "the reason. What else the command line says beats it, and it beats the file; null leaves all as it is.", choices=NAMES)
GPUS = Option("--gpus", 1, "Processes of this machine, one a GPU, started by torchrun; the result does not depend on how many.", whole())

AUDIT = Stage("audit-probe", "vlakeep.openvla.audit", "print token by token what of a probe prompt counts as instruction",
              f"{FOLDERS} backbone -backbone.quantisation probe")
PROBE_ADD = Stage("probe-add", "vlakeep.probe.extend", "a probe with frames of data sets beside its items, for a stream of tasks",
                  f"{FOLDERS} probe {SOURCES}", own=(
    Option("--to", None, "Name of the probe that is written.", required=True),
    Option("--frames", 64, "Frames of each data set.", whole())))
PROBE_SELECT = Stage("probe-select", "vlakeep.probe.selection", "a probe of some kinds of items of another, to see what a probe must hold",
                     f"{FOLDERS} probe.name", own=(
    Option("--kinds", None, "Kinds that are taken, with commas between them: names, patterns such as task:*, questions, skills.", names,
           required=True),
    Option("--to", None, "Name of the probe that is written.", required=True),
    Option("--size", None, "Items of it, evenly spread over those that fit; null takes them all.", whole())))
OFFLINE = Stage(
    "offline", "vlakeep.offline", "the frozen teacher's ICSM subspaces and Thermostat statistics, once per base model",
    f"{FOLDERS} method options {STATE} backbone lora.layers lora.modules {SOURCES} probe icsm {SPECTRUM} gains.keep gains.steepness "
    "gains.enabled gains.of_first train.from_run", own=(HARDWARE, GPUS))
TRAIN = Stage("train", "vlakeep.train", "fine-tune LoRA adapters, plain (baseline) or with the method",
              f"{FOLDERS} name method options {STATE} backbone lora data probe icsm hsw gains -gains.keep thermostat train",
              own=(HARDWARE,))
EVALUATE = Stage("evaluate", "vlakeep.evaluate", "new skill, old abilities and drift of a run, one record per trial",
                 f"{FOLDERS} device threads backbone {SOURCES} data.image_aug data.source data.statistics probe icsm.layers "
                 "icsm.batch_size evaluate",
                 own=(HARDWARE, GPUS, Option("--as", None, "Name under which the evaluation is kept, CELL or GROUP/CELL, such as one of "
                                             "the base with other settings; null takes the target's.")))
PREFLIGHT = Stage("preflight", "vlakeep.preflight", "check everything a stage needs, and say how to mend what is missing",
                  together(OFFLINE, TRAIN, EVALUATE), own=(
    Option("--stage", "train", "The stage whose inputs are checked.", choices=("offline", "train", "evaluate")),
    Option("--gpus", 1, "GPUs that the stage will run on.", whole()), HARDWARE, LARGE))
REPORT = Stage("report", "vlakeep.report", "tables, figures and an HTML page that compare evaluated runs",
               f"{FOLDERS} backbone.checkpoint evaluate.benchmark", own=(
    Option("--runs", "base,baseline,method", "Names of the arms, with commas between them; arm=run takes a run of another name."),
    Option("--out", None, "Folder that is written; null takes ROOT/report."),
    Option("--title", "vlakeep report", "Title of the page."),
    Option("--seconds", None, "Time of the whole experiment; null adds up training and evaluation.", number())))
EXPORT = Stage("export", "vlakeep.export", "merge a run's adapter into the base weights, in the official directory format",
               f"{FOLDERS} name {STATE} backbone {SOURCES} probe icsm.batch_size icsm.tokens_generated {SPECTRUM} export", own=(
    HARDWARE, Option("--closed-only", False, "With --export.close_to: write the closed adapter as a run and merge nothing.", bool)))
INTERPOLATE = Stage("interpolate", "vlakeep.interpolate", "a run's adapter at several strengths between the base and itself, each a run",
                    f"{FOLDERS} name export.target export.overwrite", own=(
    Option("--alphas", [0.2, 0.4, 0.6, 0.8], "Strengths, with commas between them: 0 is the base, 1 the run.", numbers),
    Option("--modules", [], "Linears that are weakened, by the last part of their names, such as q_proj; the others keep theirs.", names)))
ADOPT = Stage("adopt", "vlakeep.adopt", "an adapter that was trained elsewhere, such as by the official finetune.py, as a run",
              f"{FOLDERS} name device backbone", own=(
    Option("--adapter", None, "Folder of the adapter: adapter_config.json and adapter_model.safetensors, as PEFT saves them.", Path,
           required=True),
    Option("--statistics", None, "dataset_statistics.json of its actions; null takes the one beside the adapter.", Path),
    Option("--step", 0, "Steps that it was trained for, for the name of the checkpoint.", whole(0))))
STUDY = Stage("study", "vlakeep.study", "arms x tasks x rates x seeds, trained and evaluated; goes on where it was stopped",
              f"{FOLDERS} {' '.join(DECIDED)}", file=False, own=(
    Option("study", None, "The study file (core/study.py says what it holds), such as studies/rivals_small.yaml.", required=True),
    Option("--hardware", None, "The card of a cell: sets in all cells what nobody names of data type, attention, 4 bits, micro-batch and "
           "checkpointing, and what is named and the card cannot do, and prints it with the reason. Give it whenever the study is called. "
           "The command line's keys beat it, and are for it alone; null leaves the cells as the file has them.", choices=NAMES),
    Option("--workers", 1, "Cells that run at a time.", whole()),
    Option("--scheduler", "local", "Where cells run: processes of this machine, a SLURM cluster by submitit, or many machines by Ray.",
           choices=("local", "slurm", "ray")),
    Option("--resources", [], "What a cell asks of the scheduler, NAME=VALUE with commas between them, such as num_gpus=0.25.", names),
    Option("--dry-run", False, "Show the cells, what each has still to do, what it costs and what is missing; do nothing.", bool),
    Option("--table", False, "Write the tables of what is done; run nothing.", bool),
    Option("--report", False, "Write the report of what is done: a page, tables and figures; run nothing.", bool),
    Option("--paper", None, "Write a table or figure of a paper: T1 to T4, T6, T7, F1, F3 (studies/paper.py), or all of them.",
           choices=("T1", "T2", "T3", "T4", "T6", "T7", "F1", "F3", "all")),
    Option("--out", None, "Folder of the report, or of --paper; null takes `report` or `paper` in the study's folder."),
    Option("--cell", None, "Run this cell alone, in this process."),
    Option("--rerun", 0, "Run so many cells of which there are records again, drawn at random, and compare; the exit status says whether "
           "all are the same to the bit.", whole()),
    Option("--again", False, "The study under the name NAME_again, beside what was run; --rerun runs its cells so.", bool),
    Option("--arms", [], "Only these arms, with commas between them.", names),
    Option("--tasks", [], "Only these tasks.", names),
    Option("--rates", [], "Only these learning rates.", numbers),
    Option("--seeds", [], "Only these training seeds.", wholes),
    Option("--chosen", None, "Only what is to be reported: the setting that the rule chooses of each family (matched), or its best by "
           "success (best), on the seeds that do not choose.", choices=("matched", "best")),
    Option("--part", 1, "Which of --parts shares of the cells is run, counted from 1; each on a machine of its own.", whole()),
    Option("--parts", 1, "Shares into which the cells are dealt out.", whole()),
    Option("--seconds", None, "Start no cell after so many seconds; those that run are finished.", number(above=True)),
    Option("--export", None, "Write the records of all cells that are done to this file, and with each cell that ends.", str),
    Option("--import", [], "Take in records that --export wrote elsewhere; these files, with commas between them. Runs nothing.", names)))
PLAN = Stage("plan", "vlakeep.plan", "peak memory and time of every stage on a card, and what to change when it does not fit",
             together(OFFLINE, TRAIN, EVALUATE, EXPORT), own=(
    HARDWARE, Option("--gpus", 1, "GPUs that train side by side, each with the whole frozen model, and divide an evaluation.", whole()),
    Option("--gib", None, "Memory of a card that may be reserved; null takes the profile's.", number(above=True))))
FETCH = Stage("fetch", "vlakeep.core.fetch", "bring a base model or data set from the hub below the storage root, with retries", FOLDERS,
              file=False, own=(
    Option("model", None, "A model of the hub, such as openvla/openvla-7b."),
    Option("--dataset", None, "A data set of the hub, OWNER/NAME, instead."),
    Option("--only", [], "Folders of a --dataset that is a collection, with commas between them: each becomes a data set of its own. None "
           "takes the whole as one data set.", names)))
STORAGE_CHECK = Stage("storage-check", "vlakeep.preflight", "check that all big files lie below the storage root; free space",
                      f"{FOLDERS} backbone.checkpoint backbone.openvla_dir data.datasets probe.name", (LARGE,), "storage_check")
DEMO = Stage("demo", "vlakeep.demo", "the whole pipeline on the small model that ships with vlakeep, in minutes on a CPU",
             together(OFFLINE, TRAIN, EVALUATE) + " -name -train.save_every -train.keep_last -evaluate.target", file=False, own=(
    Option("--model", "openvla", "Which of the small models.", choices=("openvla", "pi0_fast")),))
STAGES = (DEMO, PLAN, PREFLIGHT, STORAGE_CHECK, FETCH, AUDIT, PROBE_ADD, PROBE_SELECT, OFFLINE, TRAIN, EVALUATE, REPORT, EXPORT,
          INTERPOLATE, ADOPT, STUDY)
