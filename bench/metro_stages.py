"""Times the stages inside METRO's CPU kernel: many calls of one stage inside compiled code."""

from __future__ import annotations

import time
from collections.abc import Callable

import numba
import numpy as np
import torch

from vllm_balance.kernels.metro import numba_cpu
from vllm_balance.kernels.numba_memory import ints_at
from vllm_balance.kernels.record import counters_size
from vllm_balance.types import Placement

CALLS = 50
"""Calls per timing, so that the clock and the call from Python do not count."""

_count, _choose = numba_cpu.count, numba_cpu.choose_columns
_map, _record = numba_cpu.map_one_replica, numba_cpu.record_one_replica


@numba.njit(nogil=True)
def _repeat_count(calls, ids, pairs, tokens_E):
    for _ in range(calls):
        _count(ints_at(ids, pairs, False), pairs, tokens_E)


@numba.njit(nogil=True)
def _repeat_choose(calls, tokens_E, table, stride, replicas, num_physical, column_E, per_rank):
    num_experts = len(tokens_E)
    for _ in range(calls):
        _choose(
            tokens_E, ints_at(table, num_experts * stride, True), stride,
            ints_at(replicas, num_experts, True), num_physical, column_E, per_rank,
        )  # fmt: skip


@numba.njit(nogil=True)
def _repeat_map(calls, ids, pairs, table, stride, column_E, slot_E, out):
    for _ in range(calls):
        _map(
            ints_at(ids, pairs, False), pairs, ints_at(table, len(column_E) * stride, True),
            stride, column_E, slot_E, ints_at(out, pairs, False),
        )  # fmt: skip


@numba.njit(nogil=True)
def _repeat_record(calls, tokens_E, column_E, slot_E, per_rank, num_physical, load, record, sums):
    for _ in range(calls):
        _record(tokens_E, column_E, slot_E, per_rank, num_physical, load, record, sums)


def _median_us(run: Callable[[], object], repetitions: int) -> float:
    run()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter_ns()
        run()
        times.append(time.perf_counter_ns() - start)
    return round(float(np.median(times)) / 1000 / CALLS, 2)


def stage_times_us(ids_TK: np.ndarray, placement: Placement, repetitions: int) -> dict[str, float]:
    """Median microseconds of count, choose, map and record, with maps as wide as vLLM's."""
    ids = np.ascontiguousarray(ids_TK.astype(np.int32)).ravel()
    table_ER = torch.nn.functional.pad(
        placement.logical_to_physical_ER.long(),
        (0, 1024 - placement.logical_to_physical_ER.shape[1]),
        value=-1,
    ).contiguous()
    replicas_E = placement.num_replicas_E.long()
    num_experts, num_physical = placement.num_logical, placement.num_physical
    tokens_E, column_E, slot_E = (np.empty(num_experts, np.int32) for _ in range(3))
    per_rank = np.empty((2, placement.num_ranks), np.int32)
    out, load_P = np.empty_like(ids), np.zeros(num_physical, np.int32)
    counters = np.zeros(counters_size(placement.num_ranks), np.int64)
    address = {name: array.ctypes.data for name, array in
               (("ids", ids), ("out", out), ("load", load_P), ("sums", counters))}  # fmt: skip
    table, replicas, stride = table_ER.data_ptr(), replicas_E.data_ptr(), table_ER.stride(0)
    stages = {
        "count": lambda: _repeat_count(CALLS, address["ids"], len(ids), tokens_E),
        "choose": lambda: _repeat_choose(
            CALLS, tokens_E, table, stride, replicas, num_physical, column_E, per_rank
        ),
        "map": lambda: _repeat_map(
            CALLS, address["ids"], len(ids), table, stride, column_E, slot_E, address["out"]
        ),
        "record": lambda: _repeat_record(
            CALLS, tokens_E, column_E, slot_E, per_rank, num_physical, address["load"], 0,
            address["sums"],
        ),
    }  # fmt: skip
    return {name: _median_us(run, max(repetitions // CALLS, 20)) for name, run in stages.items()}
