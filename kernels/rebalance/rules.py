"""The numbers that a schedule decides by, all in tokens."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Method(IntEnum):
    """Which schedule."""

    HARMOENY = 0
    """Few large moves towards the mean, replicas that are there first (balance_cpu.py)."""
    HARMOENY_PAPER = 1
    """Algorithm 2 of arXiv 2506.12417 (paper_cpu.py)."""
    SHADOW = 2
    """Hot experts on all ranks if the modelled time falls, as FasterMoE (spread_cpu.py)."""
    EVEN_SPLIT = 3
    """The hottest experts on all ranks, as many as fit (spread_cpu.py)."""


class Eviction(IntEnum):
    """Which slot a fetched expert overwrites, among those not needed in this batch.

    Empty slots come first under both rules, and the lowest slot among equals.
    """

    LRU = 0
    """The one whose expert had no tokens there for most batches."""
    FIRST = 1
    """The first one, as in the paper: whichever expert has finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """When a fetch pays. The unit of time is the computation of one (token, choice) pair."""

    threshold_tokens: int
    """q: fewest tokens that an expert is fetched for; computing them takes as long as the fetch."""
    fetch_tokens: int
    """Time that a fetch adds to the receiving rank; 0 if it is hidden behind computation."""
    knee_tokens: float = 0.0
    """Tokens of an expert that take as long to compute as its weights to stream. A batch is
    memory-bound, and nothing is fetched for it, if its active experts have at most this many on
    average and none has ``knee_tokens + threshold_tokens``: one more copy of an expert pays only
    if there are tokens for streaming it once more and for fetching it. By the mean alone a prefill
    with its tokens on few of many experts would pass for decode. A decode batch stays below while
    it has fewer tokens than that, as each is on an expert at most once. On GPUs q is thousands of
    tokens, so that the rank of an expert with more is compute-bound by itself; on CPUs experts run
    one after the other, and nothing hides the one with most."""
    tolerance: float = 0.02
    """Excess of the busiest rank over the mean that is left alone, as a share of the mean."""
    eviction: Eviction = Eviction.LRU

    def __post_init__(self) -> None:
        if not (
            self.threshold_tokens >= 1
            and self.fetch_tokens >= 0
            and self.knee_tokens >= 0
            and 0 <= self.tolerance < 1
        ):
            raise ValueError(
                f"A schedule needs a threshold of at least 1 token, no negative cost and a "
                f"tolerance from 0 to 1; got {self}."
            )
