"""What the rows of all benchmarks of their own have in common, and which are of one run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from vllm_balance.documents import Document
from vllm_balance.measured_tables import MeasuredTable


class OwnRow(Document, extra="ignore"):
    """Where a row comes from; it holds more than tables and plots need."""

    title: str = ""
    """What was served; empty in rows that are older than this field."""
    started: str | None = None
    """The same in all rows of a run, and in no other's; None in rows that are older than this
    field."""
    seed: int
    config_hash: str = ""
    """Of the run file, where there is one."""
    versions: dict[str, str]
    commit: str
    machine: str
    gate: str = ""
    """The proof that the arm answers as one dense rank does, where it was asked for."""

    @property
    def identity(self) -> tuple[str | None, ...]:
        """What the rows of a run have in common: early ones, without a start, their commit."""
        start = self.commit if self.started is None else self.started
        return start, self.config_hash, self.machine

    def table(
        self,
        *,
        caption: str,
        headings: Sequence[str],
        body: list[list[str]],
        command: str,
        left: int = 1,
    ) -> MeasuredTable:
        """A table of the run that this row is the last one of."""
        return MeasuredTable(
            title=self.title,
            caption=caption,
            headings=list(headings),
            body=body,
            origin=f"Measured on {self.machine}; commit {self.commit}",
            command=command,
            left=left,
        )


RowT = TypeVar("RowT", bound=OwnRow)


def newest_run(rows: Iterable[RowT]) -> list[RowT]:
    """The rows of the run that the last one is of."""
    rows = list(rows)
    return [row for row in rows if row.identity == rows[-1].identity]
