"""The table of a run with an SLO: throughput within it, and at a TPOT of once and twice it."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable

from vllm_balance.measured_tables import (
    BASES,
    MeasuredTable,
    grouped,
    measurements,
    median,
    table_of,
    tokens_per_s,
)
from vllm_balance.measurement import Measurement

GOODPUT = "requests/s within the SLO, by vLLM's client"
"""Heading of what `vllm bench serve --goodput tpot:SLO` counts."""


def table(rows: list[Measurement]) -> MeasuredTable:
    """One line per case and arm: throughput within the SLO, and at a TPOT of once and twice it."""
    groups = {key: own for key, own in grouped(rows).items() if own[0].slo_tpot_ms is not None}
    loads: dict[tuple[str, str], list[list[Measurement]]] = {}
    for (case, _, arm), own in groups.items():
        loads.setdefault((case, arm), []).append(own)
    bases = [base for base in BASES if any(arm == base for _, arm in loads)]
    has_cases = any(case for case, _ in loads)
    slo_ms = next(iter(groups.values()))[0].slo_tpot_ms or 0.0
    headings = ["case", "arm"] if has_cases else ["arm"]
    headings += ["tokens/s within the SLO", "requests at once", "TPOT ms there", "kept it", GOODPUT]
    for tpot_ms in (slo_ms, 2 * slo_ms):
        headings += [f"tokens/s at {tpot_ms:g} ms", *(f"against {base}" for base in bases)]
    body = []
    for (case, arm), measured in loads.items():
        cells = [case, arm] if has_cases else [arm]
        cells += _within_slo(slo_ms, measured)
        for tpot_ms in (slo_ms, 2 * slo_ms):
            ours = throughput_at(tpot_ms, measured)
            cells.append("-" if ours is None else f"{ours:.1f}")
            for base in bases:
                theirs = throughput_at(tpot_ms, loads.get((case, base), []))
                cells.append(f"{ours / theirs - 1:+.1%}" if ours and theirs else "-")
        body.append(cells)
    return table_of(
        rows,
        caption=f"Of the concurrencies whose TPOT was within {slo_ms:g} ms, the one with the most "
        f"tokens per second, how many of its measurements were within it, and the requests per "
        f"second that were, one by one, as vLLM's client counts them. Beside it tokens per second "
        f"at a TPOT of exactly that and of twice that, on the line between the two concurrencies "
        f"around it. Medians of {measurements(groups.values())} per concurrency.",
        headings=headings,
        body=body,
    )


def _within_slo(slo_ms: float, loads: list[list[Measurement]]) -> list[str]:
    """Most tokens per second within the SLO, requests at once, TPOT there, how many of the
    measurements there kept the SLO, and GOODPUT there; "-" if the median TPOT of no concurrency
    keeps it, or if the client did not count.

    Args:
        loads: rows of each concurrency of one arm.
    """
    within = [own for own in loads if median(own, _tpot_ms) <= slo_ms]
    if not within:
        return ["-"] * 5
    best = max(within, key=lambda own: median(own, tokens_per_s))
    kept = sum(_tpot_ms(row) <= slo_ms for row in best)
    counted = [row.goodput_per_s for row in best if row.goodput_per_s is not None]
    return [
        f"{median(best, tokens_per_s):.1f}",
        str(best[0].concurrency),
        f"{median(best, _tpot_ms):.1f}",
        f"{kept} of {len(best)}",
        f"{statistics.median(counted):.2f}" if counted else "-",
    ]


def throughput_at(tpot_ms: float, loads: list[list[Measurement]]) -> float | None:
    """Tokens per second at a median TPOT, between two measured concurrencies.

    Args:
        loads: rows of each concurrency of one arm.
    Returns:
        None if every TPOT is above, or every one below, so that it was not reached.
    """
    points = ((median(own, _tpot_ms), median(own, tokens_per_s)) for own in loads)
    return rate_at(tpot_ms, points)


def rate_at(tpot_ms: float, points: Iterable[tuple[float, float]]) -> float | None:
    """Tokens per second at a TPOT, on the line between the two (TPOT in ms, rate) around it."""
    for (first_ms, first), (second_ms, second) in itertools.pairwise(sorted(points)):
        if first_ms <= tpot_ms < second_ms:
            return first + (tpot_ms - first_ms) / (second_ms - first_ms) * (second - first)
    return None


def _tpot_ms(row: Measurement) -> float:
    return row.tpot_ms.p50
