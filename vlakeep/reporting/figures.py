"""Figures: one drawing function each, rendered as files (png, svg on white) and inline (svg whose colours are CSS variables).

matplotlib is imported when a figure is drawn, with the Agg and SVG canvases only. Arms keep one colour (Okabe-Ito, safe for
colour-blind readers) and one marker everywhere. `narrow` drawings are laid out for a phone.
"""

import io
import re
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

from vlakeep.reporting.arms import Arm
from vlakeep.reporting.compare import Comparison

INK, MUTED, LINE, PAPER = "#1b2733", "#5b6875", "#dfe4ea", "#fefefe"
INLINE = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--card)"}
# arm -> (light, dark, marker)
STYLE = {
    "base": ("#6f7680", "#a3abb5", "s"),
    "baseline": ("#d55e00", "#ff8b3d", "o"),
    "method": ("#0072b2", "#56b4e9", "D"),
    "method_lora_input": ("#009e73", "#2bd1a0", "^"),
    "graded": ("#cc79a7", "#e59cc4", "v"),
}
MORE = [("#b58900", "#f0c94a", "P"), ("#7b5ea7", "#b49ae0", "X"), ("#4d7a29", "#9ccc65", "*")]
RC = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "svg.fonttype": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
    "axes.facecolor": "none",
    "axes.unicode_minus": True,
}


PATHS = (" The thin line is the way there: from the base through the run's checkpoints (small marks, from fewer trials, each with its "
         "step) to its end.")


Style = Dict[str, Tuple[str, str, str]]  # arm -> light colour, dark colour, marker


class Figure(NamedTuple):
    """A figure of the report. `draw(figure, narrow)` fills a matplotlib figure; sizes in inches."""

    name: str
    title: str
    caption: str
    draw: Callable
    wide: Tuple[float, float]
    narrow: Optional[Tuple[float, float]] = None


def style_of(comparison: Comparison) -> Style:
    """(light colour, dark colour, marker) of every arm."""
    extra = iter(MORE * 8)
    return {name: STYLE.get(name) or next(extra) for name in comparison.arms}


def css_name(arm: str) -> str:
    return "--arm-" + re.sub(r"[^a-z0-9]", "-", arm.lower())


def figures(comparison: Comparison) -> List[Figure]:
    """The figures that the data of these arms can fill."""
    style = style_of(comparison)
    found = []
    points = [arm for arm in comparison.evaluated if comparison.value(arm, "new") and comparison.value(arm, "mean")]
    if points:
        found.append(
            Figure(
                "success_retention",
                "Success against retention",
                "Each point is one arm: right is more of the old abilities kept, up is more of the new skill learned; bars are "
                "95 % intervals. An arm is better than another without trade-off (Pareto-better) when it lies above and to the "
                "right of it. The dashed lines cross at plain LoRA: the upper right quarter beats it on both counts, the lower "
                "right one keeps more but learns less." + (PATHS if any(comparison.path(arm) for arm in points) else ""),
                lambda figure, narrow: _success_retention(figure, comparison, points, style),
                (6.6, 5.0),
                (4.1, 4.2),
            )
        )
    tuned = [arm for arm in comparison.tuned if arm.summary is not None]
    base = comparison.arms.get("base")
    if tuned and base is not None and comparison.abilities:
        rows = len(comparison.abilities) + 1
        height = max(3.0, 0.9 + rows * (0.16 + 0.15 * len(tuned)))
        found.append(
            Figure(
                "forgetting",
                "Forgetting per ability",
                "Base minus arm in percentage points: bars to the right are ability lost, bars to the left ability gained. "
                "Whiskers are 95 % intervals of the paired difference; a whisker that crosses zero is within noise.",
                lambda figure, narrow: _forgetting(figure, comparison, tuned, base, style),
                (6.6, max(5.0, height)),
                (4.1, height),
            )
        )
    trained = [arm for arm in comparison.tuned if arm.metrics]
    for curve in CURVES:
        having = [arm for arm in trained if any(arm.values(key)[0] for key, _ in curve.keys)]
        if having:
            found.append(
                Figure(
                    curve.name,
                    curve.title,
                    curve.caption,
                    lambda figure, narrow, curve=curve, having=having: _curves(figure, curve, having, style),
                    (4.1, 2.9),
                )
            )
    return found


