"""The arms side by side on the tabletop: new skills x seeds x arms, each trained and evaluated by the stages themselves.

    python studies/graded_study.py JOBS.json OUT.jsonl [--workers 15] [--seconds 540] [--device cuda] [--root DIR]
    python studies/graded_study.py --table OUT.jsonl [MORE.jsonl ...]

JOBS.json is a list of {"skill", "seed", "arm", "args": [...], "rollouts": true, "pool": 2000}; `--make main` (or setpoint, ablations,
practice) prints such a list; pool is how many items the probe holds of which probe.size are taken (default: as many). A line of
OUT.jsonl is one run: success on the new skill and on the six old ones (50 episodes each, the same start states for all arms), questions,
the divergence on the held-out probe items and on the new task's prompts, seconds. Workers take the jobs in order, one after the other,
and begin none after --seconds; runs that OUT.jsonl holds already are left out. Data and artefacts are made once by whoever needs them
first.
"""

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

SKILLS = ["corner", "path", "order", "relation", "repeat"]
SEEDS = [11, 12, 13, 14, 15]
STEPS = "400"
GRADED, FROZEN = ["--config", "configs/method_graded.yaml"], ["--config", "configs/method_icsm_hsw_thermostat.yaml"]
PLAIN = [*GRADED, "--gains.enabled", "false"]  # the baseline to the bit, with the sensor measuring
ARMS = {
    "plain 2e-3": PLAIN,
    "plain 1e-3": [*PLAIN, "--train.lr", "1e-3"],
    "plain 5e-4": [*PLAIN, "--train.lr", "5e-4"],
    "frozen form": FROZEN,
    "hard": [*FROZEN, "--hsw.site", "lora_input"],
    "graded fixed": [*GRADED, "--thermostat.enabled", "false", "--gains.opening", "1e-3"],
    "set-point .002": [*GRADED, "--thermostat.target", "0.002"],
    "set-point .005": [*GRADED, "--thermostat.target", "0.005"],
    "set-point .015": [*GRADED, "--thermostat.target", "0.015"],
}
DISTILLED = ["--config", "configs/method_distillation.yaml"]
BOTH = [*DISTILLED, "--gains.enabled", "true"]
# Prevention and correction together, and a sensor that no single item can move; in the order in which they matter.
PRACTICE = {
    "set-point .005, w 1": [*BOTH, "--options.moves", "opening", "--thermostat.target", "0.005"],
    "set-point .005": ARMS["set-point .005"],
    "r 1e-2, w 1": [*BOTH, "--gains.opening", "1e-2"],
    "set-point .015, w 1": [*BOTH, "--options.moves", "opening", "--thermostat.target", "0.015"],
    "set-point .015": ARMS["set-point .015"],
    "r 1e-2, w .3": [*BOTH, "--gains.opening", "1e-2", "--options.weight", "0.3"],
    "r 1e-1, w 1": [*BOTH, "--gains.opening", "1e-1"],
    "w 1, probe 2000": [*DISTILLED, "--probe.size", "2000"],
}
OLD = ["reach", "side", "pick", "tap", "drop", "place"]


def make_jobs(what: str, skills) -> list:
    if what == "main":
        return [{"skill": skill, "seed": seed, "arm": arm, "args": args, "rollouts": True}
                for skill in skills for seed in SEEDS for arm, args in ARMS.items()]
    if what == "setpoint":
        return [{"skill": skills[0], "seed": 11, "arm": f"target {target} lr {lr} rank {rank}", "rollouts": False,
                 "args": [*GRADED, "--thermostat.target", target, "--train.lr", lr, "--lora.rank", rank, "--lora.alpha", rank]}
                for target in ("0.002", "0.005", "0.015") for lr in ("5e-4", "1e-3", "2e-3") for rank in ("8", "32")] + [
               {"skill": skills[0], "seed": 11, "arm": f"fixed r 1e-3 lr {lr} rank {rank}", "rollouts": False,
                "args": [*ARMS["graded fixed"], "--thermostat.enabled", "false", "--train.lr", lr, "--lora.rank", rank, "--lora.alpha",
                         rank]} for lr in ("5e-4", "1e-3", "2e-3") for rank in ("8", "32")]
    if what == "practice":
        return [{"skill": skill, "seed": seed, "arm": arm, "args": args, "rollouts": True, "pool": 2000}
                for seed in SEEDS[:2] for arm, args in PRACTICE.items() for skill in skills]
    changes = {f"p {p}": ["--gains.steepness", p] for p in ("0.5", "1", "2", "4")}
    changes.update({f"s {s}": ["--gains.scale", s] for s in ("1", "3", "30", "100")})
    changes.update({f"allocation {a}": ["--gains.allocation", a] for a in ("model", "sensitivity")})
    changes.update({f"modules {m}": ["--lora.modules", f"[{m}]"] for m in (
        "attention", "gate_proj, up_proj", "attention, gate_proj, up_proj", "mlp")})
    changes["last 3 layers"] = ["--lora.layers", "last:3"]
    changes["sgd"] = ["--train.optimizer", "sgd", "--train.lr", "0.3"]
    changes["800 steps"] = ["--train.steps", "800"]
    return [{"skill": skill, "seed": seed, "arm": arm, "args": [*GRADED, *args], "rollouts": True, "offline": "lora" in " ".join(args)}
            for skill in skills for seed in SEEDS[:2] for arm, args in changes.items()]


