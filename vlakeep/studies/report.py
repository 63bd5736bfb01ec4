"""The report of a study: one page with figures and tables, and the same as files: Markdown, CSV, LaTeX, PNG and SVG.

    vlakeep study studies/X.yaml --report

Every number follows from the records (records.py) by the rule (rule.py); records.jsonl beside the page has them, so that the report can be
made again from its own folder.
"""

import statistics
import time
from pathlib import Path
from typing import Any, Collection, Dict, List, Optional, Sequence

from tqdm import tqdm

from vlakeep.core.storage import atomic_dir
from vlakeep.core.study import BASE, Cell
from vlakeep.reporting.figures import save_files
from vlakeep.reporting.page import ICON, figures_html
from vlakeep.reporting.page_style import style_sheet
from vlakeep.reporting.tables import escape
from vlakeep.studies import claims, streams
from vlakeep.studies.claims import Judged, best_rival
from vlakeep.studies.data import Setting
from vlakeep.studies.figures import figures, highlighted, style_of
from vlakeep.studies.inference import Estimate, difference, value
from vlakeep.studies.records import write_records
from vlakeep.studies.rule import Rule, of_reported
from vlakeep.studies.tables import Table, percent, points

OURS = {"index.html", "report.md", "records.jsonl", "tables", "figures"}


def build(cells: Sequence[Cell], records: Sequence[Dict[str, Any]], rule: Rule, out: Path, commands: Sequence[str] = ()) -> Path:
    """Write the report to the folder `out`; returns its index.html. ValueError when `out` holds files of something else."""
    refuse_foreign(out, OURS)
    judged = claims.judge(cells, records, rule)
    drawings, tables = figures(judged), tables_of(cells, judged)
    with atomic_dir(out) as folder:
        for name in ("tables", "figures"):
            (folder / name).mkdir()
        for figure in tqdm(drawings, desc="figures", leave=False):
            save_files(figure, folder / "figures")
        for table in tables:
            write_table(table, folder / "tables")
        for name, content in claims.numbers(judged).items():
            (folder / "tables" / f"numbers_{name}").write_text(content, encoding="utf-8")
        write_records(folder / "records.jsonl", records)
        title = cells[0].group
        texts = [f"# {title}", headline(judged), claims.head(judged), *(f"**Note:** {note}." for note in judged.notes), *harm(judged),
                 *(table.markdown() for table in tables)]
        (folder / "report.md").write_text("\n\n".join(text.rstrip("\n") for text in texts) + "\n", encoding="utf-8")
        (folder / "index.html").write_text(page(cells, judged, drawings, tables, title, commands), encoding="utf-8")
    return out / "index.html"


def refuse_foreign(out: Path, ours: Collection[str]) -> None:
    """ValueError when `out`, which is about to be replaced, holds files of something else than `ours`."""
    foreign = {entry.name for entry in out.iterdir()} - set(ours) if out.is_dir() else set()
    if foreign or (out.exists() and not out.is_dir()):
        raise ValueError(f"{out} holds files of something else ({', '.join(sorted(foreign)[:5]) or 'it is a file'}): give an empty folder "
                         "with --out")


def write_table(table: Table, folder: Path) -> None:
    """NAME.md, NAME.tex and NAME.csv."""
    (folder / f"{table.name}.md").write_text(table.markdown(), encoding="utf-8")
    (folder / f"{table.name}.tex").write_text(table.latex(), encoding="utf-8")
    (folder / f"{table.name}.csv").write_text(table.csv(), encoding="utf-8")


def tables_of(cells: Sequence[Cell], judged: Judged) -> List[Table]:
    found = [*claims.tables(judged), *streams_of(judged), *_abilities(judged), cost(judged), progress(cells, judged)]
    return [table for table in found if table.rows]


def streams_of(judged: Judged) -> List[Table]:
    return streams.tables(of_reported(judged.rule, judged.data.all()), judged.rule.reference)


def _abilities(judged: Judged) -> List[Table]:
    """Every ability at the chosen settings, and what of the base's is lost."""
    names = ["new", *(name for kind in ("old", "questions") for name in judged.data.abilities(kind))]
    head = ["family", *(name.partition(":")[2].replace("_", " ") or "new task" for name in names)]
    rates, lost = [], []
    for family in judged.values:
        setting = setting_of(judged, family)
        seeds = judged.seeds[:1] if family == BASE else judged.seeds
        rates.append([family, *(_rate(value(judged.data, setting, name, seeds, judged.rule.draws)) for name in names)])
        if family != BASE and BASE in judged.values:
            lost.append([family, *(_points(difference(judged.data, setting, Setting(BASE, 0.0), name, judged.seeds, judged.rule.draws))
                                   for name in names)])
    return [Table("abilities", "Every ability at the chosen settings (%)", head, rates),
            Table("changes", "Arm minus base (points)", head, lost)]


