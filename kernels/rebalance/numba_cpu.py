"""Schedules with dynamic slots on the CPU: regime, moves, slots and tables in one call."""

from __future__ import annotations

import numpy as np
import torch

from ...types import Outcome
from ..metro.numba_cpu import choose_columns, is_compute_bound
from ..metro.numba_cpu import count as count_pairs
from ..numba_memory import entry, get, int32_at, ints_at, jit, num_valid_pairs
from .balance_cpu import balance
from .paper_cpu import keep_what_fits, rebalance
from .rules import Method, Rules
from .slots_cpu import age, fill_split, fill_tables, link_holders, place_moves
from .spread_cpu import spread

_HARMOENY, _PAPER, _EVEN = int(Method.HARMOENY), int(Method.HARMOENY_PAPER), int(Method.EVEN_SPLIT)
_EMPTY, _MEMORY_BOUND = int(Outcome.EMPTY), int(Outcome.MEMORY_BOUND)
_BALANCED, _UNPAID = int(Outcome.BALANCED), int(Outcome.UNPAID)
_HELD, _FETCHED = int(Outcome.HELD), int(Outcome.FETCHED)


@jit
def _moves(method, tokens_FE, tokens_E, num_dynamic, q, cost, tolerance, head_E, next_X, move_3M,
           num_ranks):  # fmt: skip
    """Moves of the method into ``move_3M``: (how many, whether there was nothing to do)."""
    if method == _HARMOENY:
        return balance(
            tokens_E, num_ranks, num_dynamic, q, cost, tolerance, head_E, next_X, move_3M
        )
    if method == _PAPER:
        moved_FES = np.empty((tokens_FE.shape[0], len(tokens_E), num_ranks), np.int32)
        rebalance(tokens_FE, num_ranks, q, moved_FES)
        return keep_what_fits(moved_FES, num_dynamic, move_3M), False
    always = method == _EVEN
    return spread(tokens_E, num_ranks, num_dynamic, q, always, head_E, next_X, move_3M), False


@jit
def _is_memory_bound(tokens_E, knee, q):
    """Whether neither the mean nor any one expert has tokens that a copy would pay for."""
    return not is_compute_bound(tokens_E, knee) and np.float64(tokens_E.max()) < knee + q


@jit
def _serve_few(tokens_E, content_SD, idle_SD, table, replicas, served_SD):
    """The memory-bound regime: METRO's choice among the replicas that are there (addresses)."""
    num_experts, num_ranks = len(tokens_E), len(content_SD)
    table_ER, replicas_E = ints_at(table, False), ints_at(replicas, False)
    column_E, per_rank = np.empty(num_experts, np.int32), np.empty((2, num_ranks), np.int32)
    num_physical = num_experts + content_SD.size
    choose_columns(
        tokens_E, table_ER, num_ranks, replicas_E, num_physical, column_E, per_rank
    )  # fmt: skip
    served_SD[:] = 0
    slots, num_home = num_physical // num_ranks, num_experts // num_ranks
    for expert in range(num_experts):
        if column_E[expert] > 0:
            slot = get(table_ER, expert * num_ranks + column_E[expert])
            served_SD[slot // slots, slot % slots - num_home] = tokens_E[expert]
    age(served_SD > 0, idle_SD)


@entry
def _schedule(tokens, F, E, S, D, method, q, cost, knee, tolerance, eviction, before, before_idle,
              content, idle, fetch, split, table, replicas):  # fmt: skip
    """Everything by address; returns an Outcome, or -1 - s * D - d for a slot's wrong content."""
    tokens_FE = int32_at(tokens, F * E).reshape(F, E)
    content_SD, idle_SD = (
        int32_at(content, S * D).reshape(S, D),
        int32_at(idle, S * D).reshape(S, D),
    )
    fetch_SD = int32_at(fetch, S * D).reshape(S, D)
    table_ER, split_ER = int32_at(table, E * S).reshape(E, S), int32_at(split, E * S).reshape(E, S)
    replicas_E = int32_at(replicas, E)
    content_SD[:] = int32_at(before, S * D).reshape(S, D)
    idle_SD[:] = int32_at(before_idle, S * D).reshape(S, D)
    head_E, next_X = np.empty(E, np.int64), np.empty(S * D, np.int64)
    status = link_holders(content_SD, E, head_E, next_X)
    if status < 0:
        return status
    tokens_E = tokens_FE.sum(0).astype(np.int32) if F > 1 else tokens_FE[0]
    total = tokens_E.sum()
    served_SD = np.empty((S, D), np.int32)
    if total > 0 and _is_memory_bound(tokens_E, knee, q):
        fetch_SD[:] = -1
        fill_tables(content_SD, table_ER, replicas_E)
        _serve_few(tokens_E, content_SD, idle_SD, table, replicas, served_SD)
        fill_split(tokens_E, content_SD, served_SD, split_ER)
        return np.int64(_MEMORY_BOUND)
    move_3M = np.empty((3, S * D), np.int64)
    moves, is_even = 0, True
    if total > 0:
        moves, is_even = _moves(
            method, tokens_FE, tokens_E, D, q, cost, tolerance, head_E, next_X, move_3M, S
        )
    fetches = place_moves(
        moves, move_3M, eviction, head_E, next_X, content_SD, idle_SD, fetch_SD, served_SD
    )
    fill_tables(content_SD, table_ER, replicas_E)
    fill_split(tokens_E, content_SD, served_SD, split_ER)
    if total == 0:
        return np.int64(_EMPTY)
    if moves == 0:
        return np.int64(_BALANCED if is_even else _UNPAID)
    return np.int64(_FETCHED if fetches else _HELD)


@entry
def _count(ids, wide, pairs, top_k, valid, E, out):
    count_pairs(ints_at(ids, wide), num_valid_pairs(valid, pairs, top_k), int32_at(out, E))


def count(
    topk_ids_TK: torch.Tensor, num_valid_tokens: torch.Tensor | None, out: torch.Tensor
) -> None:
    """As ``kernels.rebalance.count`` into ``out``, arguments already checked."""
    _count(
        topk_ids_TK.data_ptr(),
        topk_ids_TK.dtype is torch.int64,
        topk_ids_TK.numel(),
        topk_ids_TK.shape[1],
        0 if num_valid_tokens is None else num_valid_tokens.data_ptr(),
        out.numel(),
        out.data_ptr(),
    )


def schedule(
    tokens_FE: torch.Tensor,
    before: tuple[torch.Tensor, torch.Tensor],
    method: Method,
    rules: Rules,
    out: tuple[torch.Tensor, ...],
) -> int:
    """As ``kernels.rebalance.schedule``, arguments already checked; returns the outcome's value,
    or -1 - s * D - d if that slot holds what it must not.

    Args:
        before: content_SD and idle_SD.
        out: content_SD, idle_SD, fetch_SD, split_ER, logical_to_physical_ER and num_replicas_E,
            int32.
    """
    num_ranks, num_dynamic = before[0].shape
    return _schedule(
        tokens_FE.data_ptr(),
        tokens_FE.shape[0],
        tokens_FE.shape[1],
        num_ranks,
        num_dynamic,
        int(method),
        rules.threshold_tokens,
        rules.fetch_tokens,
        float(rules.knee_tokens),
        float(rules.tolerance),
        int(rules.eviction),
        *(tensor.data_ptr() for tensor in (*before, *out)),
    )