def _success_retention(figure, comparison: Comparison, points: List[Arm], style) -> None:
    axes = figure.add_subplot()
    for arm in points:
        x, y = comparison.value(arm, "mean"), comparison.value(arm, "new")
        colour, _, marker = style[arm.name]
        bars = [[[100 * (v.mean - v.low)], [100 * (v.high - v.mean)]] if v.low is not None else None for v in (x, y)]
        if arm.name == "baseline":
            axes.axvline(100 * x.mean, color=MUTED, linestyle="--", linewidth=0.9, zorder=1)
            axes.axhline(100 * y.mean, color=MUTED, linestyle="--", linewidth=0.9, zorder=1)
        axes.errorbar(
            100 * x.mean,
            100 * y.mean,
            xerr=bars[0],
            yerr=bars[1],
            color=colour,
            marker=marker,
            markersize=9,
            capsize=3,
            elinewidth=1.4,
            linestyle="none",
            label=arm.label,
            markeredgecolor=PAPER,
            zorder=3,
        )
        _draw_path(axes, comparison, arm, (x, y), colour, marker)
    axes.margins(0.12)
    axes.set_xlabel("mean old ability (%)  \u2192 keeps more")
    axes.set_ylabel("new-skill success (%)  \u2192 learns more")
    legend(figure, axes)


def _draw_path(axes, comparison: Comparison, arm: Arm, end, colour: str, marker: str) -> None:
    """From the base's point through the checkpoints to the arm's own."""
    steps = comparison.path(arm)
    if not steps:
        return
    base = comparison.arms.get("base")
    start = [] if base is None else [(comparison.value(base, "mean"), comparison.value(base, "new"))]
    points = [pair for pair in [*start, *((x, y) for _, x, y in steps), end] if pair[0] and pair[1]]
    axes.plot([100 * x.mean for x, _ in points], [100 * y.mean for _, y in points], color=colour, linewidth=1.0, alpha=0.7, zorder=2)
    for _, x, y in steps:
        axes.plot(100 * x.mean, 100 * y.mean, color=colour, marker=marker, markersize=4.5, markeredgecolor=PAPER, zorder=2)
    for place, said in together([(step, 100 * x.mean, 100 * y.mean) for step, x, y in steps]):
        axes.annotate(said, place, xytext=(4, 4), textcoords="offset points", fontsize=7, color=MUTED)


def together(points: List[Tuple[int, float, float]], reach: float = 2.0) -> List[Tuple[Tuple[float, float], str]]:
    """(x, y) and text of the labels of (step, x, y) in percent; points within `reach` of one another share the first one's."""
    labels: List[Tuple[Tuple[float, float], str]] = []
    for step, x, y in points:
        for number, ((left, low), said) in enumerate(labels):
            if abs(x - left) < reach and abs(y - low) < reach:
                labels[number] = ((left, low), f"{said}, {step}")
                break
        else:
            labels.append(((x, y), str(step)))
    return labels


def _forgetting(figure, comparison: Comparison, tuned: List[Arm], base: Arm, style) -> None:
    axes = figure.add_subplot()
    keys = ["mean", *comparison.parts("mean")]
    labels = ["MEAN", *[comparison.measure(key).label for key in keys[1:]]]
    thick = 0.8 / len(tuned)
    for index, arm in enumerate(tuned):
        drawn = False
        for row, key in enumerate(keys):
            d = comparison.difference(arm, base, key)
            if d.mean is None:
                continue
            lost = -100 * d.mean
            bars = [[100 * (d.high - d.mean)], [100 * (d.mean - d.low)]] if d.low is not None else None
            axes.barh(
                row - 0.4 + thick * (index + 0.5),
                lost,
                thick * 0.9,
                color=style[arm.name][0],
                label=None if drawn else arm.label,
                xerr=bars,
                error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 2},
            )
            drawn = True
    axes.axvline(0, color=INK, linewidth=1.0)
    axes.axhline(0.5, color=LINE, linewidth=1.0)
    axes.set_yticks(range(len(keys)), labels)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.invert_yaxis()
    axes.set_xlabel("base minus arm (points)  \u2192 forgotten")
    legend(figure, axes)