def setting_of(judged: Judged, family: str) -> Setting:
    return Setting(BASE, 0.0) if family == BASE else judged.choices[family].setting


def _rate(one: Optional[Estimate]) -> str:
    return "" if one is None else percent(one.mean)


def _points(one: Optional[Estimate]) -> str:
    return "" if one is None else points(one.mean, one.low, one.high)


def cost(judged: Judged) -> Table:
    """Median time, mean divergence and drift over the reported runs of the chosen settings. Times are of whatever else ran beside
    them: a ratio is of one machine only."""
    runs = {family: [record for record in judged.data.records(setting_of(judged, family)) if record["seed"] in judged.seeds]
            for family in judged.choices}
    times = {family: [one["seconds"]["train"] for one in own if one["seconds"]["train"]] for family, own in runs.items()}
    machines = {family: {machine(one) for one in own} for family, own in runs.items()}
    plain, rows = judged.rule.reference, []
    for family, spent in times.items():
        if not spent:
            continue
        ratio = ""
        if times.get(plain) and len(machines[family] | machines[plain]) == 1:
            ratio = f"{statistics.median(spent) / statistics.median(times[plain]):.2f}"
        drifts, kl = ([one[key] for one in runs[family] if one[key] is not None] for key in ("drift", "probe_kl"))
        rows.append([family, f"{statistics.median(spent):.0f}", ratio, f"{statistics.mean(kl):.4f}" if kl else "",
                     f"{statistics.mean(drifts):.2f}" if drifts else "", "; ".join(sorted(machines[family]))])
    return Table("cost", "Cost and drift of a run at the chosen settings",
                 ["family", "training (s, median)", f"times {judged.rule.reference}", "probe KL (nats)", "drift", "machine"], rows)


def machine(record: Dict[str, Any]) -> str:
    """The accelerators of a record's run, or its processor."""
    hardware = record["made"].get("hardware") or {}
    gpus = hardware.get("gpus") or hardware.get("gpu")
    if gpus:
        names = [gpu.get("name", str(gpu)) if isinstance(gpu, dict) else str(gpu) for gpu in (gpus if isinstance(gpus, list) else [gpus])]
        return ", ".join(dict.fromkeys(names))
    return f"CPU, {hardware['cpu']}" if hardware.get("cpu") else "unknown"


def progress(cells: Sequence[Cell], judged: Judged) -> Table:
    """Cells that are done, by arm."""
    done = {(setting, task, seed) for setting, task, seed in judged.data.keys()}
    rows = []
    for arm in dict.fromkeys(cell.arm for cell in cells):
        own = [cell for cell in cells if cell.arm == arm]
        count = sum((Setting(cell.arm, cell.rate), cell.task, cell.seed) in done for cell in own)
        rates = sorted({cell.rate for cell in own if cell.rate})
        rows.append([arm, own[0].family, ", ".join(f"{rate:g}" for rate in rates), str(len({cell.task for cell in own})),
                     str(len({cell.seed for cell in own})), f"{count} of {len(own)}"])
    return Table("cells", "Cells of the study", ["arm", "family", "rates", "tasks", "seeds", "done"], rows)


# Sentences


def headline(judged: Judged) -> str:
    """What the study says of its subject, in one sentence that holds for these numbers alone."""
    rule = judged.rule
    of = {one.family: one for one in judged.matched}
    one = of.get(rule.reference)
    if one is None or one.kept is None:
        return f"{rule.subject} and {rule.reference} have no seed in common yet."
    rival = best_rival(judged)
    said = (f"{rule.subject} against {rule.reference}: {points(one.kept.mean, one.kept.low, one.kept.high)} points of what is kept, "
            f"{points(one.new.mean, one.new.low, one.new.high)} points of the new task"
            f"{'' if judged.choices[rule.subject].matched else ', near which it does not come on the choosing seeds'}")
    said += f"; the claim is {'shown' if one.shown else 'not shown'} against it"
    if rival and rival != rule.reference and of[rival].kept:
        other = of[rival]
        said += (f", and {'shown' if other.shown else 'not shown'} against the best rival, {rival} "
                 f"({points(other.kept.mean, other.kept.low, other.kept.high)} kept, {points(other.new.mean)} learned)")
    return said + "."


