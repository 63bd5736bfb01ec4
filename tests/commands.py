"""Which options the stages (as they declare them) and the scripts take, and which of a command line they do not."""

import ast
import re
from pathlib import Path
from typing import List, Set

from vlakeep import cli

REPO = Path(__file__).resolve().parents[1]
ENDS = re.compile(r"&&|\|\||[|;`()]|\s#\s")  # of a command within a line


def parsed_options(path: Path) -> Set[str]:
    """Those that a script of its own gives to argparse."""
    calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    return {a.value[2:] for n in calls if getattr(n.func, "attr", "") == "add_argument" for a in n.args
            if isinstance(a, ast.Constant) and str(a.value).startswith("--")}


def options(words: List[str]) -> Set[str]:
    """What the command takes that begins with these words; an empty set for one that is none of ours."""
    first, second = [*words, "", ""][:2]
    if first in ("vlakeep", "vlakeep.cli") and second in cli.STAGES:
        return set(cli.STAGES[second].names())
    path = REPO / (second if first.startswith("python") else first)
    if path.parent not in (REPO / "scripts", REPO / "speed", REPO / "studies") or not path.is_file() or path.suffix == ".yaml":
        return set()
    if path.suffix not in (".sh", ".sbatch"):
        return {"help"} | parsed_options(path)
    # A run script hands all but --gpus to its stage, those of studies the words of each part, or all.
    handed = r'^launch (\w+)|vlakeep (\w+) (?:"\$study" )?"\$(?:\{words\[@\]\}|@)"'
    stages = re.findall(handed, path.read_text(), re.M)
    return {"gpus", "config", "help"}.union(*(cli.STAGES[one or other].names() for one, other in stages))


def all_options() -> Set[str]:
    """Of all stages and scripts together, for a flag that stands without its command."""
    files = [path for folder in ("scripts", "speed", "studies") for path in (REPO / folder).iterdir() if path.is_file()]
    stages = (stage.names() for stage in cli.STAGES.values())
    return {"version"}.union(*stages, *(options([f"{path.parent.name}/{path.name}"]) for path in files))


def wrong_options(text: str) -> List[str]:
    """`command: --option` of every option in the lines of `text` that its command does not take."""
    wrong = []
    for name, words in re.findall(r"^(\w+)\+?=\((.*)\)$", text, re.M):  # MODEL=(...), and "${MODEL[@]}" in later commands
        text = text.replace(f'"${{{name}[@]}}"', f'{words} "${{{name}[@]}}"')
    for part in (part for line in re.sub(r"\\\n\s*#?", " ", text).splitlines() for part in ENDS.split(line)):
        words = part.replace("'", " ").replace('"', " ").split()
        for start in range(len(words)):
            if known := options(words[start:]):
                given = [word[2:].split("=")[0].rstrip(".,:") for word in words[start + 1:] if re.match(r"--\w", word)]
                wrong += [f"{' '.join(words[start:start + 2])}: --{name}" for name in given
                          if name not in known and not (name.startswith("options.") and "method" in known)]  # a method's own
                break
    return wrong
