"""Reading a nested dataclass from YAML and `--section.key value`, strictly: what is unknown, misplaced or mistyped is an error.

config.py has the schema and its ranges; here is only how it is read, and what a person is told when it cannot be.
"""

import argparse
import copy
import difflib
import functools
from dataclasses import fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, get_args, get_origin, get_type_hints

import draccus
import draccus.argparsing
import yaml

from vlakeep.core.strict_yaml import load_yaml

# Configurations that come with the package.
SHIPPED = Path(__file__).parents[1] / "configs"
# Evaluates every annotation of a class, and is asked for each key of each configuration.
type_hints = functools.lru_cache(maxsize=None)(get_type_hints)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, the place and the remedy."""


@functools.lru_cache(maxsize=None)
def _keys(cls, prefix: str) -> Tuple[str, ...]:
    hints, keys = type_hints(cls), []
    for f in fields(cls):
        keys.append(prefix + f.name)
        if is_dataclass(hints[f.name]):
            keys += _keys(hints[f.name], prefix + f.name + ".")
    return tuple(keys)


def known_keys(cls) -> List[str]:
    """Every dotted key, sections too, e.g. `train` and `train.lr`."""
    return list(_keys(cls, ""))


@functools.lru_cache(maxsize=None)
def type_of(cls, key: str):
    for part in key.split("."):
        cls = type_hints(cls)[part]
    return cls


def open_section(cls, key: str) -> Optional[str]:
    """The section without fixed keys that `key` belongs to: a field that is a dictionary, such as `options` of options.strength.

    One inside another section, data.cards, holds trees; their keys are its own business.
    """
    section, dot, rest = key.partition(".")
    kind = type_hints(cls).get(section)
    if isinstance(kind, type) and is_dataclass(kind) and rest:
        inner, _, below = rest.partition(".")
        return f"{section}.{inner}" if below and get_origin(type_hints(kind).get(inner)) is dict else None
    return section if dot and rest and "." not in rest and get_origin(kind) is dict else None


def in_words(kind, plural: bool = False) -> str:
    """A type for a person: Optional[List[int]] -> a list of whole numbers such as '[1, 2]', or null."""
    inner = [k for k in get_args(kind) if k is not type(None)]
    if get_origin(kind) is list:
        return f"a list of {in_words(inner[0], True)} such as " + ("'[1, 2]'" if inner[0] is int else "'[one, two]'")
    if inner:
        return in_words(inner[0]) + ", or null"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    return names[kind].removeprefix("a ") + "s" if plural else names[kind]


def allowed(field) -> str:
    """What a field of the configuration may be, as a sentence without its point; empty where its type says all."""
    text = field.metadata.get("allowed", "").partition("; --")[0].partition(": ")[0]
    return text[:1].upper() + text[1:]


def pick(argv: List[str], names: Sequence[str]) -> Tuple[Dict[str, str], List[str]]:
    """(the options of these names that are given, the other arguments); the last one counts. A value that is missing is empty."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in names:
        parser.add_argument(f"--{name}", nargs="?", const="", dest=name)
    given, rest = parser.parse_known_args(argv)
    return vars(given), rest


