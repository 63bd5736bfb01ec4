"""The command line: `vlakeep <stage> --config X [--key value]`.

Finds the storage root and points the library caches into it, then imports the stage and calls its `main(argv) -> int`. Heavy
libraries are imported by the stage only, so that `vlakeep --help` is quick and the cache variables are set before they are read.
"""

import difflib
import importlib
import os
import sys
from typing import Dict, List

from vlakeep.core.errors import Interrupted, explain, is_user_error
from vlakeep.core.next_step import completed
from vlakeep.core.options import Stage, help_text, stages
from vlakeep.core.signals import end_on_signals, follow_parent

# Waiting OpenMP threads spin by default; beside any other busy process that makes a training step on two cores ten times slower. It must
# be said before torch loads its OpenMP runtime. A value that the user has set is kept.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


STAGES: Dict[str, Stage] = stages()


def usage() -> str:
    lines = ["usage: vlakeep <stage> [--config FILE] [--key value ...]", "", "stages:"]
    lines += [f"  {name:<18} {stage.help}" for name, stage in STAGES.items()]
    lines += [
        "",
        "vlakeep <stage> --help   what it reads and writes, and every option that it takes with its default",
        "VLAKEEP_ROOT=DIR         storage root for models, data, artefacts and runs (default /opt/data/private/vlakeep)",
        "VLAKEEP_DEBUG=1          show the traceback of an error",
    ]
    return "\n".join(lines)


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
    if "--help" in rest or "-h" in rest:
        print(help_text(stage))
        return 0
    from vlakeep.core import log
    from vlakeep.core.storage import prepare_environment

    log.install(quiet=os.environ.get("RANK", "0") != "0")
    prepare_environment(rest, demo=name == "demo")
    return getattr(importlib.import_module(stage.module), stage.function)(rest) or 0


def main() -> int:
    """Entry point of the console script."""
    end_on_signals()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        follow_parent()
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
        print(f"error: {completed(explain(error), sys.argv[1:])}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
