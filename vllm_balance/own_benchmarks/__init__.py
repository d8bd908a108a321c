"""Benchmarks that are not of servers by arm: rows and a table of their own. One file for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from vllm_balance.measured_tables import MeasuredTable
from vllm_balance.measurement import first_row, read_rows
from vllm_balance.own_benchmarks import look_ahead, recorder, recovery
from vllm_balance.own_benchmarks.rows import OwnRow, RowT, newest_run


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnBenchmark(Generic[RowT]):
    """What a benchmark is about, and how its rows are read and shown."""

    about: str
    row: type[RowT]
    table: Callable[[list[RowT]], MeasuredTable]
    """Of one run."""


OWN_BENCHMARKS: dict[str, OwnBenchmark[Any]] = {
    "recorder": OwnBenchmark(
        about="What recording costs while serving", row=recorder.Burst, table=recorder.table
    ),
    "recovery": OwnBenchmark(
        about="Recovery from a change in mid-run", row=recovery.Burst, table=recovery.table
    ),
    "look_ahead": OwnBenchmark(
        about="Fetching ahead what the next layer's router would choose",
        row=look_ahead.Served,
        table=look_ahead.table,
    ),
}
"""Each by the name in its rows, which is that of its module in bench too."""


def name_in(path: Path) -> str | None:
    """Which of them the first line of a file says that it is of.

    Raises:
        BalancerError: the file cannot be read.
    """
    first = first_row(path)
    name = first.get("run")
    is_own = "format" not in first and isinstance(name, str) and name in OWN_BENCHMARKS
    return name if is_own else None


def read(path: Path, name: str) -> list[OwnRow]:
    """All rows of a file of one of them, oldest first, as `read_rows` does."""
    row: type[OwnRow] = OWN_BENCHMARKS[name].row
    return read_rows(
        path, row.model_validate_json, f"row of bench.{name}", f"python -m bench.{name}"
    )


__all__ = ["OWN_BENCHMARKS", "OwnBenchmark", "OwnRow", "name_in", "newest_run", "read"]
