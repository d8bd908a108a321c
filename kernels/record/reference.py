"""What record adds to, in plain numpy: the definition the kernels are tested against."""

from __future__ import annotations

import numpy as np

from .layout import Counter, activated_slice, tokens_slice


def add_batch(counters: np.ndarray, tokens_P: np.ndarray, num_ranks: int, regime: int) -> None:
    """Adds a batch with ``tokens_P`` pairs per slot, int [P], to the counters (layout.py)."""
    if tokens_P.sum() == 0:
        counters[Counter.EMPTY_BATCHES] += 1
        return
    tokens_SX = tokens_P.reshape(num_ranks, -1)
    tokens_S, activated_S = tokens_SX.sum(1), (tokens_SX > 0).sum(1)
    counters[int(regime)] += 1
    counters[Counter.MAX_ACTIVATED_SUM] += activated_S.max()
    counters[Counter.MAX_TOKENS_SUM] += tokens_S.max()
    counters[Counter.PAIRS] += tokens_S.sum()
    counters[Counter.ACTIVATED_SUM] += activated_S.sum()
    counters[activated_slice(num_ranks)] += activated_S
    counters[tokens_slice(num_ranks)] += tokens_S


def record(
    physical_ids_TK: np.ndarray,
    *,
    num_physical: int,
    num_ranks: int,
    load_P: np.ndarray | None,
    record_enabled: bool,
    num_valid_tokens: int | None,
    counters: np.ndarray,
    regime: int,
) -> None:
    """Adds the batch to ``load_P`` (if recording) and ``counters``, both changed in place."""
    ids = physical_ids_TK[: None if num_valid_tokens is None else max(num_valid_tokens, 0)].ravel()
    ids = ids[(ids >= 0) & (ids < num_physical)]
    tokens_P = np.bincount(ids, minlength=num_physical)
    if load_P is not None and record_enabled:
        load_P[:num_physical] += tokens_P.astype(load_P.dtype)
    add_batch(counters, tokens_P, num_ranks, regime)
