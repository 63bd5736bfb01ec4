"""The command line of every stage: which keys of the configuration it reads, and which options are its own.

Each room declares its stages in a file stages.py (core those of no room); nothing heavy is imported there. `read` parses by the
declaration, `help_text` prints it, and what a stage does not read is refused with the stages that do.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import os
from functools import lru_cache
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from vlakeep.core import schema
from vlakeep.core.config import Config, ConfigError, load_config
from vlakeep.core.hardware import hardware, types
from vlakeep.core.log import log
from vlakeep.core.storage import Storage

PACKAGE = Path(__file__).parents[1]


class Option(NamedTuple):
    """An option of a stage's own. A name without dashes is a word that stands by its place; `many` takes one or more of them."""

    name: str
    default: Any
    help: str
    kind: Callable[[str], Any] = str  # word -> value; ValueError says what it must be. bool is a switch, which takes no word
    choices: Sequence[str] = ()
    required: bool = False
    many: bool = False

    @property
    def dest(self) -> str:
        return self.name.lstrip("-")


class Stage(NamedTuple):
    """A verb of the command line.

    keys: what it reads of the configuration, separated by spaces: a section, a key, or -key for one of a section that it does not read.
    file: whether it takes --config; a stage without keys does not.
    """

    name: str
    module: str
    help: str
    keys: str = ""
    own: Tuple[Option, ...] = ()
    function: str = "main"
    file: bool = True

    def reads(self) -> List[str]:
        """Every dotted key that the stage reads, in the order of the configuration."""
        words = self.keys.split()
        given = {word for word in words if not word.startswith("-")}
        without = {word[1:] for word in words if word.startswith("-")}
        return [key for key in leaves() if (key in given or key.split(".")[0] in given) and key not in without]

    def names(self) -> List[str]:
        """Every option without its dashes."""
        named = [option.dest for option in self.own if option.name.startswith("--")]
        return [*named, *(key for key in self.reads() if key not in named), *(["config"] if self.file and self.keys else []), "help"]


def together(*stages: Stage) -> str:
    """The keys that any of these stages reads."""
    return " ".join(dict.fromkeys(key for stage in stages for key in stage.reads()))


# Kinds of values