def harm(judged: Judged) -> List[str]:
    """What got worse under the highlighted families: abilities of which the interval of the difference to the base lies below zero."""
    found = []
    for family in highlighted(judged):
        worse = []
        for name in (name for kind in ("old", "questions") for name in judged.data.abilities(kind)):
            e = difference(judged.data, setting_of(judged, family), Setting(BASE, 0.0), name, judged.seeds, judged.rule.draws)
            if e is not None and e.high is not None and e.high < 0:
                worse.append(f"{name.partition(':')[2].replace('_', ' ')} {points(e.mean, e.low, e.high)}")
        if BASE in judged.values and judged.seeds:
            found.append(f"{family} against the base: "
                         + (f"worse in {', '.join(worse)}." if worse else "no ability is worse beyond noise."))
    return found


# Page


def page(cells: Sequence[Cell], judged: Judged, drawings, tables: Sequence[Table], title: str, commands: Sequence[str]) -> str:
    """The whole document: its style and figures inside, no script, nothing loaded."""
    style, by_name = style_of(judged), {table.name: table for table in tables}

    def shown(*names: str) -> str:
        return "".join(by_name[name].html() for name in names if name in by_name)

    two = [figure for figure in drawings if figure.narrow]
    three = [figure for figure in drawings if not figure.narrow]
    notes = "".join(f'<li class="warn">{escape(note)}.</li>' for note in judged.notes)
    worse = "".join(f"<li>{escape(line)}</li>" for line in harm(judged))
    shell = "\n".join(commands)
    sections = [
        ("arms", "Arms", shown("arms")), ("claim", "The claim", shown("matched", "own_best")),
        ("streams", "Streams", shown("streams", *(name for name in by_name if name.startswith("matrix_")))),
        ("figures", "Success and forgetting", figures_html(style, two, "two start")), ("fronts", "Fronts", shown("fronts")),
        ("abilities", "Abilities", shown("abilities", "changes")), ("harm", "Harm", f'<ul class="findings">{worse}</ul>' if worse else ""),
        ("training", "Over training", figures_html(style, three, "three") if three else ""), ("cost", "Cost", shown("cost")),
        ("power", "Power", shown("power")), ("cells", "Cells", shown("cells") + _made(judged)),
        ("reproduce", "Reproduce", f"<pre><code>{escape(shell)}</code></pre>" if shell else "")]
    sections = [section for section in sections if section[2]]
    nav = "".join(f'<a href="#{key}">{name}</a>' for key, name, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{name}</h2>{content}</section>' for key, name, content in sections)
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<title>{escape(title)}</title><link rel="icon" href="{ICON}"><style>{style_sheet(style)}</style></head><body>'
            f'<header><p class="over">{escape(title)} · {time.strftime("%Y-%m-%d")} · {judged.data.count} cells</p>'
            f'<h1>{escape(headline(judged))}</h1><p>{escape(claims.head(judged))}</p>'
            + (f'<div class="notes"><ul class="findings">{notes}</ul></div>' if notes else "")
            + f"<nav>{nav}</nav></header><main>{body}</main><footer>Made by <code>vlakeep study</code> from records.jsonl beside it. "
            "Tables: tables/ (md, csv, tex; numbers_*.csv without rounding). Figures: figures/ (png, svg).</footer></body></html>\n")


def _made(judged: Judged) -> str:
    """Commits, versions and machines of the records."""
    made: Dict[str, Dict[str, int]] = {"commit": {}, "torch": {}, "transformers": {}, "peft": {}, "machine": {}}
    for record in judged.data.all():
        if record["arm"] == BASE:
            continue
        versions = record["made"].get("versions") or {}
        for key, one in (("commit", record["made"].get("commit")), ("machine", machine(record)),
                         *((name, versions.get(name)) for name in ("torch", "transformers", "peft"))):
            made[key][str(one)] = made[key].get(str(one), 0) + 1
    lines = [f"{key}: " + ", ".join(f"{one} ({count} cells)" for one, count in values.items()) for key, values in made.items() if values]
    return "".join(f'<p class="hint">{escape(line)}</p>' for line in lines)
