"""Progress and notices, as the logger `vlakeep`: a program that uses vlakeep as a library hears of them what its own logging says.

The command line shows them as plain lines, info on stdout and warnings on stderr (`install`). What a stage prints as its result does
not go through here.
"""

import logging
import sys
from functools import partialmethod

from tqdm import tqdm

log = logging.getLogger("vlakeep")


class PlainLines(logging.Handler):
    """Each message as a line of its own. The stream is looked up for each, as `print` does, so that whoever redirects it gets it."""

    def emit(self, record: logging.LogRecord) -> None:
        # An error goes to the caller, as from print: a reader that has gone ends the command (cli.main), instead of a traceback per line.
        print(self.format(record), file=sys.stderr if record.levelno >= logging.WARNING else sys.stdout, flush=True)


def install(quiet: bool = False) -> None:
    """Show all messages from `info` on; called twice, they are still shown once. A level that was set before is kept. quiet: none below an
    error and no bars, for processes of a job that would say the same once more."""
    if not any(isinstance(handler, PlainLines) for handler in log.handlers):
        log.addHandler(PlainLines())
    log.propagate = False  # libraries of the official environment put handlers of their own on the root logger
    if log.level == logging.NOTSET:
        log.setLevel(logging.ERROR if quiet else logging.INFO)
    if quiet:
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)  # type: ignore[method-assign, assignment]
