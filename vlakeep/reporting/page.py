"""The report page: one HTML file with its style and figures inside, readable without a network and without scripts."""

import time
from pathlib import Path
from typing import List, Optional

from vlakeep.reporting import tables, words
from vlakeep.reporting.arms import Arm
from vlakeep.reporting.compare import Comparison
from vlakeep.reporting.data_cards import data_html
from vlakeep.reporting.figures import Figure, Style, css_name, inline_svg, style_of
from vlakeep.reporting.page_style import style_sheet
from vlakeep.reporting.provenance import changes_html, command_lines, provenance_html, reproduce, show_path
from vlakeep.reporting.seeds import seeds_html
from vlakeep.reporting.tables import chip, escape, status_badge

ICON = "data:image/svg+xml,%3Csvg%20viewBox='0%200%208%208'/%3E"


def page(comparison: Comparison, figures: List[Figure], title: str, seconds: Optional[float], root: Optional[Path]) -> str:
    """The whole document. `seconds`: what everything took together; `root`: storage root, to shorten paths."""
    two = [figure for figure in figures if figure.narrow]
    three = [figure for figure in figures if not figure.narrow]
    sections = [
        ("comparison", "Comparison", _comparison(comparison)),
        ("seeds", "Over seeds", seeds_html(comparison)),
        ("differences", "Differences, paired", _differences(comparison)),
        ("figures", "Success and forgetting", figures_html(style_of(comparison), two, "two")),
        ("findings", "What helped and what hurt", _findings(comparison)),
        ("training", "Training", figures_html(style_of(comparison), three, "three")),
        ("data", "Data", data_html(comparison)),
        ("provenance", "Provenance", _provenance(comparison)),
        ("reproduce", "Reproduce", _reproduce(comparison, figures, root)),
    ]
    sections = [section for section in sections if section[2]]
    nav = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{escape(name)}</h2>{content}</section>' for key, name, content in sections)
    took = f" \u00b7 {_duration(seconds)} in all" if seconds is not None else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="{ICON}"><style>{style_sheet(style_of(comparison))}</style></head><body>'
        f'<header><p class="over">{escape(title)} \u00b7 {time.strftime("%Y-%m-%d")}{took}</p>'
        f"<h1>{escape(words.headline(comparison))}</h1>{_lead(comparison)}{_cards(comparison)}{_warnings(comparison)}<nav>{nav}</nav></header>"
        f"<main>{body}</main><footer>Made by <code>vlakeep report</code>. Numbers without rounding: "
        "tables/comparison.csv and summary.json "
        f"beside this page.</footer></body></html>\n"
    )


def _lead(comparison: Comparison) -> str:
    lines = "".join(f"<p>{escape(line)}</p>" for line in words.lead(comparison))
    chinese = words.summary_zh(comparison)
    return (
        f'<div class="lead"><div>{lines}</div>'
        + (f'<p class="zh" lang="zh-CN">{escape(chinese)}</p>' if chinese else "")
        + "</div>"
    )


def _cards(comparison: Comparison) -> str:
    cards = []
    for arm in comparison.arms.values():
        numbers = ""
        for key, label in (("new", "new skill"), ("mean", "old ability")):
            value = comparison.value(arm, key) if key != "mean" or comparison.abilities else None
            text = f"{words.number(value.mean, 'percent')}<span>&#8202;%</span>" if value else words.number(None, "")
            bounds = f"<small>{words.interval(value.low, value.high, 'percent')}</small>" if value else ""
            numbers += f"<div><dd>{text}{bounds}</dd><dt>{label}</dt></div>"
        cards.append(
            f'<div class="card" style="--c:var({css_name(arm.name)})"><h3>{escape(arm.label)}{status_badge(arm)}</h3>'
            f"<dl>{numbers}</dl></div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _warnings(comparison: Comparison) -> str:
    if not comparison.warnings:
        return ""
    items = "".join(f'<li class="warn">{escape(text[0].upper() + text[1:])}.</li>' for text in comparison.warnings)
    return f'<div class="notes"><ul class="findings">{items}</ul></div>'


def _comparison(comparison: Comparison) -> str:
    sizes = sorted(
        {
            value.n
            for arm in comparison.evaluated
            for key in ["new", *comparison.parts("mean")]
            for value in [comparison.value(arm, key)]
            if value
        }
    )
    trials = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0]) if sizes else "no"
    return (
        f'<p class="hint">Success rates and answer accuracies in percent with 95 % Wilson intervals, from {trials} trials each; '
        "means "
        "weigh every ability alike. A crashed trial counts neither as success nor as failure. KL is taken from the base model on "
        f"off-task frames; drift is the distance between probe covariances.</p>{tables.comparison_html(comparison)}"
        f"{tables.followed_html(comparison)}"
    )


