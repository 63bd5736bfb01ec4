"""Where the numbers come from: commits, versions, seeds, hardware, hashes, command lines; how to make them again."""

import json
import shlex
from pathlib import Path
from typing import Dict, List, Optional

from vlakeep.core.errors import quoted
from vlakeep.core.names import closed_name, interpolated_name
from vlakeep.reporting.arms import Arm
from vlakeep.reporting.compare import Comparison, config_changes
from vlakeep.reporting.tables import chip, escape, facts_html


def show_path(path: Optional[Path], root: Optional[Path]) -> str:
    """A path below the storage root as `$VLAKEEP_ROOT/...`."""
    if path is None:
        return "\u2013"
    try:
        return "$VLAKEEP_ROOT/" + str(Path(path).absolute().relative_to(Path(root).absolute())) if root else str(path)
    except ValueError:
        return str(path)


def _argument(path: Path, root: Optional[Path]) -> str:
    """show_path as one word of a command, in which the shell still puts the root in."""
    shown = show_path(path, root)
    variable = "$VLAKEEP_ROOT"
    return f'"{variable}"{quoted(shown[len(variable):])}' if shown.startswith(variable + "/") else quoted(shown)


def _short(value: object) -> str:
    """A hash by its first 12 characters, whole in the tooltip."""
    text = str(value)
    if len(text) > 24 and all(c in "0123456789abcdef" for c in text.lower()):
        return f'<code title="{escape(text)}">{escape(text[:12])}</code>'
    return f"<code>{escape(text)}</code>"


def _hashes(tree: dict) -> str:
    lines = []
    for key, value in (tree or {}).items():
        if isinstance(value, dict):
            lines.append(f"{escape(key)}: {len(value)} files")
        elif value is not None:
            lines.append(f"{escape(key)} {_short(value)}")
    return "<br>".join(lines) or "\u2013"


def _hardware(session: dict) -> str:
    hardware = session.get("hardware") or {}
    lines = [str(hardware.get("cpu") or "")]
    if hardware.get("cores"):
        lines.append(f"{hardware['cores']} cores, {session.get('threads', '?')} threads")
    if hardware.get("memory"):
        lines.append(f"{hardware['memory'] / 1e9:.0f} GB memory")
    gpus: Dict[str, int] = {}
    for gpu in hardware.get("gpus") or []:
        gpus[gpu.get("name", "GPU")] = gpus.get(gpu.get("name", "GPU"), 0) + 1
    lines += [f"{count} \u00d7 {name}" for name, count in gpus.items()]
    return "<br>".join(escape(line) for line in lines if line) or "\u2013"


def provenance_html(comparison: Comparison) -> str:
    """Facts of every trained arm side by side."""
    arms = [arm for arm in comparison.tuned if arm.provenance]
    if not arms:
        return "<p>No training run belongs to this report.</p>"

    def source(arm: Arm) -> str:
        state = arm.session.get("source") or {}
        if not state.get("commit"):
            return "not recorded"
        dirty = {True: "with uncommitted changes (dirty.diff)", False: "clean"}.get(state.get("dirty"), "")
        return f"{_short(state['commit'])}<br>{dirty}"

    def versions(arm: Arm) -> str:
        return "<br>".join(f"{escape(k)} {escape(v)}" for k, v in (arm.session.get("versions") or {}).items() if v) or "\u2013"

    def times(arm: Arm) -> str:
        return f"{escape(arm.session.get('start', '?'))}<br>{escape(arm.session.get('end') or 'not ended')}"

    rows = [
        ["Status", *[escape(arm.status) + (f"<br>{escape(arm.failure)}" if arm.failure else "") for arm in arms]],
        ["Commit", *[source(arm) for arm in arms]],
        ["Seed", *[escape(arm.provenance.get("seed", arm.config.get("seed", "?"))) for arm in arms]],
        ["Steps", *[f"{arm.last_step or 0} of {(arm.config.get('train') or {}).get('steps', '?')}" for arm in arms]],
        [
            "Sessions",
            *[
                f"{len(arm.provenance.get('sessions') or [])}, last on {arm.session.get('world', '?')} process(es)"
                for arm in arms
            ],
        ],
        ["Start, end", *[times(arm) for arm in arms]],
        ["Hardware", *[_hardware(arm.session) for arm in arms]],
        ["Versions", *[versions(arm) for arm in arms]],
        ["Hashes", *[_hashes(arm.session.get("hashes")) for arm in arms]],
    ]
    return facts_html(["", *[chip(arm) for arm in arms]], rows, "Provenance of the runs")


