"""The comparison as tables: Markdown and CSV files, and HTML for the page. One source of cells for all three."""

import csv
import html
import io
from typing import Dict, List, Tuple

from vlakeep.reporting.arms import Arm
from vlakeep.reporting.compare import Comparison, Difference, Measure
from vlakeep.reporting.figures import css_name
from vlakeep.reporting.words import difference_text, number, value_text

UNITS = {"percent": "%", "nats": "nats", "seconds": "s", "number": ""}
BADGES = {"better": "\u25b2 better", "worse": "\u25bc worse", "noise": "within noise", "unpaired": "not paired", "absent": ""}


def unit_of(measure: Measure) -> str:
    return f" ({UNITS[measure.unit]})" if UNITS[measure.unit] else ""


def references(comparison: Comparison, arm: Arm) -> List[Arm]:
    """What an arm is compared with: the baseline and the base, as far as they are there and another arm."""
    return [
        comparison.arms[name]
        for name in ("baseline", "base")
        if name in comparison.arms and name != arm.name and arm.name != "base" and comparison.arms[name].summary is not None
    ]


def badge(d: Difference, measure: Measure) -> str:
    """Verdict in words; drift and time are single numbers without an interval, so nothing is claimed of them."""
    return "no interval" if d.verdict == "unpaired" and measure.key in ("drift", "seconds") else BADGES[d.verdict]


def pairs_of(comparison: Comparison) -> List[Tuple[Arm, Arm]]:
    return [(arm, reference) for arm in comparison.evaluated for reference in references(comparison, arm)]


def rows_csv(comparison: Comparison) -> List[Dict[str, object]]:
    """One row per arm and measure, full precision; rates are fractions. Empty cells mean "not known"."""
    rows = []
    for measure in comparison.measures:
        for arm in comparison.arms.values():
            value = comparison.value(arm, measure.key)
            row: Dict[str, object] = {
                "measure": measure.key,
                "label": measure.label,
                "section": measure.section,
                "unit": measure.unit,
                "arm": arm.name,
                "mean": value and value.mean,
                "low": value and value.low,
                "high": value and value.high,
                "n": value.n if value else 0,
                "crashes": comparison.crashes(arm, measure.key),
            }
            for name in ("baseline", "base"):
                reference = {r.name: r for r in references(comparison, arm)}.get(name)
                d = comparison.difference(arm, reference, measure.key) if reference is not None else Difference("absent")
                row.update(
                    {
                        f"minus_{name}": d.mean,
                        f"minus_{name}_low": d.low,
                        f"minus_{name}_high": d.high,
                        f"vs_{name}": d.verdict,
                        f"pairs_{name}": d.pairs,
                        f"note_{name}": d.note,
                    }
                )
            rows.append(row)
    return rows


def to_csv(rows: List[Dict[str, object]]) -> str:
    with io.StringIO(newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in rows)
        return file.getvalue()


