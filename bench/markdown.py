"""Tables in Markdown, and the places in docs that generated text goes to."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from vllm_balance.measured_tables import MeasuredTable


def table(headings: Sequence[str], body: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A table whose first `left` columns are text and the others numbers."""
    rule = ["---"] * left + ["---:"] * (len(headings) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *body))


def written(found: MeasuredTable) -> str:
    """A measured table with what it says about itself."""
    text = table(found.headings, found.body, left=found.left)
    intro = f"{found.title}. {found.caption}"
    return "\n".join((intro, "", text, "", f"{found.origin}; `{found.command}`."))


def grouped(
    rows: Iterable[dict[str, Any]], *keys: str
) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The rows by their values of some keys, in the order in which these first come."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return groups


def filled(page: Path, kind: str, render: Callable[[str], str]) -> str:
    """The page with `render(name)` between each `<!-- kind:name -->` and the next `<!-- end -->`.

    Raises:
        ValueError: the page has no such place.
    """
    places = re.compile(rf"(<!-- {kind}:([a-z0-9_-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
    text, found = places.subn(
        lambda place: f"{place[1]}{render(place[2])}\n{place[3]}", page.read_text()
    )
    if not found:
        raise ValueError(f"{page} has no place <!-- {kind}:NAME --> for generated text.")
    return text
