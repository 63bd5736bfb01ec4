"""The command line: `vlakeep <stage> --config X [--key value]`.

Finds the storage root and points the library caches into it, then imports the stage and calls its `main(argv) -> int`. Heavy
libraries are imported by the stage only, so that `vlakeep --help` is quick and the cache variables are set before they are read.
"""

import ast
import dataclasses
import difflib
import importlib
import inspect
import os
import signal
import sys
import typing
from pathlib import Path
from typing import Dict, List, NamedTuple

from vlakeep.core.errors import Interrupted, explain, is_user_error

# Waiting OpenMP threads spin by default; beside any other busy process that makes a training step on two cores ten times slower. It must
# be said before torch loads its OpenMP runtime. A value that the user has set is kept.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class Stage(NamedTuple):
    """Where a stage lives, what it does, whether it takes the configuration's keys (else its own options and --help)."""

    module: str
    help: str
    function: str = "main"
    configured: bool = True


STAGES: Dict[str, Stage] = {
    "demo": Stage("vlakeep.demo", "the whole pipeline on the small model that ships with vlakeep, in minutes on a CPU"),
    "preflight": Stage("vlakeep.preflight", "check everything a stage needs, and say how to mend what is missing"),
    "storage-check": Stage(
        "vlakeep.preflight", "check that all big files lie below the storage root; free space", "storage_check"
    ),
    "fetch": Stage("vlakeep.core.fetch", "bring a base model from the hub below the storage root, with retries"),
    "tabletop-data": Stage("vlakeep.tabletop.data", "make the demonstrations and the probe of the tabletop benchmark"),
    "audit-probe": Stage("vlakeep.openvla.audit", "print token by token what of a probe prompt counts as instruction"),
    "offline": Stage("vlakeep.offline", "the frozen teacher's ICSM subspaces and Thermostat statistics, once per base model"),
    "train": Stage("vlakeep.train", "fine-tune LoRA adapters, plain (baseline) or with the method"),
    "evaluate": Stage("vlakeep.evaluate", "new skill, old abilities and drift of a run, one record per trial"),
    "libero-check": Stage("vlakeep.libero.check", "does the LIBERO simulator run here, and as the official data were rendered"),
    "libero-demos": Stage("vlakeep.libero.demos", "demonstrations of LIBERO tasks by a scripted expert, as RLDS or HDF5"),
    "libero-vqa": Stage("vlakeep.libero.vqa", "a probe of LIBERO scenes: instructions, and visual questions with known answers"),
    "report": Stage("vlakeep.report", "tables, figures and an HTML page that compare evaluated runs"),
    "export": Stage("vlakeep.export", "merge a run's adapter into the base weights, in the official directory format"),
    "verify-golden": Stage("vlakeep.parity.verify_golden", "compare with numbers recorded from the official OpenVLA code",
                           configured=False),
    "verify-openvla": Stage("vlakeep.parity.verify_openvla", "compare vlakeep's model with the official code of your checkout",
                            configured=False),
    "pretrain-tabletop": Stage("vlakeep.tabletop.pretrain", "rebuild the small model that ships with vlakeep (one GPU)", configured=False),
    "pretrain-libero": Stage("vlakeep.libero.pretrain", "a small model of LIBERO demonstrations, from nothing (one GPU)", configured=False),
}


def usage() -> str:
    lines = ["usage: vlakeep <stage> [--config FILE] [--key value ...]", "", "stages:"]
    lines += [f"  {name:<18} {stage.help}" for name, stage in STAGES.items()]
    lines += [
        "",
        "vlakeep <stage> --help   what it reads and writes, and every configuration key with its default",
        "VLAKEEP_ROOT=DIR         storage root for models, data, artefacts and runs (default /opt/data/private/vlakeep)",
        "VLAKEEP_DEBUG=1          show the traceback of an error",
    ]
    return "\n".join(lines)


def stage_help(name: str) -> str:
    """The stage's own docstring, and the configuration keys."""
    stage = STAGES[name]
    path = Path(__file__).parent / (stage.module.split(".", 1)[1].replace(".", "/") + ".py")
    text = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.is_file() else None) or stage.help
    return text + ("\n\n" + config_help() if stage.configured else "")


def config_help() -> str:
    """Every configuration key with its default and the comment above it in config.py."""
    from vlakeep.core import config

    lines = ["configuration keys (in the YAML file, or on the command line as --section.key value):"]

    def comments(cls) -> Dict[str, str]:
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

    def section(cls, prefix: str):
        notes, hints, defaults, later = comments(cls), typing.get_type_hints(cls), cls(), []
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[field.name]):
                later.append((hints[field.name], f"{prefix}{field.name}."))
                continue
            lines.append(f"  --{prefix}{field.name} {getattr(defaults, field.name)}")
            if notes.get(field.name):
                lines.append(f"      {notes[field.name]}")
        for cls_, prefix_ in later:
            lines.append("")
            section(cls_, prefix_)

    section(config.Config, "")
    return "\n".join(lines)


def _terminate(number, frame):
    raise SystemExit(128 + number)  # an exception, so that locks, temporary files and the run's status are put in order


def run(argv: List[str]) -> int:
    """Run one stage; the exit status: 0 success, 1 a check failed, 2 a mistake of the user, 130, 138 and 143 signals."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from vlakeep.core.provenance import version_line

        print(version_line())
        return 0
    name, rest = argv[0], argv[1:]
    if name not in STAGES:
        close = difflib.get_close_matches(name, STAGES, n=1, cutoff=0.5)
        print(
            f"error: no stage `{name}`" + (f"; did you mean `{close[0]}`?" if close else "; `vlakeep --help` lists them"),
            file=sys.stderr,
        )
        return 2
    stage = STAGES[name]
    if stage.configured and ("--help" in rest or "-h" in rest):
        print(stage_help(name))
        return 0
    from vlakeep.core import log
    from vlakeep.core.storage import prepare_environment

    log.install()
    prepare_environment(rest, demo=name == "demo")
    return getattr(importlib.import_module(stage.module), stage.function)(rest) or 0


def main() -> int:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, _terminate)
    debug = os.environ.get("VLAKEEP_DEBUG") == "1"
    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except Interrupted as end:  # the stage has said so
        return end.status
    except BrokenPipeError:  # `vlakeep --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug or not is_user_error(error):
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