def _flatten(tree: dict, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield prefix + str(key)
        if isinstance(value, dict):
            yield from _flatten(value, prefix + str(key) + ".")


def _refuse_unknown(cls, keys, where: str) -> None:
    known, lines = known_keys(cls), []
    for key in keys:
        if key not in known and not open_section(cls, key):
            leaf = key.split(".")[-1]
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or [k for k in known if k.split(".")[-1] == leaf][:1]
            remedy = f"; did you mean `{close[0]}`?" if close else "; `vlakeep train --help` lists the keys"
            lines.append(f"unknown key `{key}` in {where}" + remedy)
    if lines:
        raise ConfigError("\n".join(lines))


def _refuse_section(cls, key: str, where: str) -> None:
    example = known_keys(type_of(cls, key))[0] if is_dataclass(type_of(cls, key)) else "NAME"
    raise ConfigError(f"`{key}` in {where} is a section and takes no value; give its keys, such as --{key}.{example} "
                      f"(in YAML: `{key}: {{{example}: ...}}`)")


def find_config(name) -> Path:
    """The file that `--config` names: a path that exists, else a configuration that ships, as `configs/x.yaml`, `x.yaml` or `x`; one in
    a folder as `configs/rivals/x.yaml`, `rivals/x`.

    Raises ConfigError listing those that ship.
    """
    given = Path(name)
    if given.is_file():
        return given
    short = given.parts[1:] if given.parts[:1] == ("configs",) else given.parts
    shipped = {path: path.relative_to(SHIPPED) for path in sorted(SHIPPED.rglob("*.yaml"))}
    for path, own in shipped.items():
        if short in (own.parts, own.with_suffix("").parts):
            return path
    known = sorted((own.with_suffix("").as_posix() for own in shipped.values()), key=lambda own: ("/" in own, own))
    raise ConfigError(f"no configuration file at {name}; those that ship are {', '.join(known)}")


@functools.lru_cache(maxsize=64)  # of a study the same few files, hundreds of times
def _tree(text: str) -> Any:
    return load_yaml(text)


def read_yaml(cls, path: Path) -> dict:
    """The tree of a YAML file whose keys are all in `cls`. Raises ConfigError naming the file."""
    try:
        tree = copy.deepcopy(_tree(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text ({error}); --config takes a YAML file as in vlakeep/configs/") from error
    if not isinstance(tree, dict):
        what = "nothing" if tree is None else type(tree).__name__
        raise ConfigError(f"{path} must hold `key: value` pairs as the files in vlakeep/configs/ do, not {what}")
    _refuse_unknown(cls, _flatten(tree), str(path))
    for key, value in tree.items():
        if (is_dataclass(type_of(cls, key)) or get_origin(type_of(cls, key)) is dict) and not isinstance(value, dict):
            _refuse_section(cls, key, str(path))
    return tree


def read_pairs(cls, argv: List[str]) -> List[Tuple[str, str]]:
    """(key, value) of every `--key value` and `--key=value`. Raises ConfigError for unknown keys, stray words, missing values."""
    pairs: List[Tuple[str, Optional[str]]] = []
    for arg in argv:
        if pairs and pairs[-1][1] is None and not arg.startswith("--"):
            pairs[-1] = (pairs[-1][0], arg)
        elif arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            pairs.append((key, value if equals else None))
        else:
            raise ConfigError(f"`{arg}` on the command line belongs to no key; write --section.key VALUE, and a list in quotes: "
                              "'[one, two]'")
    _refuse_unknown(cls, [key for key, _ in pairs], "the command line")
    for key, value in pairs:
        if open_section(cls, key):
            if value is None:
                raise ConfigError(f"--{key} on the command line has no value; it takes a number, a word, or true or false")
            continue
        kind = type_of(cls, key)
        if is_dataclass(kind) or get_origin(kind) is dict:
            _refuse_section(cls, key, "the command line")
        if value is None:
            default = attrgetter(key)(cls())
            example = "true" if kind is bool else default if kind in (int, float, str) else "VALUE"
            raise ConfigError(f"--{key} on the command line has no value; it takes {in_words(kind)}: --{key} {example}")
    return pairs


def _wrong_type(cls, error, pairs: List[Tuple[str, str]], tree: dict, path: Optional[Path]) -> ConfigError:
    parts, known = [str(part) for part in error.key_path], known_keys(cls)
    while parts and ".".join(parts) not in known:  # an element of a list carries its number
        parts.pop()
    if not parts:
        return ConfigError(f"wrong type: {error}")
    key = ".".join(parts)
    given: List[Any] = [value for name, value in pairs if name == key]
    where = "on the command line" if given else f"in {path}"
    value: Any = given[-1] if given else tree
    for part in [] if given else parts:
        value = value[part]
    return ConfigError(f"wrong type: --{key} must be {in_words(type_of(cls, key))}, not {value!r} ({where})")


def _refuse_fractions(cls, pairs: List[Tuple[str, str]], tree: dict, path: Optional[Path]) -> None:
    """Older versions of draccus cut 1.5 down to 1 without a word."""
    given = [(key, value, "on the command line") for key, value in pairs]
    for key in known_keys(cls):
        value: Any = tree
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        given.append((key, value, f"in {path}"))
    for key, value, where in given:
        kind = type_of(cls, key)
        if kind not in (int, Optional[int]):
            continue
        try:
            fraction = isinstance(value, (str, float)) and float(value) % 1 != 0
        except ValueError:
            continue  # draccus says it
        if fraction:
            raise ConfigError(f"wrong type: --{key} must be {in_words(kind)}, not {value!r} ({where})")


def _refuse_nothing(cls, made, pairs: List[Tuple[str, str]], path: Optional[Path]) -> None:
    """draccus takes null, and what YAML reads as null, for a value of any type."""
    for key in known_keys(cls):
        kind = type_of(cls, key)
        if attrgetter(key)(made) is None and kind is not Any and type(None) not in get_args(kind):
            given = [value for name, value in pairs if name == key]
            where = f"{given[-1]!r} (on the command line)" if given else f"null (in {path})"
            raise ConfigError(f"wrong type: --{key} must be {in_words(kind)}, not {where}")


def _unreadable(pairs: List[Tuple[str, str]]) -> List[str]:
    """A line for each value that YAML, which words are read by, cannot read: brackets that stay open, control characters."""
    lines = []
    for key, value in pairs:
        try:
            load_yaml(value)
        except yaml.YAMLError as error:
            why = " ".join(str(error).split())
            lines.append(f"--{key} {value!r} on the command line cannot be read ({why}); put quotes around a text, such as '\"[a\"'")
    return lines


@functools.lru_cache(maxsize=None)
def _parser(cls) -> draccus.argparsing.ArgumentParser:
    """draccus.parse makes one for each configuration, which takes four fifths of its time: it reads the sources of every section."""
    return draccus.argparsing.ArgumentParser(config_class=cls)


def parse(cls, name: Optional[str], argv: List[str]):
    """An instance of `cls` from a YAML file, or a configuration that ships, and overrides. Raises ConfigError."""
    pairs = read_pairs(cls, argv)
    loose = [pair for pair in pairs if open_section(cls, pair[0])]
    pairs = [pair for pair in pairs if pair not in loose]
    path = find_config(name) if name is not None else None
    tree = read_yaml(cls, path) if path is not None else {}
    _refuse_fractions(cls, pairs, tree, path)
    args = ["--config_path", str(path)] if path is not None else []
    for key, value in pairs:  # draccus wants two words, but would take a value that starts with "-" for an option
        args += [f"--{key}={value}"] if value.startswith("-") else [f"--{key}", value]
    try:
        made = _parser(cls).parse_args(args)
    except draccus.utils.DecodingError as error:
        raise _wrong_type(cls, error, pairs, tree, path) from error
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError, AttributeError, KeyError) as error:
        raise ConfigError("\n".join(_unreadable(pairs)) or f"the command line could not be read: {error}") from error
    except SystemExit as error:
        raise ConfigError(f"the command line could not be read: {' '.join(args)}") from error
    _refuse_nothing(cls, made, pairs, path)
    for key, text in loose:
        section = open_section(cls, key)
        attrgetter(section)(made)[key[len(section) + 1:]] = plain_value(text)
    return made


def plain_value(text: str) -> Any:
    """A word of the command line as YAML reads it, and as a number where it is one that YAML takes for a word, such as 1e-3."""
    try:
        value = load_yaml(text)
    except yaml.YAMLError:
        return text
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def said(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list) and all(isinstance(one, (bool, int, str, type(None))) for one in value):
        return "[" + ", ".join(map(_in_list, value)) + "]"
    if isinstance(value, (list, dict)):
        return _flow(value)
    if value is None or isinstance(value, bool):
        return _in_list(value)
    return f"{value!r}" if isinstance(value, float) else str(value)


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()


@functools.lru_cache(maxsize=None, typed=True)  # thousands of cells say the same few values, and YAML takes its time
def _in_list(value: Any) -> str:
    return _flow([value])[1:-1]
