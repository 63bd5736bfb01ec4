"""What the runs of a report were trained on: the card of each data set as it was opened, with thumbnails (data/card.py)."""

from typing import Any, Dict, List

from vlakeep.data.card import lines, read_kept
from vlakeep.reporting.compare import Comparison
from vlakeep.reporting.tables import escape


def data_html(comparison: Comparison) -> str:
    """A panel for each data set, once for all arms that saw the same; empty without cards."""
    found: Dict[str, Dict[str, Any]] = {}
    seen: Dict[str, List[str]] = {}
    for arm in comparison.arms.values():
        for report in read_kept(arm.folders["run"]) if arm.folders.get("run") else []:
            text = "\n".join(lines(report))
            found.setdefault(text, report)
            seen.setdefault(text, []).append(arm.label)
    return "".join(_panel(text, report, seen[text]) for text, report in found.items())


def _panel(text: str, report: Dict[str, Any], arms: List[str]) -> str:
    picture = (f'<img alt="pictures of {escape(report["name"])}" style="max-width:100%" '
               f'src="data:image/png;base64,{report["thumbnails"]}">' if report.get("thumbnails") else "")
    return (f'<figure class="panel"><h3>{escape(report["name"])}</h3>{picture}<pre><code>{escape(text)}</code></pre>'
            f"<figcaption>Seen by {escape(', '.join(dict.fromkeys(arms)))}.</figcaption></figure>")
