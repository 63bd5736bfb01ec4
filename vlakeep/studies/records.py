"""What a cell of a study leaves, as one line: every outcome, the curves of its training, and what it was made from.

    vlakeep study studies/X.yaml --part 2 --parts 4 --export part2.jsonl       # on another machine
    vlakeep study studies/X.yaml --import part1.jsonl,part2.jsonl              # where the study is put together

Tables, statistics and report of a study read these records and nothing else, so that cells that ran elsewhere count as those that ran here.

    format, study, cell, arm, task, rate, seed
    settings     key -> value of what differs from the defaults and decides a number of the run
    evaluate     the settings of the evaluation (header of its records.jsonl)
    of           of a cell that is made of another's run: that arm, and `alpha` (with `modules`), `close_to` or `at` (absent in others)
    weights      SHA-256 of the adapter, of the base for the base
    stream, position    of a stream: its abilities in order, and which of them this cell learned (absent in others)
    trials       `new:NAME`, `skill:NAME`, `question:NAME`, `stream:NAME` (other tasks of the stream) -> `outcomes`, a digit a trial in the
                 order of the trials (1 success, 0 failure, x crash), and `seeds` of the start states, [first, step] where they count up
    action_kl    nats, one per frame; null for the base
    drift, probe_kl, followed    as in summary.json; the last divergence on the probe
    curves       logged training values by name, beside `step`; of a checkpoint up to its step, none of an adapter made of a run
    seconds      `train` (of a checkpoint up to its step), `evaluate`; in no table that is compared to the byte
    made         commit, versions, hardware, hashes of what was read
"""

import json
import lzma
import math
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence

from vlakeep.core.config import Config, ConfigError, to_dict
from vlakeep.core.errors import quoted
from vlakeep.core.evaluated import HOW, evaluation_differences
from vlakeep.core.sameness import config_differences, flat, usual
from vlakeep.core.storage import Storage, atomic_write
from vlakeep.core.study import DONE, Cell, State, read_rows

FORMAT = 1
CURVES = ("loss", "kl", "settled_kl", "opening", "weight", "penalty", "d", "d_ema", "threshold", "gamma", "beta", "kl_new", "grad_norm")
ROWS = 60  # of a curve, at most about
GONE = ("name", "root")  # keys that name a place


def record_of(cell: Cell, config: Config, storage: Storage, state: State) -> Optional[Dict[str, Any]]:
    """The record of a cell that is done, from its own files or as it was taken in; None for any other."""
    if state.kind != DONE or state.record is not None:
        return state.record if state.kind == DONE else None
    summary = json.loads((state.evaluation / "summary.json").read_text(encoding="utf-8"))
    header, rows = _lines(state.evaluation / "records.jsonl")
    most = (summary.get("asked") or {}).get("evaluate.episodes")
    rows = [row for row in rows if most is None or row.get("init", 0) < most]  # more may be there than were asked for now
    run = storage.run_folder(cell.run)
    logged = [] if cell.is_base else read_rows(run)
    if cell.making is not None and cell.making.how == "at":
        logged = [row for row in logged if row["step"] <= cell.making.value]
    told = [] if cell.making is not None and cell.making.how != "at" else logged  # of another adapter's loss and divergence
    kl = [row.get("settled_kl", row.get("kl")) for row in told if "kl" in row]
    if cell.closes:
        kl = [json.loads((storage.run_folder(cell.target) / "closing.json").read_text(encoding="utf-8"))["kl_after"]]
    new = (summary["new_skill"] or {}).get("name")
    groups = {("skill", new): "new", **{(one["group"], name): "stream" if name in cell.stream else one["group"]
                                        for name, one in summary["abilities"].items()}}
    trials = {f"{groups[key]}:{key[1]}": _trials(own) for key, own in _grouped(rows).items() if key in groups}
    retention = [_finite(row["value"]) for row in rows if row["kind"] == "retention"]
    return {
        "format": FORMAT, "study": cell.group, "cell": cell.cell, "arm": cell.arm, "task": cell.task, "rate": cell.rate, "seed": cell.seed,
        **({"stream": list(cell.stream), "position": cell.position} if cell.stream else {}), **({"of": cell.of} if cell.of else {}),
        "settings": settings_of(config), "evaluate": header["evaluate"], "weights": summary["weights"], "trials": trials,
        "action_kl": retention or None, "drift": summary.get("drift"), "probe_kl": kl[-1] if kl else None,
        "followed": summary.get("followed"), "curves": _curves(told),
        "seconds": {"train": train_seconds(logged), "evaluate": summary.get("seconds")}, "made": _made(run)}


def settings_of(config: Config) -> Dict[str, Any]:
    """Dotted key -> value of what differs from the defaults, without places."""
    default = usual()
    return {key: value for key, value in flat(to_dict(config))
            if key not in GONE and not key.endswith("_dir") and value != default.get(key) and not key.startswith("export.")}


def differences(record: Dict[str, Any], config: Config, of: Optional[Dict[str, Any]] = None) -> List[str]:
    """`key: there -> here` of what decides a number and is another in the record's cell. of: what the cell is made of."""
    there = {**usual(), **record["settings"]}
    for key in [key for key in there if key.startswith("options.") and key not in record["settings"]]:
        del there[key]
    here = to_dict(config)
    found = config_differences(there, here)
    if record["arm"] == "base":  # no training decides about it
        found = [line for line in found if line.startswith("backbone.")]
    elif there["train.steps"] != config.train.steps:  # which a run that goes on may change, and one that is told may not
        found.append(f"train.steps: {there['train.steps']} -> {config.train.steps}")
    # Of the evaluation what its header leaves out, as both were asked for.
    found += [f"evaluate.{key}: {there[f'evaluate.{key}']} -> {value}" for key, value in here["evaluate"].items()
              if key not in HOW and key not in record["evaluate"] and there.get(f"evaluate.{key}") != value]
    found += [f"of: {record.get('of')} -> {of}"] if record.get("of") != of else []
    return found + evaluation_differences(record["evaluate"], config)