def whole(least: int = 1) -> Callable[[str], int]:
    def kind(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise ValueError(f"must be a whole number{' above 0' if least == 1 else f' from {least} on'}")
        return int(text)

    return kind


def number(above: bool = False) -> Callable[[str], float]:
    """A plain finite number, 0 or above; `above`: not 0 itself."""
    def kind(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf") or (above and not value):
            raise ValueError("must be a number above 0" if above else "must be a number, 0 or above")
        return value

    return kind


def names(text: str) -> List[str]:
    """Words with commas between them."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str) -> List[float]:
    """Finite numbers, 0 or above, with commas between them."""
    return [number()(word) for word in names(text)]


def wholes(text: str) -> List[int]:
    """Whole numbers, 0 or above, with commas between them."""
    return [whole(0)(word) for word in names(text)]


# Finding stages


def stages() -> Dict[str, Stage]:
    """Every stage by its name: those of core, then those of the rooms that have a file stages.py."""
    rooms = sorted(file.parent.name for file in PACKAGE.glob("*/stages.py") if file.parent.name != "core")
    return {stage.name: stage for room in ("core", *rooms) for stage in import_module(f"vlakeep.{room}.stages").STAGES}


def leaves() -> List[str]:
    """Every dotted key of the configuration that takes a value."""
    return list(_leaves())


@lru_cache(maxsize=None)
def _leaves() -> List[str]:
    return [key for key in schema.known_keys(Config) if not dataclasses.is_dataclass(schema.type_of(Config, key))]


# Reading


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ConfigError(f"{message}; `{self.prog} --help` lists what it takes")


class _Pair(argparse.Action):
    """Collects configuration keys as they come; one without a value is told by schema.py, which knows what it takes."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.pairs_.append(option_string if values is None else f"{option_string}={values}")


def split(stage: Stage, argv: List[str]) -> Tuple[argparse.Namespace, Optional[str], List[str]]:
    """(the stage's own options, the file that --config names, the configuration's keys as --key=value).

    Raises ConfigError for what the stage does not read, and for a value of its own that is missing or wrong.
    """
    parser = _Parser(f"vlakeep {stage.name}", add_help=False, allow_abbrev=False)
    for option in stage.own:
        if not option.name.startswith("-"):
            parser.add_argument(option.name, nargs="*" if option.many else "?")
        elif option.kind is bool:
            parser.add_argument(option.name, action="store_true", dest=option.dest)
        else:
            parser.add_argument(option.name, nargs="?", const="", dest=option.dest)
    if stage.file and stage.keys:
        parser.add_argument("--config", nargs="?", const="")
    own, reads = {option.dest for option in stage.own}, stage.reads()
    sections = {key.split(".")[0] for key in reads}  # a section without a key is refused by schema.py
    loose = {key for key in (arg[2:].partition("=")[0] for arg in argv) if (schema.open_section(Config, key) or "") in reads}
    for key in sorted({*reads, *sections, *loose} - own):
        parser.add_argument(f"--{key}", nargs="?", action=_Pair, dest="pairs_")
    args, rest = parser.parse_known_args(argv, argparse.Namespace(pairs_=[]))
    pairs = args.__dict__.pop("pairs_")
    _refuse(stage, rest)
    config = args.__dict__.pop("config", None)
    if config == "":
        raise ConfigError("--config needs a file, or the name of a configuration that ships, such as baseline_lora")
    for option in stage.own:
        setattr(args, option.dest, _value(stage, option, getattr(args, option.dest)))
    # Before what the command line says, which beats it; a stage is told what it reads. A study asks for its cells (studies/cards.py).
    if getattr(args, "hardware", None) and stage.file:
        chosen = [one for one in types(hardware(args.hardware)) if one.key in stage.reads()]
        given = args.given_ = _keys(pairs)
        for key, value, reason in chosen:
            log.info(f"{args.hardware}: --{key} {value} ({reason})" if key not in given else f"{args.hardware}: --{key} as you say")
        pairs = [f"--{key}={value}" for key, value, _ in chosen] + pairs
    return args, config, pairs


def _keys(pairs: List[str]) -> List[str]:
    return [pair[2:].partition("=")[0] for pair in pairs]


def read(stage: Stage, argv: List[str]) -> Tuple[argparse.Namespace, Config]:
    """(the stage's own options, the configuration). Raises ConfigError."""
    args, file, pairs = split(stage, argv)
    config = load_config(file, pairs)
    if getattr(args, "hardware", None) and any(key.startswith("backbone") for key in stage.reads()):
        card = hardware(args.hardware)
        card = card._replace(memory=getattr(args, "gib", None) or card.memory)
        fit = import_module("vlakeep.planning.fit")  # of a room above this one, by name as the rooms' stages are
        training = "train.batch_size" in stage.reads()
        gpus = int(os.environ.get("WORLD_SIZE", getattr(args, "gpus", None) or 1))  # a training has no --gpus: torchrun says it
        for key, value, reason in fit.fitted(config, card, Storage.from_config(config, create=False).cache, args.given_, training, gpus):
            log.info(f"{args.hardware}: --{key} {value} ({reason})")
    return args, config


def _value(stage: Stage, option: Option, given):
    if option.required and not given:
        raise ConfigError(f"vlakeep {stage.name} needs {option.name}: {option.help}")
    if given is None or option.kind is bool:
        return option.default if given is None else given
    words = given if option.many else [given]
    for word in words:
        if option.choices and word not in option.choices:
            raise ConfigError(f"{option.name} {word!r}: must be one of {', '.join(option.choices)}")
    try:
        values = [option.kind(word) for word in words]
    except ValueError as error:
        raise ConfigError(f"{option.name} {given!r}: {error}") from None
    return values if option.many else values[0]


def _refuse(stage: Stage, rest: List[str]) -> None:
    """ConfigError with a line for each argument that the stage does not take; words behind one are its values."""
    keys = [arg[2:].partition("=")[0] for arg in rest if arg.startswith("--")]
    if keys:
        raise ConfigError("\n".join(dict.fromkeys(_unread(stage, key) for key in keys)))
    if rest:
        raise ConfigError(f"`{rest[0]}` on the command line belongs to no key; write --section.key VALUE, and a list in quotes: "
                          "'[one, two]'")


def _unread(stage: Stage, key: str) -> str:
    names, readers = stage.names(), _readers()
    close = _close(key, names)
    loose = schema.open_section(Config, key)
    if others := readers.get(loose or key):
        told = ", ".join(f"`vlakeep {name}`" for name in others[:3]) + (" and others" if len(others) > 3 else "")
        remedy = f"did you mean `{close}`?" if close else f"`vlakeep {stage.name} --help` lists what it reads"
        return f"--{key} in the command line: `vlakeep {stage.name}` does not read it ({told} would); {remedy}"
    far = None if close else _close(key, readers)
    remedy = f"did you mean `{close or far}`?" if close or far else f"`vlakeep {stage.name} --help` lists what it reads"
    return f"unknown key `{key}` in the command line; {remedy}" + (f" Of `vlakeep {readers[far][0]}`, not of this stage" if far else "")


def _readers() -> Dict[str, List[str]]:
    """Option -> the stages that take it; preflight and the demo, which take most, last."""
    found: Dict[str, List[str]] = {}
    for stage in sorted(stages().values(), key=lambda stage: len(stage.names())):
        for name in stage.names():
            found.setdefault(name, []).append(stage.name)
    return found


def _close(key: str, known) -> Optional[str]:
    leaf = key.split(".")[-1]
    found = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or [name for name in known if name.split(".")[-1] == leaf]
    return found[0] if found else None


# Help


def help_text(stage: Stage) -> str:
    """The docstring of the stage, its own options and the keys that it reads, each with its default and a line of explanation."""
    path = PACKAGE.parent / (stage.module.replace(".", "/") + ".py")
    lines = [(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.is_file() else None) or stage.help]
    if stage.own:
        lines += ["", "options of this stage:"]
        for option in stage.own:
            lines += _entry(option.name, "" if option.kind is bool or option.required else _shown(option.default),
                            _choices(option.choices), option.help)
    if stage.keys:
        lines += ["", "configuration keys that it reads (" + ("in the YAML file that --config names, or " if stage.file else "")
                  + "on the command line as --section.key value):"]
        if stage.file:
            lines += _entry("--config", "", "", "A YAML file, or the name of a configuration that ships, such as baseline_lora.")
        own = {option.dest for option in stage.own}
        lines += config_help([key for key in stage.reads() if key not in own])
    return "\n".join(lines)


def config_help(keys: Sequence[str]) -> List[str]:
    """Lines about these keys: default, what is allowed, and the comment above the field in config.py; an empty one between sections."""
    lines, before = [], None
    for key in keys:
        section, _, name = key.rpartition(".")
        cls = schema.type_of(Config, section) if section else Config
        field = next(f for f in dataclasses.fields(cls) if f.name == name)
        if before not in (None, section):
            lines.append("")
        before = section
        default = attrgetter(key)(Config())
        lines += _entry(f"--{key}", _shown(default), schema.allowed(field), _comments(cls).get(name, ""))
    return lines


def _entry(name: str, default: str, allowed: str, text: str) -> List[str]:
    note = ". ".join(part for part in (allowed, text) if part)
    return [f"  {name} {default}".rstrip(), *([f"      {note}"] if note else [])]


def _shown(value) -> str:
    return "" if value == [] else "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _choices(choices: Sequence[str]) -> str:
    return "One of " + ", ".join(choices) if choices else ""


@lru_cache(maxsize=None)  # inspect parses the whole file for each class
def _comments(cls) -> Dict[str, str]:
    found, block = {}, []
    for line in inspect.getsource(cls).splitlines():
        line = line.strip()
        if line.startswith("#"):
            block.append(line.lstrip("# "))
        else:
            name = line.split(":")[0]
            if ":" in line and name.isidentifier():
                found[name] = " ".join(block)
            block = []
    return found
