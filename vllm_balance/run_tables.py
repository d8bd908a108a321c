"""Which tables the rows of a run make: the same on pages and in reports."""

from __future__ import annotations

from vllm_balance import skew_table, slo_table
from vllm_balance.measured_tables import (
    MeasuredTable,
    arms_table,
    has_few_tokens,
    slow_table,
)
from vllm_balance.measurement import Measurement


def tables(rows: list[Measurement]) -> list[MeasuredTable]:
    """All tables of one run: of throughput within the SLO if it has one, and the main one; of
    several skews a line per arm besides, with what the main one leaves out."""
    has_slo = any(row.slo_tpot_ms is not None for row in rows)
    within = [slo_table.table(rows)] if has_slo else []
    besides = [arms_table(rows)] if skew_table.has_bound(rows) else []
    return [*within, main_table(rows), *besides]


def main_table(rows: list[Measurement]) -> MeasuredTable:
    """What a run is about: skews against their bound, slow ranks or loads of every kind by their
    end-to-end latency, or else its arms."""
    if skew_table.has_bound(rows):
        return skew_table.table(rows)
    every_kind = rows[0].in_turns and len(set(map(has_few_tokens, rows))) > 1
    if every_kind or any(row.slow > 1 for row in rows):
        return slow_table(rows)
    return arms_table(rows)