def key(job) -> tuple:
    return job["skill"], job["seed"], job["arm"]


def configuration(job, device: str, root: Path, more=()):
    from vlakeep.core.config import config_from_argv, known_keys

    new = ["--evaluate.new_skill", job["skill"]] if "evaluate.new_skill" in known_keys() else []
    common = ["--seed", str(job["seed"]), "--device", device, "--threads", "1", "--root", str(root), "--data.datasets",
              f"[tabletop_{job['skill']}]", "--evaluate.questions_per_kind", "50", "--evaluate.retention_frames",
              "100", "--train.log_every", "10", "--train.tensorboard", "false", "--data.statistics", "tabletop"]
    steps = [] if "--train.steps" in job["args"] else ["--train.steps", STEPS]
    return config_from_argv([*job["args"], *common, *steps, *new, *[str(m) for m in more]])


def made_once(folder: Path, make) -> None:
    """Call `make` unless this was done in `folder` before, by any process; others wait for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not Path(f"{folder}.made").exists():
            make()
            Path(f"{folder}.made").touch()


def run_job(job, device: str, root: Path) -> dict:
    """Train and evaluate one arm; what a cell (skill, seed, probe) shares is made on first use."""
    from vlakeep.core.rundir import read_metrics
    from vlakeep.core.storage import Storage
    from vlakeep.evaluate import load_target, run_evaluation
    from vlakeep.offline import run_offline
    from vlakeep.tabletop.data import write_tabletop_data
    from vlakeep.train import TrainingStopped, run_training

    name = "".join(c if c.isalnum() or c in ".-" else "_" for c in job["arm"])
    config = configuration(job, device, root, ["--name", name, "--evaluate.target", name])
    size, pool = config.probe.size, job.get("pool", config.probe.size)
    cell = root / f"{job['skill']}-{job['seed']}-{pool}"
    config = configuration(job, device, cell, ["--name", name, "--evaluate.target", name])
    storage = Storage.from_config(config)
    config.probe.size = pool
    made_once(cell / "data", lambda: write_tabletop_data(config, storage))
    config.probe.size = size
    graded = config.method != "icsm_hsw_thermostat"  # all others use its artefact
    made_of = [config.lora.layers.replace(":", ""), *config.lora.modules, str(config.gains.balance), str(size)]
    config.gains.name = "-".join(["graded", *made_of])
    made_once(cell / (config.gains.name if graded else "frozen"), lambda: run_offline(config, storage))
    started = time.perf_counter()
    stopped = None
    try:
        run_training(config, storage)
    except TrainingStopped as error:
        stopped = str(error)
    trained = time.perf_counter() - started
    row = dict(job, stopped=stopped, train_seconds=trained)
    rows = read_metrics(storage.run_folder(name))
    row["loss"] = statistics.mean([r["loss"] for r in rows if "loss" in r][-3:])
    row["trace"] = [[r["step"], r["kl"], r.get("opening"), r.get("kl_new")] for r in rows if "kl" in r]
    row["settled"] = rows[-1].get("settled_kl")
    if stopped:
        return row
    row.update(divergence_on_probe(config, storage, job, device, cell, load_target))
    if job.get("rollouts", True):
        started = time.perf_counter()
        summary = json.loads((run_evaluation(config, storage) / "summary.json").read_text())
        row["new"] = summary["new_skill"]["mean"]
        row["old"] = {skill: summary["abilities"][skill]["mean"] for skill in OLD}
        row["questions"] = statistics.mean(v["mean"] for v in summary["abilities"].values() if v["group"] == "question")
        row["action_kl"] = summary["retention_kl"]["mean"]
        row["evaluate_seconds"] = time.perf_counter() - started
    return row


def divergence_on_probe(config, storage, job, device, cell, load_target) -> dict:
    """Mean divergence over all held-out probe items, and by prompts that ask for actions and questions."""
    import torch

    from vlakeep.core.parallel import pick_device
    from vlakeep.methods import graded_offline
    from vlakeep.probe.probe_set import ProbeSet
    from vlakeep.teacher.artifact import load_artifact
    from vlakeep.thermostat.kl_sensor import KLSensor, batched

    backbone = load_target(config, storage, pick_device(device))[0]
    folder = graded_offline.artifact_folder(config, storage, backbone.name)
    if not folder.is_dir():
        return {}
    answered, items = load_artifact(folder).answers()
    probe = ProbeSet(storage.probe_folder(config.probe.name))
    each = KLSensor(backbone, answered, batched(probe.samples(items), backbone.processor, 32), 32).per_item().cpu()
    asked = torch.tensor([probe.items[i]["question"] for i in items])
    return {"kl": float(each.mean()), "kl_actions": float(each[~asked].mean()), "kl_questions": float(each[asked].mean())}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*")
    for name, default, kind in (("workers", 0, int), ("worker", 0, int), ("seconds", 1e9, float), ("device", "auto", str),
                                ("root", None, str), ("make", None, str), ("skills", ",".join(SKILLS), str)):
        parser.add_argument(f"--{name}", default=default, type=kind)
    parser.add_argument("--table", action="store_true")
    own = parser.parse_args()
    if own.make:
        print(json.dumps(make_jobs(own.make, own.skills.split(","))))
        return 0
    if own.table:
        print(table([json.loads(line) for file in own.files for line in Path(file).read_text().splitlines()]))
        return 0
    jobs, out = json.loads(Path(own.files[0]).read_text()), Path(own.files[1])
    root = Path(own.root or tempfile.mkdtemp())
    if own.workers:
        command = [sys.executable, __file__, *own.files, "--seconds", str(own.seconds), "--device", own.device, "--root", str(root)]
        return max(one.wait() for one in [subprocess.Popen([*command, "--worker", str(i)]) for i in range(own.workers)])
    done = {key(json.loads(line)) for line in (out.read_text().splitlines() if out.exists() else [])}
    began = time.perf_counter()
    for job in jobs:
        claim = root / "claims" / "-".join(map(str, key(job))).replace("/", "_")
        if time.perf_counter() - began > own.seconds or key(job) in done or not claimed(claim):
            continue
        try:
            row = run_job(job, own.device, root)
        except Exception as error:  # one arm that fails must not take the others along
            traceback.print_exc()
            row = dict(job, error=f"{type(error).__name__}: {error}")
        with open(out, "a") as file:  # one short write: lines of several workers do not mix
            file.write(json.dumps(row) + "\n")
    return 0


def claimed(path: Path) -> bool:
    """Whether this process is the first to ask for the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def spread(values) -> str:
    """Mean and half of its 95 % interval over runs (t distribution for few of them)."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    t = {2: 12.7, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.06 if len(values) < 30 else 1.98)
    return f"{mean:.3f} ±{t * statistics.stdev(values) / len(values) ** 0.5:.3f}"


def table(rows) -> str:
    """Markdown: one line an arm, means over skills and seeds with 95 % intervals over runs."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    lines = ["| arm | runs | loss | new skill | six old skills | worst old | questions | KL probe | KL actions | train s |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm and "error" not in row and not row.get("stopped")]
        if not own:
            lines.append(f"| {arm} | 0 | | | | | | | | |")
            continue
        cells = [spread([row["loss"] for row in own])]
        played = [row for row in own if "new" in row]
        cells += [spread([row["new"] for row in played]), spread([statistics.mean(row["old"].values()) for row in played]),
                  f"{min(min(row['old'].values()) for row in played):.2f}",
                  spread([row["questions"] for row in played])] if played else [""] * 4
        measured = [row["kl"] for row in own if "kl" in row]
        cells += [f"{statistics.mean(measured):.4f}" if measured else "",
                  f"{statistics.mean(row['kl_actions'] for row in own if 'kl_actions' in row):.4f}" if measured else ""]
        cells.append(f"{statistics.mean(row['train_seconds'] for row in own):.0f}")
        lines.append(f"| {arm} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