class Curve(NamedTuple):
    """A training curve: metrics with their line styles, `log` for a log axis where the values span two decades."""

    name: str
    title: str
    caption: str
    keys: List[Tuple[str, str]]
    label: str
    log: bool = False
    legend: Tuple[str, ...] = ()
    smooth: bool = False


CURVES = [
    Curve(
        "loss",
        "Training loss",
        "Action-token cross-entropy: faint each logged step, bold its moving average.",
        [("loss", "-")],
        "loss",
        True,
        (),
        True,
    ),
    Curve(
        "drift",
        "Drift d and its threshold",
        "Dots are measurements, the line their moving average, the dashed line the threshold. "
        "Where shaded, the Thermostat only calibrates.",
        [("d_ema", "-")],
        "drift d",
    ),
    Curve(
        "divergence",
        "Divergence from the teacher, and what the loop opens",
        "Nats per answer token on probe items that the offline stage has not seen (solid), and the opening that acted (dashed).",
        [("kl", "-"), ("opening", "--")],
        "KL (nats); opening",
        True,
        ("KL", "opening"),
    ),
    Curve(
        "gains",
        "Gains",
        "What the Thermostat did: lower gamma suppresses fragile directions more, lower beta plastic ones.",
        [("gamma", "-"), ("beta", "--")],
        "gain",
        False,
        ("gamma", "beta"),
    ),
    Curve(
        "surgery_norms",
        "Gradient norm before and after surgery",
        "Surgery may only shrink a gradient: dashed never lies above solid.",
        [("g_norm", "-"), ("g_prime_norm", "--")],
        "norm",
        True,
        ("before", "after"),
        True,
    ),
    Curve(
        "surgery_norms_lora_input",
        "Gradient norm at the LoRA input, where both sites are used",
        "As the figure of the residual stream, for the other site: dashed never lies above solid.",
        [("lora_input/g_norm", "-"), ("lora_input/g_prime_norm", "--")],
        "norm",
        True,
        ("before", "after"),
        True,
    ),
    Curve(
        "clip_norms",
        "Gradient norm before and after the clip",
        "Where the two part, the clip acts; a clip after surgery can undo part of it.",
        [("grad_norm", "-"), ("grad_norm_clipped", "--")],
        "norm",
        True,
        ("before", "after"),
        True,
    ),
    Curve(
        "leak",
        "Leak and shares",
        "Leak: share of the weight update that acts on protected inputs. Shares: the gradient's energy in fragile "
        "and plastic directions.",
        [("leak", "-"), ("share_f", "--"), ("share_p", ":")],
        "share",
        False,
        ("leak", "fragile", "plastic"),
        True,
    ),
    Curve(
        "shares_lora_input",
        "Shares at the LoRA input, where both sites are used",
        "The gradient's energy in fragile and plastic directions of the adapted linears' inputs.",
        [("lora_input/share_f", "--"), ("lora_input/share_p", ":")],
        "share",
        False,
        ("fragile", "plastic"),
        True,
    ),
]


def _curves(figure, curve: Curve, arms: List[Arm], style) -> None:
    from matplotlib.lines import Line2D

    axes = figure.add_subplot()
    lows, highs, used = [], [], {}
    for arm in arms:
        colour = style[arm.name][0]
        for index, (key, line) in enumerate(curve.keys):
            steps, values = arm.values(key)
            if not steps:
                continue
            if curve.legend:
                used[curve.legend[index]] = line
            if curve.smooth and len(values) > 60:
                if line == "-" and len(arms) < 4:
                    axes.plot(*_thin(steps, values), color=colour, alpha=0.22, linewidth=0.8)
                values = _moving_average(values)
            sparse = len(steps) < 2
            axes.plot(*_thin(steps, values), color=colour, linestyle=line, marker="o" if sparse else None)
            lows.append(min(values))
            highs.append(max(values))
        if curve.name == "drift":
            _drift_marks(axes, arm, colour, shade=arm is arms[0])
    if curve.log and lows and min(lows) > 0 and max(highs) / min(lows) > 30:
        axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(curve.label)
    handles = [Line2D([], [], color=style[arm.name][0], linewidth=2.2, label=arm.label) for arm in arms]
    handles += [Line2D([], [], color=MUTED, linestyle=line, label=label) for label, line in used.items()]
    legend(figure, axes, handles)


