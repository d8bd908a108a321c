"""The table of a run with cells: every arm under every skew, against static and the bound."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from bench import markdown

Row = dict[str, Any]
BOUND = ("even", "static")
"""Cell and arm that bound all others: the same server and load under even routing."""
HEADINGS = (
    "skew",
    "arm",
    "tokens/s",
    "of the bound",
    "against static",
    "TTFT ms",
    "TTFT against static",
    "waiting, share of rank time",
    "of it for fetches",
    "batch time, sd / mean",
    "fetches per batch",
    "deciding, share of MoE",
)


def table(rows: list[Row]) -> str:
    """One line per cell and arm, medians over repeats; needs the cell and the arm of the bound."""
    bound = _median(_of(rows, *BOUND), "model_tokens_per_s")
    body = []
    for cell in dict.fromkeys(row["cell"] for row in rows):
        base = _of(rows, cell, "static")
        for arm in dict.fromkeys(row["arm"] for row in rows):
            if here := _of(rows, cell, arm):
                body.append([cell, arm, *_numbers(here, base, bound)])
    return markdown.table(HEADINGS, body, left=2)


def _numbers(here: list[Row], base: list[Row], bound: float) -> list[str]:
    speed, ttft_ms = _median(here, "model_tokens_per_s"), _median(here, "ttft_ms")
    fetches = _median(here, "fetches") + _median(here, "early_fetches")
    return [
        f"{speed:.0f}",
        f"{speed / bound:.1%}",
        f"{speed / _median(base, 'model_tokens_per_s') - 1:+.1%}",
        f"{ttft_ms:.0f}",
        f"{ttft_ms / _median(base, 'ttft_ms') - 1:+.1%}",
        f"{_median(here, 'waiting_share'):.1%}",
        f"{_median(here, 'fetch_wait_share'):.2%}",
        f"{_median(here, 'batch_time_spread'):.1%}",
        f"{fetches / _median(here, 'steps'):.1f}",
        f"{_median(here, 'decide_share'):.2%}",
    ]


def _of(rows: list[Row], cell: str, arm: str) -> list[Row]:
    return [row for row in rows if (row["cell"], row["arm"]) == (cell, arm)]


def _median(rows: Iterable[Row], key: str) -> float:
    return statistics.median(row.get(key, 0) for row in rows)