def _lines(path: Path):
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines[0]["header"], sorted(lines[1:], key=lambda row: (row["kind"], row["ability"], row["trial"]))


def _grouped(rows: Iterable[dict]) -> Dict[tuple, List[dict]]:
    found: Dict[tuple, List[dict]] = {}
    for row in rows:
        if row["kind"] in ("skill", "question"):
            found.setdefault((row["kind"], row["ability"]), []).append(row)
    return found


def _trials(rows: List[dict]) -> Dict[str, Any]:
    outcomes = "".join("x" if row["crash"] is not None else str(int(bool(row["success"]))) for row in rows)
    seeds = [row["seed"] for row in rows]
    step = seeds[1] - seeds[0] if len(seeds) > 1 else 1
    return {"outcomes": outcomes, "seeds": [seeds[0], step] if seeds == [seeds[0] + step * i for i in range(len(seeds))] else seeds}


def states_of(trials: Dict[str, Any]) -> List[int]:
    """Seeds of the start states, one a trial."""
    seeds, count = trials["seeds"], len(trials["outcomes"])
    return seeds if len(seeds) == count and count > 2 else [seeds[0] + (seeds[1] if len(seeds) > 1 else 1) * i for i in range(count)]


def _finite(value) -> Optional[float]:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _curves(rows: List[dict]) -> Dict[str, List[Optional[float]]]:
    """Columns of the log, six digits; where rows are left out, those of a measurement stay."""
    stride = max(1, len(rows) // ROWS)
    kept = [row for i, row in enumerate(rows) if i % stride == 0 or i == len(rows) - 1 or "kl" in row or "d" in row]
    found = {"step": [row["step"] for row in kept]}
    for key in CURVES:
        values = [_finite(row.get(key)) for row in kept]
        if any(value is not None for value in values):
            found[key] = [None if value is None else float(f"{value:.6g}") for value in values]
    return found


def train_seconds(rows: List[dict]) -> Optional[float]:
    """What training took. A resumed run counts from zero again: each stretch ends where the next row has less."""
    times = [row["seconds"] for row in rows if "seconds" in row]
    return sum(a for a, b in zip(times, [*times[1:], -1.0]) if b < a) if times else None


def _made(run: Path) -> Dict[str, Any]:
    try:
        session = json.loads((run / "provenance.json").read_text(encoding="utf-8"))["sessions"][-1]
    except (OSError, ValueError, KeyError, IndexError):
        return {}
    hardware = {key: (session.get("hardware") or {}).get(key) for key in ("cpu", "cores", "gpus")}  # no name of a machine
    return {**{key: session[key] for key in ("commit", "versions", "hashes") if key in session}, "hardware": hardware}


# Files


def line_of(record: Dict[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n"


def write_records(path, records: Sequence[Dict[str, Any]]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        file.writelines(line_of(record) for record in records)


def read_records(path) -> List[Dict[str, Any]]:
    """Records of a file, which may be compressed (.xz); an unfinished last line is left out.

    ConfigError naming file and line for what is none.
    """
    path, found = Path(path), []
    try:
        content = path.read_bytes()
        lines = (lzma.decompress(content) if path.suffix == ".xz" else content).split(b"\n")
    except lzma.LZMAError as error:
        raise ConfigError(f"the records {path} are no whole .xz file ({error}): take the file again from where it came from") from error
    except OSError as error:
        raise ConfigError(f"the records {path} cannot be read: {error.strerror}; "
                          f"`vlakeep study STUDY --export {quoted(path)}` writes them") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']}, where {FORMAT} is read")
            _ = record["study"], record["cell"], record["settings"], record["evaluate"], record["trials"], record["seconds"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # a process that was killed while it wrote
                continue
            raise ConfigError(f"{path}, line {number} is no record of a cell ({error!r}): export it again") from error
        found.append(record)
    return found


def same(one: Dict[str, Any], two: Dict[str, Any]) -> List[str]:
    """Names of what differs between two records of a cell, without times and what they were made with."""
    return [key for key in sorted({**one, **two}) if key not in ("seconds", "made") and one.get(key) != two.get(key)]


# What a table says of a cell


def values_of(record: Dict[str, Any]) -> Dict[str, Optional[float]]:
    """Rates in [0, 1], divergences in nats; no times."""
    found: Dict[str, Any] = {}
    groups: Dict[str, List[Optional[float]]] = {}
    for name, trials in record["trials"].items():
        rate = rate_of(trials)
        groups.setdefault(name.partition(":")[0], []).append(rate)
        if not name.startswith("new:"):
            found[name] = rate
    kl = [value for value in record["action_kl"] or [] if value is not None]
    skills = groups.get("skill", [])
    found.update(new=_mean(groups.get("new")), old=_mean(skills), worst=min(skills) if skills and None not in skills else None,
                 questions=_mean(groups.get("question")),
                 action_kl=_mean(kl) if record["arm"] != "base" else 0.0, probe_kl=record["probe_kl"])
    return found


def rate_of(trials: Dict[str, Any]) -> Optional[float]:
    """Share of successes among trials that did not crash; None of none."""
    done = trials["outcomes"].replace("x", "")
    return done.count("1") / len(done) if done else None


def _mean(values: Optional[Sequence[Optional[float]]]) -> Optional[float]:
    """None also where one is not known."""
    known = [value for value in values or [] if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values or []) else None
