"""Tables of a study: a row a cell, a row an arm and rate; CSV, Markdown and LaTeX of the same cells."""

import csv
import io
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from vlakeep.core.study import DONE, Cell
from vlakeep.reporting.intervals import t_interval
from vlakeep.reporting.tables import escape
from vlakeep.studies.records import values_of

SHOWN = ("new", "old", "worst", "questions", "action_kl", "probe_kl")
Row = Dict[str, Any]


def rows(cells: Sequence[Cell], records: Sequence[Dict[str, Any]], states: Dict[str, str]) -> List[Row]:
    """A row a cell; no times, so that a study that was killed and resumed gives the same table to the byte."""
    known = {record["cell"]: record for record in records}
    return [{"arm": cell.arm, "task": cell.task, "rate": cell.rate, "seed": cell.seed, "state": states[cell.cell],
             **(values_of(known[cell.cell]) if cell.cell in known else {})} for cell in cells]


def to_csv(found: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(key for one in found for key in one))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return out.getvalue()


def summary(found: Sequence[Row]) -> str:
    """Markdown, a line for every arm and rate: means over its cells with 95 % t intervals over training seeds, a seed counting as one
    value, its mean over tasks."""
    lines = []
    for arm, rate in dict.fromkeys((one["arm"], one["rate"]) for one in found):
        own = [one for one in found if (one["arm"], one["rate"]) == (arm, rate)]
        done = [one for one in own if one["state"] == DONE]
        cells = [spread([(one["seed"], one[key]) for one in done if one.get(key) is not None]) for key in SHOWN]
        lines.append([arm, f"{rate:g}" if rate else "", f"{len(done)} of {len(own)}", *cells])
    return markdown(["arm", "rate", "cells", *SHOWN], lines)


def spread(values: Sequence[Tuple[int, float]]) -> str:
    """Mean over seeds and half of its interval, of (seed, value)."""
    seeds: Dict[int, List[float]] = {}
    for seed, value in values:
        seeds.setdefault(seed, []).append(value)
    means = [sum(own) / len(own) for own in seeds.values()]
    if not means:
        return ""
    if len(means) == 1:
        return f"{means[0]:.3g}"
    mean, low, _ = t_interval(means)
    return f"{mean:.3g} ±{mean - low:.2g}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    found = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in (head, *lines)]
    found.insert(1, "|" + "---|" * len(head))
    return "\n".join(found) + "\n"


class Table(NamedTuple):
    """A table as it is shown: a name for files, a caption, and cells of text. The first column names the rows."""

    name: str
    caption: str
    head: List[str]
    rows: List[List[str]]

    def markdown(self) -> str:
        return f"**{self.caption}**\n\n" + markdown(self.head, self.rows)

    def csv(self) -> str:
        """Columns stand by their place: a skill and a question may have one name."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([self.head, *self.rows])
        return out.getvalue()

    def html(self) -> str:
        def cells(line):
            return [escape(cell) for cell in line]

        head = "".join(f'<th scope="col">{cell}</th>' for cell in cells(self.head))
        body = "".join(f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
                       for first, *rest in map(cells, self.rows))
        return (f'<h3>{escape(self.caption)}</h3><div class="scroll" tabindex="0" role="region" aria-label="{escape(self.caption)}"><table>'
                f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")

    def latex(self) -> str:
        """For the package booktabs."""
        lines = [" & ".join(map(tex, line)) + r" \\" for line in (self.head, *self.rows)]
        return "\n".join([r"\begin{table}", rf"\caption{{{tex(self.caption)}}}", rf"\label{{tab:{self.name}}}",
                          rf"\begin{{tabular}}{{l{'r' * (len(self.head) - 1)}}}", r"\toprule", lines[0], r"\midrule", *lines[1:],
                          r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def tex(text: str) -> str:
    """Text with what LaTeX reads as commands made harmless."""
    for plain, said in (("\\", r"\textbackslash "), *((one, "\\" + one) for one in "&%$#_{}"), ("~", r"\textasciitilde "),
                        ("^", r"\textasciicircum "), ("<", r"$<$"), (">", r"$>$"), ("±", r"$\pm$"), ("−", "$-$"), ("→", r"$\to$")):
        text = text.replace(plain, said)
    return text


def percent(value: Optional[float]) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def points(mean: Optional[float], low: Optional[float] = None, high: Optional[float] = None) -> str:
    """A difference of rates in percentage points with its interval."""
    if mean is None:
        return ""
    return f"{100 * mean:+.1f}" + ("" if low is None or high is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]")


def probability(p: Optional[float]) -> str:
    return "" if p is None else "< .0001" if p < 1e-4 else f"{p:.4f}".lstrip("0") or "0"
