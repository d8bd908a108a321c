"""The most requests in flight that keep an SLO, in as few simulations as that takes."""

from __future__ import annotations

import math
from collections.abc import Callable

from vllm_balance.simulate.outcome import Outcome

CLOSE = 100
"""The largest concurrency that keeps an SLO is known to one part in so many."""


def most_within(
    slo_us: float, most: int, at: Callable[[int], Outcome], near: int = 0
) -> tuple[int, Outcome | None]:
    """The largest concurrency whose TPOT keeps an SLO, and its outcome; (0, None): not even 1 does.

    It is `most`, or another that is larger by at most one or 1 % misses the SLO.

    Args:
        slo_us: largest TPOT, microseconds.
        most: largest concurrency that there is room for.
        at: simulates a concurrency.
        near: tried after `most`, e.g. what another candidate reaches; 0: nothing is known.
    """
    low, high = 0, most + 1
    best: Outcome | None = None
    tried: list[tuple[int, float]] = []
    while high - low > max(1, low // CLOSE):
        concurrency = _next(tried, low, high, slo_us, near) if tried else most
        made = at(concurrency)
        tried.append((concurrency, made.tpot_us))
        if misses(made, slo_us):
            high = concurrency
        else:
            low, best = concurrency, made
    return low, best


def misses(made: Outcome, slo_us: float) -> bool:
    """Whether TPOT is longer, or there is none."""
    return not made.tpot_us <= slo_us


def _next(tried: list[tuple[int, float]], low: int, high: int, slo_us: float, near: int) -> int:
    """The concurrency to try after those with these TPOTs: between `low`, which keeps the SLO, and
    `high`, which misses it.

    TPOT bends little, so it is where a line through the last two meets the SLO, but as far inside
    as the answer need be known: that ends the search once the line is right. Where TPOT does bend,
    every third try takes the geometric mean.
    """
    guess = math.sqrt(max(low, 1) * high)
    if len(tried) == 1 and near:
        guess = near
    elif len(tried) % 3 != 1:
        (first, first_us), (second, second_us) = tried[-2:]
        if abs(first_us - second_us) > 0:
            guess = second + (slo_us - second_us) * (second - first) / (second_us - first_us)
    step = max(1, (low or high) // CLOSE)
    return max(low + step, min(round(guess), high - step))