def command_lines(comparison: Comparison) -> List[str]:
    """The command lines as they were given, one per session."""
    lines = []
    for arm in comparison.tuned:
        for session in arm.provenance.get("sessions") or []:
            argv = [str(part) for part in session.get("argv") or []]
            if argv:
                lines.append(shlex.join([Path(argv[0]).name, *argv[1:]]))
    return lines


def closing_of(arm: Arm) -> Optional[dict]:
    """The record of the closing pass that made the arm's adapter out of another run's; None for a run that was trained."""
    return _record(arm, "closing.json")


def interpolation_of(arm: Arm) -> Optional[dict]:
    """The record of the interpolation that the arm's adapter is; None for a run that was trained."""
    return _record(arm, "interpolation.json")


def _record(arm: Arm, name: str) -> Optional[dict]:
    folder = arm.folders.get("run")
    path = folder / name if folder is not None else None
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else None


def again_name(arm: Arm) -> str:
    """What the arm's run is called when it is made again."""
    closing, part = closing_of(arm), interpolation_of(arm)
    if part:
        return interpolated_name(f"{part['run']}_again", part["alpha"], part["modules"])
    return closed_name(f"{closing['run']}_again", closing["budget"]) if closing else f"{arm.run}_again"


def reproduce(comparison: Comparison, root: Optional[Path]) -> List[str]:
    """Commands that make every number of this report again, from the configurations that the runs recorded."""
    lines = [f"export VLAKEEP_ROOT={quoted(root)}"] if root else []
    config = "CONFIG.yaml"
    offline, made = False, set()
    for arm in comparison.tuned:
        folder = arm.folders.get("run")
        if folder is None or not arm.config:
            continue
        config = _argument(folder / "config.yaml", root)
        if arm.config.get("method") != "baseline" and not offline:
            lines.append(f"vlakeep offline --config {config}")
            offline = True
        closing, part = closing_of(arm), interpolation_of(arm)
        again = f"{(closing or part or {'run': arm.run})['run']}_again"
        if again not in made:  # a run and what is made of its adapter are trained once
            lines.append(f"vlakeep train --config {config} --name {quoted(again)}")
        made.add(again)
        if closing:
            if arm.config.get("method") != "graded":
                lines.append(f"vlakeep offline --config {config} --method graded")
            lines.append(f"vlakeep export --config {config} --export.target {quoted(again)} --export.close_to {closing['budget']:g}")
        if part:
            modules = f" --modules {','.join(part['modules'])}" if part["modules"] else ""
            lines.append(f"vlakeep interpolate --config {config} --export.target {quoted(again)} --alphas {part['alpha']:g}{modules}")
        lines.append(f"vlakeep evaluate --config {config} --evaluate.target {quoted(again_name(arm))}")
    if "base" in comparison.arms:
        lines.append(f"vlakeep evaluate --config {config} --evaluate.target base")
    runs = []
    for arm in comparison.arms.values():
        folder = arm.folders.get("run")
        runs.append(arm.name if arm.name == "base" or folder is None else f"{arm.name}={again_name(arm)}")
    lines.append(f"vlakeep report --config {config} --runs {quoted(','.join(runs))}")
    return lines


def changes_html(comparison: Comparison) -> str:
    """What each arm's configuration changes against the baseline's, key by key."""
    reference = comparison.arms.get("baseline")
    if reference is None or not reference.config:
        return ""
    rows = []
    for arm in comparison.methods:
        for key, (theirs, mine) in config_changes(arm, reference).items() if arm.config else ():
            rows.append(
                [f"<code>{escape(key)}</code>", chip(arm), f"<code>{escape(theirs)}</code>", f"<code>{escape(mine)}</code>"]
            )
    if not rows:
        return ""
    table = facts_html(["Key", "Arm", "Plain LoRA", "This arm"], rows, "Configuration differences")
    return f"<details><summary>Configuration keys that differ from plain LoRA ({len(rows)})</summary>{table}</details>"
