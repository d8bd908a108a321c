"""Layout of the counters that every routing kernel adds to, on the device, without a host sync.

One int64 tensor per layer: ``FIXED`` sums over batches, then S sums of activated experts and S
sums of tokens, one per rank. "Activated" counts physical experts with at least one (token,
choice) pair in a batch; "tokens" counts pairs.
"""

from __future__ import annotations

from enum import IntEnum


class Regime(IntEnum):
    """How a batch was routed; the value is also the index of its batch counter."""

    MEMORY_BOUND = 0
    """Few tokens per expert: one replica per active expert."""
    COMPUTE_BOUND = 1
    """Many tokens per expert: tokens split over the replicas."""


class Counter(IntEnum):
    """Index of each fixed entry."""

    MEMORY_BOUND_BATCHES = 0
    """Batches routed to one replica per active expert."""
    COMPUTE_BOUND_BATCHES = 1
    """Batches split over replicas."""
    EMPTY_BATCHES = 2
    """Batches without a valid pair; they add to nothing else."""
    MAX_ACTIVATED_SUM = 3
    """Sum over batches of lambda, the most activated experts on one rank."""
    MAX_TOKENS_SUM = 4
    """Sum over batches of the most tokens on one rank."""
    PAIRS = 5
    """Sum over batches of valid pairs."""
    ACTIVATED_SUM = 6
    """Sum over batches of activated experts on all ranks."""


FIXED = len(Counter)


def counters_size(num_ranks: int) -> int:
    """Length of the counters tensor of one layer (int64)."""
    return FIXED + 2 * num_ranks


def activated_slice(num_ranks: int) -> slice:
    """Where the activated experts of each rank are."""
    return slice(FIXED, FIXED + num_ranks)


def tokens_slice(num_ranks: int) -> slice:
    """Where the tokens of each rank are."""
    return slice(FIXED + num_ranks, FIXED + 2 * num_ranks)
