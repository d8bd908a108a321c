"""The table of a run with several skews: every arm under each, beside static, the bound and the
best baseline."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from vllm_balance.measured_tables import (
    MeasuredTable,
    has_few_tokens,
    in_turn,
    median,
    ratio,
    table_of,
    total_tokens_per_s,
)
from vllm_balance.measurement import Measurement

BOUND = ("even", "static")
"""Load and arm that bound all others: the same server and prompts under even routing."""
BASELINES = ("eplb", "shadow", "even_split", "exflow")
"""Arms that have as much memory, or need none, and are not ours."""
MOVED = "batches that moved tokens"
"""Left out where no row says: all are older than the counts, or nothing fetches."""
BEST = "against the best baseline: tokens/s, TTFT"
"""Left out where no baseline was measured."""
HEADINGS = (
    "skew",
    "arm",
    "tokens/s",
    "of the bound",
    "against static",
    "TTFT ms",
    "against static",
    "waiting, share of rank time",
    "of it for fetches",
    "batch time, sd / mean",
    MOVED,
    "fetches per batch",
    "deciding, share of MoE",
    BEST,
)


def has_bound(rows: list[Measurement]) -> bool:
    """Whether a run has several skews of prompts and the load that bounds them. None bounds
    decode: even routing activates the most experts."""
    several = len({row.load for row in rows}) > 1
    return several and bool(_of(rows, *BOUND)) and all(map(has_few_tokens, rows))


def table(rows: list[Measurement]) -> MeasuredTable:
    """One line per load and arm, medians; "-" where what to compare with is not measured yet."""
    bound = _of(rows, *BOUND)
    arms = dict.fromkeys(row.arm for row in rows)
    body = []
    for load in dict.fromkeys(row.load for row in rows):
        base = _of(rows, load, "static")
        others = [found for arm in BASELINES if (found := _of(rows, load, arm))]
        for arm in arms:
            if here := _of(rows, load, arm):
                best = "-" if arm in ("static", *BASELINES) else _against_best(here, others)
                body.append([load, arm, *_numbers(here, base, bound), best])
    has = {
        MOVED: any(row.moved_share is not None for row in rows),
        BEST: any(line[-1] != "-" for line in body),
    }
    shown = [column for column, name in enumerate(HEADINGS) if has.get(name, True)]
    return table_of(
        rows,
        caption=f"Medians; the bound is `static` under even routing.{in_turn(rows)}",
        headings=[HEADINGS[column] for column in shown],
        body=[[line[column] for column in shown] for line in body],
    )


def _numbers(
    here: list[Measurement], base: list[Measurement], bound: list[Measurement]
) -> list[str]:
    speed = median(here, total_tokens_per_s)
    return [
        f"{speed:.0f}",
        f"{speed / median(bound, total_tokens_per_s):.1%}" if bound else "-",
        ratio(here, base, total_tokens_per_s),
        f"{median(here, _ttft_ms):.0f}",
        ratio(here, base, _ttft_ms),
        f"{median(here, lambda row: row.waiting_share or 0.0):.1%}",
        f"{median(here, lambda row: row.fetch_wait_share or 0.0):.2%}",
        f"{median(here, lambda row: row.batch_time_spread or 0.0):.1%}",
        _moved(here),
        f"{median(here, _fetches):.1f}",
        f"{median(here, lambda row: row.decide_share):.2%}",
    ]


def _against_best(here: list[Measurement], baselines: list[list[Measurement]]) -> str:
    """Ratios to the baseline with the most tokens per second, and to that with the least TTFT."""
    if not baselines:
        return "-"
    fastest = max(baselines, key=lambda rows: median(rows, total_tokens_per_s))
    first = min(baselines, key=lambda rows: median(rows, _ttft_ms))
    return (
        f"{ratio(here, fastest, total_tokens_per_s)} `{fastest[0].arm}`, "
        f"{ratio(here, first, _ttft_ms)} `{first[0].arm}`"
    )


def _of(rows: Iterable[Measurement], load: str, arm: str) -> list[Measurement]:
    return [row for row in rows if (row.load, row.arm) == (load, arm)]


def _fetches(row: Measurement) -> float:
    fetched = row.fetching or {}
    return (fetched.get("fetches", 0) + fetched.get("early_fetches", 0)) / row.steps


def _moved(here: list[Measurement]) -> str:
    """Of batches and layers together; rows of an age agree on whether they say."""
    shares = [row.moved_share for row in here if row.moved_share is not None]
    return f"{statistics.median(shares):.0%}" if shares else "-"


def _ttft_ms(row: Measurement) -> float:
    return row.ttft_ms.p50
