"""Which options the stages and scripts take, read from their sources, and which of a command line they do not."""

import ast
import functools
import re
from pathlib import Path
from typing import List, Set

from vlakeep import cli
from vlakeep.core.config import known_keys

REPO = Path(__file__).resolve().parents[1]
ENDS = re.compile(r"&&|\|\||[|;`()]|\s#\s")  # of a command within a line


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def parsed_options(node: ast.AST) -> Set[str]:
    """Those that are given to argparse, or taken out of the arguments by name (preflight's _take)."""
    found = set()
    for call in (n for n in ast.walk(node) if isinstance(n, ast.Call)):
        texts = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if getattr(call.func, "attr", getattr(call.func, "id", "")) in ("add_argument", "_take"):
            found |= {text[2:] for text in texts if text.startswith("--")}
    return found


@functools.lru_cache(maxsize=None)
def stage_options(name: str) -> Set[str]:
    """Every option of `vlakeep NAME`, without the dashes."""
    stage = cli.STAGES[name]
    module = tree(REPO / (stage.module.replace(".", "/") + ".py"))
    own = {"help"}
    for node in module.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "OPTIONS":
            names = node.value.keys if isinstance(node.value, ast.Dict) else node.value.elts
            own |= {ast.literal_eval(name) for name in names}
        if isinstance(node, ast.ImportFrom) and node.module == "vlakeep.openvla.pretraining":
            own |= parsed_options(tree(REPO / "vlakeep" / "openvla" / "pretraining.py"))
        if isinstance(node, ast.FunctionDef) and (node.name == stage.function or not stage.configured):
            own |= parsed_options(node)
    if stage.configured:
        own |= set(known_keys())
        reads_file = any(getattr(node, "id", "") == "config_from_argv" for node in ast.walk(module))
        own |= {"config"} if reads_file else set()
    return own


def options(words: List[str]) -> Set[str]:
    """What the command takes that begins with these words; an empty set for one that is none of ours."""
    first, second = [*words, "", ""][:2]
    if first in ("vlakeep", "vlakeep.cli") and second in cli.STAGES:
        return stage_options(second)
    path = REPO / (second if first.startswith("python") else first)
    if path.parent not in (REPO / "scripts", REPO / "speed", REPO / "studies") or not path.is_file():
        return set()
    # A run script hands all but --gpus to its stage.
    return {"gpus", "config", "help", *known_keys()} if path.suffix == ".sh" else {"help"} | parsed_options(tree(path))


def all_options() -> Set[str]:
    """Of all stages and scripts together, for a flag that stands without its command."""
    files = [path for folder in ("scripts", "speed", "studies") for path in (REPO / folder).iterdir() if path.is_file()]
    return {"version"}.union(*map(stage_options, cli.STAGES), *(options([f"{path.parent.name}/{path.name}"]) for path in files))


def wrong_options(text: str) -> List[str]:
    """`command: --option` of every option in the lines of `text` that its command does not take."""
    wrong = []
    for part in (part for line in re.sub(r"\\\n\s*#?", " ", text).splitlines() for part in ENDS.split(line)):
        words = part.replace("'", " ").replace('"', " ").split()
        for start in range(len(words)):
            if known := options(words[start:]):
                given = [word[2:].split("=")[0].rstrip(".,:") for word in words[start + 1:] if re.match(r"--\w", word)]
                wrong += [f"{' '.join(words[start:start + 2])}: --{name}" for name in given if name not in known]
                break
    return wrong
