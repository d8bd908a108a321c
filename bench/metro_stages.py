"""Times the stages inside METRO's CPU kernel: many calls of one stage inside compiled code.

The paper's greedy is here too, compiled and timed like our stages, to compare the two choices.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numba
import numpy as np
import torch

from vllm_balance.kernels.metro import numba_cpu, reference
from vllm_balance.kernels.numba_memory import get, ints_at
from vllm_balance.kernels.record import counters_size
from vllm_balance.types import Placement

CALLS = 50
"""Calls per timing, so that the clock and the call from Python do not count."""
ROUNDS = 10
"""The things compared take turns, this often, so that other work on the machine hits all alike."""

_count, _choose = numba_cpu.count, numba_cpu.choose_columns
_map, _record = numba_cpu.map_one_replica, numba_cpu.record_one_replica


@numba.njit(nogil=True)
def _repeat_count(calls, ids, pairs, tokens_E):
    for _ in range(calls):
        _count(ints_at(ids, False), pairs, tokens_E)


@numba.njit(nogil=True)
def _repeat_choose(calls, tokens_E, table, stride, replicas, num_physical, column_E, per_rank):
    for _ in range(calls):
        _choose(
            tokens_E, ints_at(table, True), stride, ints_at(replicas, True), num_physical,
            column_E, per_rank,
        )  # fmt: skip


@numba.njit(nogil=True)
def _greedy_by_id(tokens_E, table_ER, stride, replicas_E, num_physical, column_E, activated_S):
    """Algorithm 1 of the paper, experts in id order, as ``reference.greedy_by_id``."""
    slots = num_physical // len(activated_S)
    activated_S[:] = 0
    for expert in range(len(tokens_E)):
        column_E[expert] = -1
        if tokens_E[expert] == 0:
            continue
        best = get(table_ER, expert * stride) // slots
        column_E[expert] = 0
        for column in range(1, get(replicas_E, expert)):
            rank = get(table_ER, expert * stride + column) // slots
            if activated_S[rank] < activated_S[best]:
                best = rank
                column_E[expert] = column
        activated_S[best] += 1


@numba.njit(nogil=True)
def _repeat_greedy(calls, tokens_E, table, stride, replicas, num_physical, column_E, activated_S):
    for _ in range(calls):
        _greedy_by_id(
            tokens_E, ints_at(table, True), stride, ints_at(replicas, True), num_physical,
            column_E, activated_S,
        )  # fmt: skip


@numba.njit(nogil=True)
def _repeat_map(calls, ids, pairs, table, stride, column_E, slot_E, out):
    for _ in range(calls):
        _map(
            ints_at(ids, False), pairs, ints_at(table, True), stride, column_E, slot_E,
            ints_at(out, False),
        )  # fmt: skip


@numba.njit(nogil=True)
def _repeat_record(calls, tokens_E, column_E, slot_E, per_rank, num_physical, load, record, sums):
    for _ in range(calls):
        _record(tokens_E, column_E, slot_E, per_rank, num_physical, load, record, sums)


def medians_us(
    runs: dict[str, Callable[[], object]],
    repetitions: int,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, float]:
    """Median microseconds of one call of each run, over all its calls in all rounds."""
    times: dict[str, list[int]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            run()
            for _ in range(-(-repetitions // ROUNDS)):
                start = clock()
                run()
                times[name].append(clock() - start)
    return {name: round(float(np.median(taken)) / 1000, 2) for name, taken in times.items()}


def stage_times_us(ids_TK: np.ndarray, placement: Placement, repetitions: int) -> dict[str, float]:
    """Median microseconds of count, choose, greedy, map and record, with maps as wide as vLLM's.

    Raises:
        RuntimeError: the compiled greedy differs from its reference.
    """
    ids = np.ascontiguousarray(ids_TK.astype(np.int32)).ravel()
    table_ER = torch.nn.functional.pad(
        placement.logical_to_physical_ER.long(),
        (0, 1024 - placement.logical_to_physical_ER.shape[1]),
        value=-1,
    ).contiguous()
    replicas_E = placement.num_replicas_E.long()
    num_experts, num_physical = placement.num_logical, placement.num_physical
    tokens_E, column_E, greedy_E, slot_E = (np.empty(num_experts, np.int32) for _ in range(4))
    per_rank = np.empty((2, placement.num_ranks), np.int32)
    activated_S = np.empty(placement.num_ranks, np.int32)
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
        "greedy": lambda: _repeat_greedy(
            CALLS, tokens_E, table, stride, replicas, num_physical, greedy_E, activated_S
        ),
        "map": lambda: _repeat_map(
            CALLS, address["ids"], len(ids), table, stride, column_E, slot_E, address["out"]
        ),
        "record": lambda: _repeat_record(
            CALLS, tokens_E, column_E, slot_E, per_rank, num_physical, address["load"], 0,
            address["sums"],
        ),
    }  # fmt: skip
    taken = medians_us(stages, max(repetitions // CALLS, 20))
    expected_E = reference.greedy_by_id(
        tokens_E,
        placement.logical_to_physical_ER.numpy(),
        placement.num_replicas_E.numpy(),
        placement.num_ranks,
        num_physical,
    )
    if not np.array_equal(greedy_E, expected_E):
        raise RuntimeError("the compiled greedy differs from reference.greedy_by_id")
    return {name: round(value / CALLS, 2) for name, value in taken.items()}
