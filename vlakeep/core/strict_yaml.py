"""YAML as everything here reads it: plain values only, no key twice, and one kind of error whatever is wrong.

PyYAML keeps the last of two equal keys in silence, and lets through what Python says of numbers, dates and depths that are none.
"""

from pathlib import Path
from typing import Any

import yaml


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word, not a list or a mapping", key.start_mark)
            if key.value in seen:
                text = f"`{key.value}` comes twice; keep one of them"
                raise yaml.constructor.ConstructorError(None, None, text, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """The tree of a YAML text. yaml.YAMLError for whatever cannot be read."""
    try:
        return yaml.load(text, _StrictLoader)
    except (ValueError, TypeError, OverflowError, RecursionError, AttributeError, KeyError, IndexError) as error:
        raise yaml.YAMLError(f"a value that is none: {error}") from error


def read_mapping(path: Path, remedy: str) -> dict:
    """The tree of a file that holds `key: value` lines. ValueError with the file and what to do instead where it is damaged."""
    try:
        tree = load_yaml(Path(path).read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise yaml.YAMLError(f"it holds {type(tree).__name__} and no `key: value` lines")
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
    return tree
