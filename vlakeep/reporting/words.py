"""What the numbers say, in sentences: headline, harm report per arm, and the Chinese summary, all from the same facts."""

from dataclasses import dataclass
from typing import List, NamedTuple, Optional

from vlakeep.reporting.arms import Arm
from vlakeep.reporting.compare import Comparison, Difference, Measure, Value

MINUS, NBSP = "\u2212", "\u00a0"


class Finding(NamedTuple):
    """One sentence and its tone: good, bad, neutral or warn."""

    tone: str
    text: str


def number(value: Optional[float], unit: str, signed: bool = False) -> str:
    """A value as the tables print it: rates as percent with one decimal, typographic minus; a dash for None."""
    if value is None:
        return "\u2013"
    if value in (float("inf"), float("-inf")):
        return (MINUS if value < 0 else "+" if signed else "") + "\u221e"
    value = value * 100 if unit == "percent" else value
    digits = {"percent": 1, "nats": 4, "seconds": 0 if abs(value) >= 10 else 1}.get(unit, 3)
    if round(value, digits) == 0:
        value = 0.0  # no "-0.0"
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", MINUS)


def interval(low: Optional[float], high: Optional[float], unit: str, signed: bool = False) -> str:
    return "" if low is None or high is None else f"[{number(low, unit, signed)}, {number(high, unit, signed)}]"


def value_text(value: Optional[Value], measure: Measure) -> str:
    """`34.0 [25.1, 44.2]`, a bare number without an interval, or a dash."""
    if value is None:
        return number(None, "")
    return f"{number(value.mean, measure.unit)} {interval(value.low, value.high, measure.unit)}".strip()


def difference_text(d: Difference, measure: Measure) -> str:
    if d.verdict == "absent":
        return number(None, "")
    return f"{number(d.mean, measure.unit, True)} {interval(d.low, d.high, measure.unit, True)}".strip()


def _points(d: Difference) -> str:
    return f"{number(d.mean, 'percent', True)} points {interval(d.low, d.high, 'percent', True).replace(' ', NBSP)}"


def _percent(value: Value) -> str:
    return f"{number(value.mean, 'percent')}{NBSP}%"


NOT_MATCHED = {"lower": ", but not at matched success", "unclear": ", but it is not known whether at matched success"}


@dataclass(frozen=True)
class Outcome:
    """Where a method arm stands against the baseline: success (as Comparison.matched) and retention (verdict)."""

    arm: Arm
    success: str
    retention: str
    new: Difference
    mean: Difference

    @property
    def verdict(self) -> str:
        """wins, ties, trades (keeps more but learned less), unclear (keeps more, may have learned less), harms, failed, unknown."""
        if self.arm.status == "failed":
            return "failed"
        if self.success == "unknown" or self.retention in ("unpaired", "absent"):
            return "unknown"
        if self.success == "lower":
            return "trades" if self.retention == "better" else "harms"
        return {"better": "unclear" if self.success == "unclear" else "wins", "worse": "harms"}.get(self.retention, "ties")


def outcomes(comparison: Comparison) -> List[Outcome]:
    found = []
    for arm in comparison.methods:
        success, new = comparison.matched(arm)
        mean = Difference("absent")
        if "baseline" in comparison.arms and comparison.abilities:
            mean = comparison.difference(arm, comparison.arms["baseline"], "mean")
        found.append(Outcome(arm, success, mean.verdict, new, mean))
    return found