def comparison_md(comparison: Comparison) -> str:
    """Values of all arms side by side, crashes in their own columns."""
    arms = list(comparison.arms.values())
    head = ["measure", *[arm.label for arm in arms], *[f"crashes: {arm.label}" for arm in arms]]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for measure in comparison.measures:
        cells = [measure.label + unit_of(measure), *[value_text(comparison.value(arm, measure.key), measure) for arm in arms]]
        cells += [_count(comparison.crashes(arm, measure.key)) for arm in arms]
        lines.append("| " + " | ".join(_md(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def differences_md(comparison: Comparison) -> str:
    """Every arm minus plain LoRA and minus the base, with paired intervals and the verdict."""
    pairs = pairs_of(comparison)
    if not pairs:
        return "There is nothing to compare: the report needs `base` or `baseline` and one more evaluated arm.\n"
    head = ["measure", *[f"{arm.label} minus {reference.label}" for arm, reference in pairs]]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for measure in comparison.measures:
        cells = [measure.label + unit_of(measure).replace("%", "points")]
        for arm, reference in pairs:
            d = comparison.difference(arm, reference, measure.key)
            cells.append(f"{difference_text(d, measure)} {badge(d, measure)}".strip())
        lines.append("| " + " | ".join(_md(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _md(cell: str) -> str:
    return cell.replace("|", "\\|")


def _count(value) -> str:
    return "\u2013" if value is None else str(value)


def escape(text: object) -> str:
    return html.escape(str(text))


def chip(arm: Arm) -> str:
    """The arm's name with its colour."""
    return f'<span class="chip" style="--c:var({css_name(arm.name)})">{escape(arm.label)}</span>'


def _shell(caption: str, head: str, body: str) -> str:
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table><thead>{head}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _sections(comparison: Comparison, columns: int, cells, percent: str = "%") -> str:
    body, section = [], None
    for measure in comparison.measures:
        if measure.section != section:
            section = measure.section
            body.append(
                f'<tr class="section"><th scope="rowgroup"><span>{escape(section)}</span></th><td colspan="{columns}"></td></tr>'
            )
        strong = ' class="mean"' if measure.key == "mean" or measure.key.startswith("mean:") or measure.key == "new" else ""
        unit = percent if measure.unit == "percent" else UNITS[measure.unit]
        label = f"{escape(measure.label)}<small>{unit}</small>"
        body.append(f'<tr{strong}><th scope="row">{label}</th>{cells(measure)}</tr>')
    return "".join(body)


def _value_cell(comparison: Comparison, arm: Arm, measure: Measure) -> str:
    value = comparison.value(arm, measure.key)
    if value is None:
        n = comparison.crashes(arm, measure.key)
        return f'<td class="none">{"no trial counts" if n else number(None, "")}</td>'
    text = value_text(value, measure)
    mean, _, bounds = text.partition(" ")
    size = f' title="{value.n} trials"' if value.n else ""
    return f"<td{size}><b>{mean}</b>{f'<i>{bounds}</i>' if bounds else ''}</td>"


def comparison_html(comparison: Comparison) -> str:
    """Arms side by side; crashed trials in columns of their own."""
    arms = list(comparison.arms.values())
    head = '<tr><th scope="col" rowspan="2">Measure</th>'
    head += "".join(f'<th scope="col" rowspan="2">{chip(arm)}{status_badge(arm)}</th>' for arm in arms)
    head += f'<th scope="colgroup" colspan="{len(arms)}" class="edge">Crashed trials</th></tr><tr>'
    head += (
        "".join(f'<th scope="col" class="{"edge " if i == 0 else ""}small">{chip(arm)}</th>' for i, arm in enumerate(arms))
        + "</tr>"
    )

    def cells(measure):
        counts = [comparison.crashes(arm, measure.key) for arm in arms]
        return "".join(_value_cell(comparison, arm, measure) for arm in arms) + "".join(
            f'<td class="count{" edge" if i == 0 else ""}{" crashed" if count else ""}">{_count(count)}</td>'
            for i, count in enumerate(counts)
        )

    return _shell("Comparison of the arms", head, _sections(comparison, 2 * len(arms), cells))


def differences_html(comparison: Comparison) -> str:
    """Paired differences with their verdicts; an empty string when there is nothing to compare."""
    pairs = pairs_of(comparison)
    if not pairs:
        return ""

    def title(arm: Arm, reference: Arm) -> str:
        state = comparison.matched(arm)[0] if reference.name == "baseline" else ""
        flag = {"lower": '<span class="badge worse">success not matched</span>',
                "unclear": '<span class="badge worse">success may not match</span>'}.get(state, "")
        return f'<th scope="col">{chip(arm)}<small>minus {escape(reference.label)}</small>{flag}</th>'

    head = '<tr><th scope="col">Measure</th>' + "".join(title(arm, reference) for arm, reference in pairs) + "</tr>"

    def cells(measure):
        out = []
        for arm, reference in pairs:
            d = comparison.difference(arm, reference, measure.key)
            mean, _, bounds = difference_text(d, measure).partition(" ")
            note = "; ".join(
                part
                for part in (
                    f"{d.pairs} pairs" if d.pairs else "",
                    f"{d.dropped} left out after a crash" if d.dropped else "",
                    d.note,
                )
                if part
            )
            mark = f'<span class="badge {d.verdict}">{escape(badge(d, measure))}</span>' if badge(d, measure) else ""
            title = f' title="{escape(note)}"' if note else ""
            out.append(f'<td class="{d.verdict}"{title}><b>{mean}</b>{f"<i>{bounds}</i>" if bounds else ""}{mark}</td>')
        return "".join(out)

    return _shell("Paired differences", head, _sections(comparison, len(pairs), cells, "points"))


def status_badge(arm: Arm) -> str:
    """A mark on arms whose run did not end well."""
    return f'<span class="badge worse">{escape(arm.status)}</span>' if arm.status in ("failed", "interrupted", "running") else ""


def followed_html(comparison: Comparison) -> str:
    """On which of two targets the episodes ended, where the prompt names one of them, in percent; "" where no arm was asked that."""
    arms = [arm for arm in comparison.evaluated if arm.summary.get("followed")]
    skills = dict.fromkeys(skill for arm in arms for skill in arm.summary["followed"])

    def cell(arm: Arm, skill: str) -> str:
        one = arm.summary["followed"].get(skill)
        return " / ".join(number(one[end], "percent") for end in ("prompted", "other", "neither")) if one else number(None, "")

    rows = [[escape(skill), *(cell(arm, skill) for arm in arms)] for skill in skills]
    caption = "Two targets on one table: episodes that ended on the one that the prompt names / on the other / on neither (%)"
    return facts_html(["Prompt", *(chip(arm) for arm in arms)], rows, caption) if rows else ""


def facts_html(head: List[str], rows: List[List[str]], caption: str) -> str:
    """A plain table of ready HTML cells; the first cell of each row is its name."""
    top = "<tr>" + "".join(f'<th scope="col">{cell}</th>' for cell in head) + "</tr>"
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return _shell(caption, top, body).replace("<table>", '<table class="facts">')