def _differences(comparison: Comparison) -> str:
    table = tables.differences_html(comparison)
    if not table:
        return (
            '<p class="hint">There is nothing to compare: the report needs the base or plain LoRA and one more evaluated arm.</p>'
        )
    shown = [
        comparison.difference(arm, reference, measure.key).verdict
        for arm, reference in tables.pairs_of(comparison)
        for measure in comparison.measures
        if not measure.key.startswith("mean")
    ]
    count = sum(verdict in ("better", "worse", "noise") for verdict in shown)
    return (
        '<p class="hint">In percentage points, over trials with the same initial state under both arms (Newcombe '
        "intervals; normal "
        "approximation for the KL). <b>Better</b> and <b>worse</b> are said only where the 95 % interval excludes zero. Of "
        f"{count} single comparisons, about {0.05 * count:.1f} would be marked by chance alone. "
        "Forgetting is fair to compare only at "
        f"matched success on the new skill.</p>{table}"
    )


def figures_html(style: Style, figures: List[Figure], columns: str) -> str:
    """A grid of figures with their captions; columns: `two` or `three`."""
    drawn = []
    for figure in figures:
        svg = f'<div class="wide{" paired" if figure.narrow else ""}">{inline_svg(figure, style)}</div>'
        svg += f'<div class="narrow">{inline_svg(figure, style, narrow=True)}</div>' if figure.narrow else ""
        drawn.append(
            f'<figure class="panel"><h3>{escape(figure.title)}</h3>{svg}'
            f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
        )
    return f'<div class="grid {columns}">{"".join(drawn)}</div>' if drawn else ""


def _findings(comparison: Comparison) -> str:
    panels = []
    for arm in comparison.tuned:
        items = "".join(f'<li class="{tone}">{escape(text)}</li>' for tone, text in words.findings(comparison, arm))
        panels.append(
            f'<div class="panel"><h3>{chip(arm)}</h3><ul class="findings">{items or "<li>Nothing to say.</li>"}</ul></div>'
        )
    return f'<div class="grid three start">{"".join(panels)}</div>' if panels else ""


def _provenance(comparison: Comparison) -> str:
    base_notes = [note for arm in comparison.arms.values() if arm.name == "base" for note in arm.notes]
    notes = "".join(f'<p class="hint">Base: {escape(note)}.</p>' for note in base_notes)
    return notes + provenance_html(comparison) + changes_html(comparison)


def _reproduce(comparison: Comparison, figures: List[Figure], root: Optional[Path]) -> str:
    given = command_lines(comparison)
    parts = [
        '<p class="hint">These commands make every number again under new names.</p>',
        f"<pre><code>{escape(chr(10).join(reproduce(comparison, root)))}</code></pre>",
    ]
    if given:
        parts.append(
            '<p class="hint">The command lines that were run:</p>'
            f"<pre><code>{escape(chr(10).join(dict.fromkeys(given)))}</code></pre>"
        )
    rows = [[chip(arm), _code(arm, "eval", root), _code(arm, "run", root)] for arm in comparison.arms.values()]
    parts.append(tables.facts_html(["Arm", "Evaluation", "Run"], rows, "Files that this report was made from"))
    if figures:
        parts.append(
            f'<p class="hint">Figures as files: figures/ ({", ".join(figure.name for figure in figures)}; png and svg). '
            "Tables: tables/ (md and csv).</p>"
        )
    return "".join(parts)


def _code(arm: Arm, key: str, root: Optional[Path]) -> str:
    return f"<code>{escape(show_path(arm.folders.get(key), root))}</code>"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
