"""A run of a benchmark of its own that was ended, and continues where it stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SAME = ("config_hash", "traffic", "sources", "harness", "machine", "versions")
"""What all rows of a run have in common, beside their start."""


def unfinished(results: Path, origin: Row, positions: Sequence[int]) -> list[Row]:
    """Rows of the newest run, if it is of the same code, machine and settings and lacks some of
    the positions; cuts off a last line that a killed run left unfinished.

    Args:
        origin: what the rows that are to come have in common.
    """
    if not results.exists():
        return []
    content = results.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        results.write_bytes(whole)
    rows = [json.loads(line) for line in whole.splitlines()]
    newest = [row for row in rows if row.get("started") == rows[-1].get("started")]
    same = all(row.get(key) == origin.get(key) for row in newest for key in SAME)
    lacks = set(positions) - {row["position"] for row in newest}
    return newest if same and lacks else []


def append(results: Path, rows: Sequence[Row]) -> None:
    """Adds the rows at the end of the file, which is made if it is not there."""
    results.parent.mkdir(exist_ok=True)
    with results.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