def _join(names: List[str], word: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"


def headline(comparison: Comparison) -> str:
    """One sentence for the top of the page."""
    found = outcomes(comparison)
    groups = {}
    for o in found:
        groups.setdefault(o.verdict, []).append(o.arm.label)
    wins = {o.success for o in found if o.verdict == "wins"}
    if "baseline" not in comparison.arms or not found:
        return f"Evaluation of {_join([arm.label for arm in comparison.arms.values()])}"
    parts = []
    if "wins" in groups:
        s = "s" if len(groups["wins"]) == 1 else ""
        level = wins.pop() if len(wins) == 1 else "matched or higher"
        parts.append(
            f"{_join(groups['wins'])} keep{s} more of the old abilities than plain LoRA at {level} success on the new skill"
        )
    for verdict, text in (
        ("trades", "keep{s} more but learn{s} less of the new skill"),
        ("unclear", "keep{s} more than plain LoRA, but too few episodes show how much of the new skill was learned"),
        ("harms", "{is_} worse than plain LoRA"),
        ("ties", "{is_} within noise of plain LoRA"),
        ("failed", "did not finish training"),
        ("unknown", "could not be compared with plain LoRA"),
    ):
        if verdict in groups:
            one = len(groups[verdict]) == 1
            parts.append(f"{_join(groups[verdict])} " + text.format(s="s" if one else "", is_="is" if one else "are"))
    return "; ".join(parts)


def lead(comparison: Comparison) -> List[str]:
    """Two or three sentences under the headline: what plain LoRA did, then each method arm."""
    arms, lines = comparison.arms, []
    base, baseline = arms.get("base"), arms.get("baseline")
    skill = f"the new skill ({comparison.new_skill.replace('_', ' ')})" if comparison.new_skill else "the new skill"
    if base is not None and baseline is not None and baseline.summary is not None:
        one, two = comparison.value(base, "new"), comparison.value(baseline, "new")
        if one and two:
            lines.append(f"Plain LoRA took {skill} from {_percent(one)} to {_percent(two)}.")
        lines.append(_forgetting(comparison, baseline, base))
    for o in outcomes(comparison):
        if o.verdict == "failed":
            lines.append(
                f"{o.arm.label}: training stopped at step {o.arm.last_step or 0} ({o.arm.failure or 'no reason recorded'})."
            )
        elif o.verdict == "unknown":
            lines.append(f"{o.arm.label}: {o.new.note or o.mean.note}.")
        else:
            lines.append(f"{o.arm.label} against plain LoRA: mean old ability {_points(o.mean)}, new skill {_points(o.new)}.")
    return lines


def _forgetting(comparison: Comparison, arm: Arm, base: Arm) -> str:
    if not comparison.abilities:
        return "No old ability was evaluated."
    d = comparison.difference(arm, base, "mean")
    one, two = comparison.value(base, "mean"), comparison.value(arm, "mean")
    if d.verdict in ("absent", "unpaired"):
        return f"Its forgetting against the base is not known ({d.note})."
    path = f"mean old ability went from {_percent(one)} to {_percent(two)} ({_points(d)})"
    return {
        "worse": f"It forgot: {path}.",
        "better": f"It did not forget: {path}.",
        "noise": f"Its forgetting is within noise: {path}.",
    }[d.verdict]


def summary_zh(comparison: Comparison) -> str:
    """The same facts in Chinese."""
    arms, text = comparison.arms, []
    base, baseline = arms.get("base"), arms.get("baseline")
    if base is not None and baseline is not None:
        one, two = comparison.value(base, "new"), comparison.value(baseline, "new")
        if one and two:
            text.append(f"普通 LoRA 微调后，新技能成功率由 {number(one.mean, 'percent')}% 变为 {number(two.mean, 'percent')}%")
        if comparison.abilities:
            one, two, d = (
                comparison.value(base, "mean"),
                comparison.value(baseline, "mean"),
                comparison.difference(baseline, base, "mean"),
            )
            if one and two and d.verdict in ("worse", "better", "noise"):
                verdict = {"worse": "有明确遗忘", "better": "没有遗忘", "noise": "变化在噪声范围内"}[d.verdict]
                text.append(f"旧能力平均由 {number(one.mean, 'percent')}% 变为 {number(two.mean, 'percent')}%（{verdict}）")
    words = {
        "wins": "在新技能成功率{success}的前提下，旧能力保留更多",
        "ties": "与普通 LoRA 的差异在噪声范围内",
        "trades": "旧能力保留更多，但新技能学得更少",
        "unclear": "旧能力保留更多，但新技能的回合太少，无法判断是否学得一样好",
        "harms": "比普通 LoRA 更差",
        "failed": "训练中止",
        "unknown": "无法与普通 LoRA 比较",
    }
    for o in outcomes(comparison):
        numbers = ""
        if o.verdict not in ("failed", "unknown"):
            numbers = (
                f"（旧能力平均 {number(o.mean.mean, 'percent', True)} 个百分点，"
                f"95% 区间 {interval(o.mean.low, o.mean.high, 'percent', True)}；"
                f"新技能 {number(o.new.mean, 'percent', True)}，区间 {interval(o.new.low, o.new.high, 'percent', True)}）"
            )
        said = words[o.verdict].format(success="更高" if o.success == "higher" else "相当（差异在噪声范围内）")
        text.append(f"{o.arm.label_zh}{'' if o.arm.label_zh[-1] == '）' else ' '}{said}{numbers}")
    return "；".join(text) + "。" if text else ""


def findings(comparison: Comparison, arm: Arm) -> List[Finding]:
    """What helped and what hurt in this arm, against the baseline (or, for the baseline itself, against the base)."""
    found: List[Finding] = []
    if arm.status == "failed":
        found.append(
            Finding(
                "bad",
                f"Training failed at step {arm.last_step or 0}: {arm.failure or 'no reason recorded'}."
                + (" The numbers are those of its last checkpoint." if arm.summary is not None else ""),
            )
        )
    elif arm.status in ("interrupted", "running"):
        found.append(Finding("warn", f"The run's status is `{arm.status}`: it did not reach its last step."))
    base, baseline = comparison.arms.get("base"), comparison.arms.get("baseline")
    if arm.summary is not None:
        if base is not None and base.summary is not None:
            found += _against_base(comparison, arm, base)
        if baseline is not None and arm is not baseline and baseline.summary is not None:
            found += _against_baseline(comparison, arm, baseline)
    found += training_health(arm)
    found += [Finding("warn", f"Alarm: {alarm}.") for alarm in (arm.summary or {}).get("alarms", [])]
    found += [Finding("warn", note[0].upper() + note[1:] + ".") for note in arm.notes]
    return found


def _against_base(comparison: Comparison, arm: Arm, base: Arm) -> List[Finding]:
    d = comparison.difference(arm, base, "new")
    words = {
        "better": ("good", "It learned the new skill"),
        "worse": ("bad", "It is worse at the new skill than before training"),
        "noise": ("bad", "It did not measurably learn the new skill"),
    }
    found = []
    if d.verdict in words:
        found.append(Finding(words[d.verdict][0], f"{words[d.verdict][1]}: {_points(d)} against the base."))
    if comparison.abilities:
        d = comparison.difference(arm, base, "mean")
        tone = {"worse": "bad", "better": "good"}.get(d.verdict, "neutral")
        found.append(Finding(tone, _forgetting(comparison, arm, base)))
    return found


def _against_baseline(comparison: Comparison, arm: Arm, baseline: Arm) -> List[Finding]:
    state, new = comparison.matched(arm)
    found = []
    if state == "unknown":
        return [Finding("warn", f"No comparison with {baseline.label}: {new.note}.")]
    if state == "lower":
        found.append(
            Finding(
                "bad",
                f"Harm: new-skill success is below {baseline.label} beyond the interval, {_points(new)}. Success is not "
                "matched, so less forgetting may only mean less learning.",
            )
        )
    elif state == "higher":
        found.append(
            Finding(
                "good",
                f"New-skill success is above {baseline.label} beyond the interval, {_points(new)}; "
                "forgetting is compared at higher success.",
            )
        )
    elif state == "unclear":
        found.append(
            Finding(
                "warn",
                f"New-skill success is within noise of {baseline.label}, {_points(new)}, which is no match: it may be up to "
                f"{number(-new.low, 'percent')} points lower. Evaluate more episodes before forgetting is compared.",
            )
        )
    else:
        found.append(
            Finding(
                "neutral",
                f"New-skill success is within noise of {baseline.label}, {_points(new)}; forgetting is compared at "
                f"matched success (the interval allows it to be up to {number(-min(new.low, 0.0), 'percent')} points lower).",
            )
        )
    verdicts = {}
    for measure in comparison.measures:
        if measure.key in [*comparison.parts("mean"), "kl"]:
            d = comparison.difference(arm, baseline, measure.key)
            verdicts.setdefault(d.verdict, []).append((measure, d))

    def listed(items, bounds):
        texts = [(m, difference_text(d, m) if bounds else number(d.mean, m.unit, True)) for m, d in items]
        return ", ".join(f"{m.label} {text}{'' if m.unit == 'percent' else ' ' + m.unit}" for m, text in texts)

    if comparison.abilities:
        mean = comparison.difference(arm, baseline, "mean")
        if mean.verdict == "better":
            tone, text = (
                "warn" if state in NOT_MATCHED else "good",
                f"Helped: mean old ability is above {baseline.label}, {_points(mean)}",
            )
            text += NOT_MATCHED.get(state, "")
        elif mean.verdict == "worse":
            tone, text = "bad", f"Harm: mean old ability is below {baseline.label} beyond the interval, {_points(mean)}"
        elif mean.verdict == "noise":
            tone, text = "neutral", f"Mean old ability is within noise of {baseline.label}, {_points(mean)}"
        else:
            tone, text = "warn", f"Mean old ability is not compared: {mean.note}"
        found.append(Finding(tone, text + "."))
    tested = sum(len(verdicts.get(key, [])) for key in ("better", "worse", "noise"))
    chance = f" (of {tested} tested, {0.05 * tested:.1f} are expected by chance)"
    if "worse" in verdicts:
        found.append(
            Finding("bad", f"Harm, worse than {baseline.label} beyond the interval: {listed(verdicts['worse'], True)}{chance}.")
        )
    if "better" in verdicts:
        found.append(
            Finding(
                "warn" if state in NOT_MATCHED else "good",
                f"Helped, beyond the interval: {listed(verdicts['better'], False)}{chance}.",
            )
        )
    if "noise" in verdicts:
        found.append(Finding("neutral", "Within noise: " + ", ".join(m.label for m, _ in verdicts["noise"]) + "."))
    for measure, d in verdicts.get("unpaired", []):
        found.append(Finding("warn", f"{measure.label}: {d.note}."))
    one, two = arm.train_seconds, baseline.train_seconds
    if one and two:
        found.append(Finding("neutral", f"Training took {one / two:.2f} times as long as {baseline.label}."))
    return found


def training_health(arm: Arm) -> List[Finding]:
    """What the training log says: finite, surgery a contraction, Thermostat awake."""
    found = []
    bad = {key: arm.nonfinite(key) for key in ("loss", "penalty", "grad_norm", "d")}
    bad = {key: count for key, count in bad.items() if count}
    if bad:
        found.append(
            Finding("warn", "Not finite: " + ", ".join(f"{key} on {count} logged steps" for key, count in bad.items()) + ".")
        )
    sites = {"": "", "lora_input/": ""}  # the fields of a single site have no prefix, whichever site it is
    if any("lora_input/g_norm" in row for row in arm.metrics):
        sites = {"": "Residual stream: ", "lora_input/": "LoRA input: "}
    found += [finding for prefix, site in sites.items() for finding in _contraction(arm, prefix, site)]
    _, gammas = arm.values("gamma")
    _, betas = arm.values("beta")
    if gammas and betas:
        if min(gammas) == max(gammas) == min(betas) == max(betas) == 1.0:
            found.append(
                Finding(
                    "warn", "The gains stayed at 1 throughout: surgery changed nothing, so this arm trained as plain LoRA does."
                )
            )
        else:
            found.append(
                Finding(
                    "neutral",
                    f"Gains: gamma {gammas[0]:.2f} \u2192 {gammas[-1]:.2f} (lowest {min(gammas):.2f}), "
                    f"beta {betas[0]:.2f} \u2192 {betas[-1]:.2f} (lowest {min(betas):.2f}).",
                )
            )
    return found


def _contraction(arm: Arm, prefix: str, site: str) -> List[Finding]:
    """Whether the surgery at one site only ever shrank the gradient; nothing when none was logged."""
    norms = [(row.get(f"{prefix}g_norm"), row.get(f"{prefix}g_prime_norm")) for row in arm.metrics]
    norms = [(before, after) for before, after in norms if before is not None and after is not None]
    grown = sum(after > before * (1 + 1e-4) for before, after in norms)
    if grown:
        return [Finding("bad", f"{site}\u2016g\u2032\u2016 exceeds \u2016g\u2016 on {grown} of {len(norms)} logged steps.")]
    start = f"{site}surgery" if site else "Surgery"
    return [Finding("good", f"{start} never enlarged the gradient (\u2016g\u2032\u2016 \u2264 \u2016g\u2016 on all {len(norms)} "
                            "logged steps).")] if norms else []
