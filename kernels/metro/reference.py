"""METRO in plain numpy and SciPy: the optimum, the paper's greedy and what routing must produce.

``optimal_activated`` is the definition of the optimum that all kernels are tested against; it is
itself tested against brute force.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from ..assign import reference as assign_reference


def replica_ranks(
    table_ER: np.ndarray, num_replicas_E: np.ndarray, slots_per_rank: int
) -> list[np.ndarray]:
    """Rank of each replica of each expert: E arrays of int64 [r]."""
    return [
        table_ER[expert, : num_replicas_E[expert]].astype(np.int64) // slots_per_rank
        for expert in range(len(num_replicas_E))
    ]


def _served(ranks: list[np.ndarray], num_ranks: int, capacity: int) -> int:
    """Most experts that ranks can serve if each takes at most ``capacity`` (a maximum flow)."""
    num_experts = len(ranks)
    source, sink = num_experts + num_ranks, num_experts + num_ranks + 1
    tails = [source] * num_experts
    heads = list(range(num_experts))
    for expert, options in enumerate(ranks):
        for rank in sorted(set(options.tolist())):
            tails.append(expert)
            heads.append(num_experts + rank)
    limits = [1] * len(tails) + [capacity] * num_ranks
    tails += list(range(num_experts, num_experts + num_ranks))
    heads += [sink] * num_ranks
    graph = csr_array((np.array(limits, np.int32), (tails, heads)), shape=(sink + 1, sink + 1))
    return int(maximum_flow(graph, source, sink).flow_value)


def optimal_activated(
    tokens_E: np.ndarray,
    table_ER: np.ndarray,
    num_replicas_E: np.ndarray,
    num_ranks: int,
    num_physical: int,
) -> int:
    """Least possible lambda (most activated experts on one rank) with one replica per expert.

    Binary search over lambda with a maximum flow, as in section 4 of the paper.
    """
    all_ranks = replica_ranks(table_ER, num_replicas_E, num_physical // num_ranks)
    ranks = [all_ranks[expert] for expert in np.flatnonzero(tokens_E > 0)]
    if not ranks:
        return 0
    low, high = -(-len(ranks) // num_ranks), len(ranks)
    while low < high:
        middle = (low + high) // 2
        if _served(ranks, num_ranks, middle) == len(ranks):
            high = middle
        else:
            low = middle + 1
    return low


def greedy_by_id(
    tokens_E: np.ndarray,
    table_ER: np.ndarray,
    num_replicas_E: np.ndarray,
    num_ranks: int,
    num_physical: int,
) -> np.ndarray:
    """Algorithm 1 of the paper, experts in id order: column per expert, int32 [E], -1 inactive."""
    ranks = replica_ranks(table_ER, num_replicas_E, num_physical // num_ranks)
    activated_S = np.zeros(num_ranks, np.int64)
    column_E = np.full(len(tokens_E), -1, np.int32)
    for expert in np.flatnonzero(tokens_E > 0):
        column = int(np.argmin(activated_S[ranks[expert]]))
        column_E[expert] = column
        activated_S[ranks[expert][column]] += 1
    return column_E


def loads(
    column_E: np.ndarray,
    tokens_E: np.ndarray,
    table_ER: np.ndarray,
    num_ranks: int,
    num_physical: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Activated experts and tokens of each rank under a choice, two int64 [S]."""
    active = np.flatnonzero(column_E >= 0)
    rank = table_ER[active, column_E[active]] // (num_physical // num_ranks)
    activated_S = np.bincount(rank, minlength=num_ranks)
    tokens_S = np.bincount(rank, weights=tokens_E[active], minlength=num_ranks)
    return activated_S, tokens_S.astype(np.int64)


def valid_rows(topk_ids_TK: np.ndarray, num_valid_tokens: int | None) -> np.ndarray:
    """The rows in front of the padding."""
    return topk_ids_TK[: None if num_valid_tokens is None else max(num_valid_tokens, 0)]


def count(topk_ids_TK: np.ndarray, num_experts: int, num_valid_tokens: int | None) -> np.ndarray:
    """Valid pairs of each expert, int64 [E]."""
    ids = valid_rows(topk_ids_TK, num_valid_tokens).ravel()
    return np.bincount(ids[(ids >= 0) & (ids < num_experts)], minlength=num_experts)


def is_compute_bound(tokens_E: np.ndarray, knee_tokens: float) -> bool:
    """Whether the mean tokens per active expert exceed the knee, in float32 as in the kernels."""
    total, active = tokens_E.sum(), (tokens_E > 0).sum()
    return bool(total > 0 and np.float32(total) > np.float32(knee_tokens) * np.float32(active))


def split(
    column_E: np.ndarray | None, tokens_E: np.ndarray, num_replicas_E: np.ndarray, R: int
) -> np.ndarray:
    """Tokens of each replica under a choice, or evenly if ``column_E`` is None, [E, R]."""
    if column_E is None:
        return assign_reference.even_split(tokens_E, num_replicas_E, R)
    return np.where(np.arange(R)[None] == column_E[:, None], tokens_E[:, None], 0)


def time_in_turn(
    split_ER: np.ndarray, table_ER: np.ndarray, num_ranks: int, num_physical: int, knee: float,
    free: float,
) -> float:  # fmt: skip
    """Time of the slowest rank if ranks compute their experts in turn, in tokens."""
    served = split_ER > 0
    time_ER = np.where(served, knee + np.maximum(split_ER - free, 0), 0.0)
    rank = table_ER[served].astype(np.int64) // (num_physical // num_ranks)
    return float(np.bincount(rank, weights=time_ER[served], minlength=num_ranks).max(initial=0))


def is_even_sooner(
    tokens_E: np.ndarray,
    column_E: np.ndarray,
    table_ER: np.ndarray,
    num_replicas_E: np.ndarray,
    num_ranks: int,
    num_physical: int,
    knee: float,
    free: float,
) -> bool:
    """Whether spreading evenly ends before the chosen columns do, where experts run in turn."""
    one, even = (
        time_in_turn(
            split(column, tokens_E, num_replicas_E, table_ER.shape[1]),
            table_ER,
            num_ranks,
            num_physical,
            knee,
            free,
        )
        for column in (column_E, None)
    )
    return even < one


def map_pairs(
    topk_ids_TK: np.ndarray,
    column_E: np.ndarray | None,
    table_ER: np.ndarray,
    num_replicas_E: np.ndarray,
    num_valid_tokens: int | None,
) -> np.ndarray:
    """Slots of the pairs under a choice, or under the even split if ``column_E`` is None."""
    tokens_E = count(topk_ids_TK, len(num_replicas_E), num_valid_tokens)
    split_ER = split(column_E, tokens_E, num_replicas_E, table_ER.shape[1])
    return assign_reference.assign(topk_ids_TK, split_ER, table_ER, None, num_valid_tokens)
