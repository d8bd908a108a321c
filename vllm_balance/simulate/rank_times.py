"""Sums over slots, compiled. Import this inside a call: it imports numba."""

# Compiled functions carry no annotations, as those in kernels/.
# mypy: ignore-errors

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vllm_balance.kernels.numba_cache import kept

Array = np.ndarray[Any, np.dtype[Any]]
compiled = partial(kept, folder=Path(__file__).parent, nogil=True, error_model="numpy")


@compiled
def _at(table_N, n):
    """The table's entry; behind its end the mean slope of its second half, free of tiles."""
    last = len(table_N) - 1
    if n <= last:
        return table_N[n]
    half = last // 2
    return table_N[last] + (n - last) * (table_N[last] - table_N[half]) / (last - half)


@compiled
def _sum(tokens_LP, num_ranks, fixed_S2, stream_SN, compute_SN, contention_N, beside_LS, alone_LS,
         activated_LS, pairs_LS):  # fmt: skip
    num_layers, num_slots = tokens_LP.shape
    slots, last = num_slots // num_ranks, len(contention_N) - 1
    for layer in range(num_layers):
        for s in range(num_ranks):
            row = s % len(stream_SN)
            stream, compute = fixed_S2[row, 0], fixed_S2[row, 1]
            stream_alone, compute_alone = stream, compute
            activated, pairs = 0, 0
            for p in range(s * slots, (s + 1) * slots):
                n = tokens_LP[layer, p]
                if n > 0:
                    activated += 1
                    pairs += n
                    streaming, computing = _at(stream_SN[row], n), _at(compute_SN[row], n)
                    contention = contention_N[min(n, last)]
                    stream += streaming
                    compute += computing
                    stream_alone += streaming / contention
                    compute_alone += computing / contention
            activated_LS[layer, s] = activated
            pairs_LS[layer, s] = pairs
            beside_LS[layer, s] = max(stream, compute) if pairs else 0.0
            alone_LS[layer, s] = max(stream_alone, compute_alone) if pairs else 0.0


def rank_times(
    tokens_LP: Array,
    num_ranks: int,
    fixed_S2: Array,
    stream_SN: Array,
    compute_SN: Array,
    contention_N: Array | None,
) -> tuple[Array, Array, Array, Array]:
    """Time of each rank while all are busy and alone, activated experts and pairs, four [L, S];
    arguments as the fields of `ExpertTimes`."""
    shape = (len(tokens_LP), num_ranks)
    beside_LS, alone_LS = np.empty(shape), np.empty(shape)
    activated_LS, pairs_LS = np.empty(shape, np.int64), np.empty(shape, np.int64)
    if contention_N is None:
        contention_N = np.ones(1)
    _sum(
        np.ascontiguousarray(tokens_LP, np.int32), num_ranks, fixed_S2, stream_SN, compute_SN,
        contention_N, beside_LS, alone_LS, activated_LS, pairs_LS,
    )  # fmt: skip
    return beside_LS, alone_LS, activated_LS, pairs_LS
