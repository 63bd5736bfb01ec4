"""What preflight shows: one finding a line. Stages and rooms make them, `vlakeep preflight` prints them."""

from dataclasses import dataclass

GREEN, YELLOW, RED = "ok", "note", "FAIL"


@dataclass(frozen=True)
class Line:
    """One finding: status (ok, note, FAIL), what was checked, where and what was found, and the command that mends it."""

    status: str
    what: str
    where: str
    remedy: str = ""