def _drift_marks(axes, arm: Arm, colour: str, shade: bool) -> None:
    axes.plot(*arm.values("d"), color=colour, marker="o", markersize=2.6, linestyle="none", alpha=0.6)
    steps, thresholds = arm.values("threshold")
    if steps:
        axes.plot([steps[0], arm.last_step], [thresholds[-1]] * 2, color=colour, linestyle="--", linewidth=1.1)
    calibrating = [step for step, value in zip(*arm.values("calibrating")) if value > 0]
    if shade and calibrating:
        axes.axvspan(0, calibrating[-1], color=MUTED, alpha=0.13, linewidth=0)


def _moving_average(values: List[float]) -> List[float]:
    """Centred mean over a twentieth of the values (at most 51), narrower towards the ends."""
    half = max(1, min(25, len(values) // 40))
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    out = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        out.append((sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1))
    return out


def _thin(steps: List[int], values: List[float], most: int = 400) -> Tuple[List[int], List[float]]:
    """At most about `most` points (the last one kept), so that a long run stays a small page."""
    stride = max(1, len(steps) // most)
    keep = list(range(0, len(steps), stride))
    if keep[-1] != len(steps) - 1:
        keep.append(len(steps) - 1)
    return [steps[i] for i in keep], [values[i] for i in keep]


def legend(figure, axes, handles=None) -> None:
    """Above the axes; of what they hold, or of these handles."""
    handles = handles or axes.get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, handlelength=1.8, columnspacing=1.2, borderaxespad=0.2)


def render(item: Figure, narrow: bool = False):
    """The drawn matplotlib figure, with its canvas."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(RC):
        figure = Canvas(figsize=item.narrow if narrow else item.wide, layout="constrained")
        FigureCanvasAgg(figure)
        item.draw(figure, narrow)
    return figure


def _svg(figure, salt: str) -> str:
    import matplotlib

    with matplotlib.rc_context({**RC, "svg.hashsalt": salt}), io.BytesIO() as file:
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
        return file.getvalue().decode("utf-8")


def save_files(item: Figure, folder: Path) -> List[Path]:
    """figures/<name>.png and .svg, on white."""
    import matplotlib

    figure = render(item)
    paths = [folder / f"{item.name}.png", folder / f"{item.name}.svg"]
    with matplotlib.rc_context({**RC, "svg.hashsalt": item.name}):
        figure.savefig(paths[0], dpi=170, facecolor="white", metadata={"Software": None})
        figure.savefig(paths[1], facecolor="white", metadata={"Date": None})
    return paths


def inline_svg(item: Figure, style: Style, narrow: bool = False) -> str:
    """An <svg> element for HTML: scales to its container, takes its colours and font from the page, refers to nothing outside."""
    prefix = f"{item.name}{'-n' if narrow else ''}-"
    text = _svg(render(item, narrow), prefix)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)  # the page has its own style sheet
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    box = re.search(r'viewBox="([^"]*)"', text)[1]
    text = re.sub(r"<svg[^>]*>", f'<svg viewBox="{box}" role="img" aria-label="{item.title}">', text, count=1)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', text)
    text = re.sub(r"url\(#", f"url(#{prefix}", text)
    text = re.sub(r'href="#', f'href="#{prefix}', text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1; font-family: inherit", text)
    colours = dict(INLINE)
    for name, (light, _, _) in style.items():
        colours[light] = f"var({css_name(name)})"
    for colour, variable in colours.items():
        text = text.replace(colour, variable)
    return text
