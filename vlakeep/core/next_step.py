"""Commands in messages, made whole: what a message tells to run runs in the root and with the configuration of the command that failed.

Where a message is made, only what is wrong is known: "rebuild it with `vlakeep offline`". Where it is printed, the command line is known.
"""

import re
import shlex
from typing import List, Optional

from vlakeep.core.config import ConfigError
from vlakeep.core.options import Stage, split, stages

_COMMAND = re.compile(r"`vlakeep ([a-z][a-z-]*)((?: [^`]*)?)`")


def completed(message: str, argv: List[str]) -> str:
    """The message with each `vlakeep STAGE ...` in it given the file, and those options of the command line `argv` (stage first), that this
    stage reads too. What the message says itself stays; what cannot be read stays as it is."""
    known = stages()
    try:
        _, file, pairs = split(known[argv[0]], argv[1:])
    except (KeyError, IndexError, ConfigError):
        return message

    def whole(found) -> str:
        target = known.get(found[1])
        words = _words(found[2])
        return found[0] if target is None or words is None else "`" + _command(target, words, file, pairs) + "`"

    return _COMMAND.sub(whole, message)


def completed_remedy(remedy: str, argv: List[str]) -> str:
    """The same for a remedy of preflight, all of which is a command."""
    return completed(f"`{remedy}`", argv)[1:-1] if remedy.startswith("vlakeep ") and "`" not in remedy else completed(remedy, argv)


def _words(text: str) -> Optional[List[str]]:
    try:
        words = shlex.split(text)
    except ValueError:
        return None
    return None if "--help" in words else words


def _command(target: Stage, words: List[str], file: Optional[str], pairs: List[str]) -> str:
    if file and "--config" in words and words[words.index("--config") + 1:][:1] == ["..."]:  # to be filled in
        at = words.index("--config")
        words = words[:at] + words[at + 2:]
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    reads = {f"--{key}" for key in target.reads()}
    own = {f"--{option.dest}" for option in target.own}
    added = ["--config", file] if file and target.file and target.keys and "--config" not in given else []
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key in reads and key not in given | own:
            added += [key, value]
    return shlex.join(["vlakeep", target.name, *words, *added])
