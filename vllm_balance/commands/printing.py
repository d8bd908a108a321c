"""Lines that commands print."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def say(line: str, style: str | None = None) -> None:
    """Prints a line as it is, however long, also into a pipe. `style`: its colour."""
    Console().print(line, style=style, markup=False, soft_wrap=True)


def progress() -> Progress:
    """A bar on standard error: what is done, how far it is, and for how long."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))


def spans(numbers: Iterable[int]) -> str:
    """Rising numbers in words, e.g. ``0-3, 7``."""
    found = [int(number) for number in numbers]
    if not found:
        return "-"
    breaks = [at for at, (one, two) in enumerate(pairwise(found), start=1) if two != one + 1]
    parts = [found[a:b] for a, b in pairwise([0, *breaks, len(found)])]
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
