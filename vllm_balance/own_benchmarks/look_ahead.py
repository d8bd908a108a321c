"""Guesses of the next layer's experts: what was fetched when, and in vain."""

from __future__ import annotations

import statistics

from pydantic import Field

from vllm_balance.measured_tables import MeasuredTable
from vllm_balance.own_benchmarks.rows import OwnRow

HEADINGS = (
    *("slots per rank", "look-ahead", "needed and there", "fetched late, per layer and step"),
    *("fetched ahead", "of these used", "bytes wasted", "waiting for copies", "guessing"),
    "TTFT ms",
)


class Served(OwnRow):
    """The loads of one server; counters are sums over its ranks."""

    slots: int
    """Dynamic ones of a rank."""
    look_ahead: str
    """`off` or `router`."""
    schedules: int = Field(gt=0)
    """One per layer and step."""
    ttft_ms: float
    """Median over loads."""
    fetches: int = Field(gt=0)
    """Of experts whose tokens waited."""
    early_fetches: int
    """Of experts that were guessed."""
    hits: int
    """Experts that were needed and in a slot."""
    early_hits: int
    """Those of them that were fetched early."""
    fetched_bytes: int = Field(gt=0)
    wasted_bytes: int
    fetch_wait_us: float
    look_ahead_us: float
    """In guessing."""
    experts_us: float = Field(gt=0)


def table(rows: list[Served]) -> MeasuredTable:
    """Per number of slots, without and with look-ahead: what was fetched when, and in vain."""
    body = []
    for slots, how in dict.fromkeys((row.slots, row.look_ahead) for row in rows):
        own = [row for row in rows if (row.slots, row.look_ahead) == (slots, how)]
        fetches, hits = sum(row.fetches for row in own), sum(row.hits for row in own)
        early, schedules = sum(r.early_fetches for r in own), sum(r.schedules for r in own)
        experts_us = sum(row.experts_us for row in own)
        wasted = sum(row.wasted_bytes for row in own) / sum(row.fetched_bytes for row in own)
        body.append(
            [
                str(slots),
                how,
                f"{hits / (hits + fetches):.1%}",
                f"{fetches / schedules:.2f}",
                f"{early / schedules:.2f}",
                f"{sum(row.early_hits for row in own) / early:.1%}" if early else "-",
                f"{wasted:.1%}",
                f"{sum(row.fetch_wait_us for row in own) / experts_us:.1%}",
                f"{sum(row.look_ahead_us for row in own) / experts_us:.1%}",
                f"{statistics.median(row.ttft_ms for row in own):.0f}",
            ]
        )
    return rows[-1].table(
        caption="Sums over ranks and two servers; times as shares of the experts' time.",
        headings=HEADINGS,
        body=body,
        command="python -m bench.look_ahead",
    )
