"""The GPU's choice in plain numpy, step for step: triton_gpu.py must equal it to the last integer.

Every step works on all experts or all ranks at once. Lambda starts at its lower bound and rises
only when a full search has proved that the bound is too low, so the result is optimal
(docs/metro.md, "On the GPU"):

1. *Claim rounds.* Every unplaced movable expert claims its least activated rank; every rank
   accepts claims in expert order up to lambda. Repeat until nobody unplaced can claim.
2. *Search.* From all unplaced experts at once, breadth first over ranks. If a rank below lambda is
   reached, one expert is placed by moving the experts on the path one rank on; search again (a
   claim would find nothing new).
3. If not, the reached ranks are full and every expert on them, placed or not, has all replicas
   among them: lambda rises to what they must carry at least; back to 1.
4. *Token shifts.* At most ``MAX_SHIFTS`` times one expert leaves the rank with the most tokens: to
   a rank below lambda, or to a rank at lambda in exchange for its lightest expert that can come.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_SHIFTS = 16
"""Token shifts, at most; bounds the time of step 4."""
ALONE = 1023
"""No expert comes back in a shift (expert ids are below 512)."""


@dataclass(slots=True)
class Choice:
    """The state all steps work on. Ranks of replicas are -1 where there is none."""

    ranks_ER: np.ndarray
    tokens_E: np.ndarray
    rank_E: np.ndarray
    """Rank chosen, -1 while unplaced or inactive, int64 [E]."""
    waiting_E: np.ndarray
    """Active, movable and not placed yet, bool [E]."""
    activated_S: np.ndarray
    limit: int
    """Lambda, or what it must be at least."""
    rounds: int = 0
    """How often each step ran: claim rounds, searches, raises of the limit, layers of ranks
    reached, experts moved on paths, token shifts."""
    searches: int = 0
    raises: int = 0
    layers: int = 0
    moves: int = 0
    shifts: int = 0

    def may_use_ES(self) -> np.ndarray:
        """Whether an expert has a replica on a rank, bool [E, S]."""
        hosts_ES = np.zeros((len(self.rank_E), len(self.activated_S)), bool)
        for column in range(self.ranks_ER.shape[1]):
            has = np.flatnonzero(self.ranks_ER[:, column] >= 0)
            hosts_ES[has, self.ranks_ER[has, column]] = True
        return hosts_ES


def claim(state: Choice) -> bool:
    """One claim round; false if no unplaced expert has a rank below the limit."""
    num_experts, num_ranks = len(state.rank_E), len(state.activated_S)
    experts_E = np.arange(num_experts)
    best_E = np.full(num_experts, 2**30)
    for column in range(state.ranks_ER.shape[1]):
        rank_E = state.ranks_ER[:, column]
        activated_E = state.activated_S[np.maximum(rank_E, 0)]
        key_E = activated_E * 4096 + ((rank_E - experts_E) & 63) * 64 + rank_E
        usable_E = (rank_E >= 0) & (activated_E < state.limit)
        best_E = np.where(usable_E, np.minimum(best_E, key_E), best_E)
    claims_E = state.waiting_E & (best_E < 2**30)
    if not claims_E.any():
        return False
    target_E = best_E & 63
    claims_ES = claims_E[:, None] & (target_E[:, None] == np.arange(num_ranks)[None])
    order_E = np.cumsum(claims_ES, 0)[experts_E, np.minimum(target_E, num_ranks - 1)]
    accepted_E = claims_E & (state.activated_S[np.minimum(target_E, num_ranks - 1)] + order_E
                             <= state.limit)  # fmt: skip
    state.rank_E = np.where(accepted_E, target_E, state.rank_E)
    state.waiting_E &= ~accepted_E
    state.activated_S += (claims_ES & accepted_E[:, None]).sum(0)
    state.rounds += 1
    return True


def search(state: Choice) -> bool:
    """Places one unplaced expert along a shortest path, or raises the limit (then true)."""
    hosts_ES = state.may_use_ES()
    depth_S = np.where(hosts_ES[state.waiting_E].any(0), 0, -1)
    depth = 0
    state.searches += 1
    while True:
        state.layers += 1
        free_S = (depth_S >= 0) & (state.activated_S < state.limit)
        if free_S.any():
            key_S = np.where(free_S, state.activated_S * 64 + np.arange(len(free_S)), 2**30)
            place(state, hosts_ES, depth_S, int(key_S.min()) & 63)
            return False
        frontier_E = (state.rank_E >= 0) & (depth_S[state.rank_E] == depth)
        found_S = hosts_ES[frontier_E].any(0) & (depth_S < 0)
        if not found_S.any():
            carried = state.activated_S[depth_S >= 0].sum() + state.waiting_E.sum()
            reached = (depth_S >= 0).sum()
            state.limit = max(state.limit + 1, -(-int(carried) // int(reached)))
            state.raises += 1
            return True
        depth += 1
        depth_S[found_S] = depth


def place(state: Choice, hosts_ES: np.ndarray, depth_S: np.ndarray, rank: int) -> None:
    """Moves the experts on the path that ends at ``rank``, the lowest-numbered at each step."""
    state.activated_S[rank] += 1
    while True:
        state.moves += 1
        depth = depth_S[rank]
        if depth == 0:
            expert = int(np.flatnonzero(state.waiting_E & hosts_ES[:, rank])[0])
            state.waiting_E[expert] = False
            state.rank_E[expert] = rank
            return
        before_E = (state.rank_E >= 0) & (depth_S[state.rank_E] == depth - 1)
        expert = int(np.flatnonzero(before_E & hosts_ES[:, rank])[0])
        rank, state.rank_E[expert] = int(state.rank_E[expert]), rank


def lightest_partners(
    state: Choice, movable_E: np.ndarray, hosts_ES: np.ndarray, busiest: int
) -> np.ndarray:
    """Per rank, what a shift from ``busiest`` to it gets in return, int64 [S]: ``t * 1024 + e``.

    Nothing (``ALONE``) for a rank below the limit, else its expert e with the fewest tokens t
    that has a replica on ``busiest``; 2**62 if there is none.
    """
    num_experts, num_ranks = hosts_ES.shape
    returns_E = movable_E & hosts_ES[:, busiest]
    key_E = state.tokens_E * 1024 + np.arange(num_experts)
    here_ES = returns_E[:, None] & (state.rank_E[:, None] == np.arange(num_ranks)[None])
    lightest_S = np.where(here_ES, key_E[:, None], 2**62).min(0)
    return np.where(state.activated_S < state.limit, ALONE, lightest_S)


def best_shift(
    state: Choice, tokens_S: np.ndarray, partner_S: np.ndarray, movable_E: np.ndarray, busiest: int
) -> int:
    """Least ``(larger token count of the two ranks * 1024 + expert) * 64 + target rank``."""
    on_busiest_E = movable_E & (state.rank_E == busiest)
    best = 2**62
    for column in range(state.ranks_ER.shape[1]):
        rank_E = state.ranks_ER[:, column]
        safe_E = np.maximum(rank_E, 0)
        gain_E = state.tokens_E - (partner_S[safe_E] >> 10)
        larger_E = np.maximum(tokens_S[safe_E] + gain_E, tokens_S[busiest] - gain_E)
        usable_E = on_busiest_E & (rank_E >= 0) & (rank_E != busiest) & (gain_E > 0)
        key_E = (larger_E * 1024 + np.arange(len(rank_E))) * 64 + rank_E
        best = min(best, int(np.where(usable_E, key_E, 2**62).min()))
    return best


def shift_tokens(state: Choice, movable_E: np.ndarray) -> None:
    """Moves or swaps experts off the rank with the most tokens while that helps."""
    num_ranks = len(state.activated_S)
    placed_E = state.rank_E >= 0
    tokens_S = np.bincount(
        state.rank_E[placed_E], weights=state.tokens_E[placed_E], minlength=num_ranks
    ).astype(np.int64)
    hosts_ES = state.may_use_ES()
    for _ in range(MAX_SHIFTS):
        busiest = int(np.argmax(tokens_S))
        if tokens_S[busiest] <= -(-int(tokens_S.sum()) // num_ranks):
            return
        partner_S = lightest_partners(state, movable_E, hosts_ES, busiest)
        best = best_shift(state, tokens_S, partner_S, movable_E, busiest)
        if best >> 16 >= tokens_S[busiest]:
            return
        state.shifts += 1
        expert, rank = (best >> 6) & 1023, best & 63
        partner, gain = partner_S[rank] & 1023, state.tokens_E[expert] - (partner_S[rank] >> 10)
        tokens_S[busiest] -= gain
        tokens_S[rank] += gain
        state.rank_E[expert] = rank
        if partner == ALONE:
            state.activated_S[busiest] -= 1
            state.activated_S[rank] += 1
        else:
            state.rank_E[partner] = busiest


def solve(tokens_E: np.ndarray, table_ER: np.ndarray, num_replicas_E: np.ndarray,
          num_ranks: int, num_physical: int) -> Choice:  # fmt: skip
    """Runs all steps; the returned state holds the choice and how many steps it took."""
    slots = num_physical // num_ranks
    columns = np.arange(table_ER.shape[1])[None] < num_replicas_E[:, None]
    ranks_ER = np.where(columns, table_ER.astype(np.int64) // slots, -1)
    active_E = tokens_E > 0
    movable_E = active_E & ((ranks_ER != ranks_ER[:, :1]) & columns).any(1)
    fixed_E = active_E & ~movable_E
    rank_E = np.where(fixed_E, ranks_ER[:, 0], -1)
    activated_S = np.bincount(rank_E[fixed_E], minlength=num_ranks)
    limit = max(int(activated_S.max()), -(-int(active_E.sum()) // num_ranks))
    state = Choice(ranks_ER, tokens_E.astype(np.int64), rank_E, movable_E.copy(),
                   activated_S, limit)  # fmt: skip
    claiming = True
    while state.waiting_E.any():
        while claiming:
            claiming = claim(state)
        if state.waiting_E.any():
            claiming = search(state)
    shift_tokens(state, movable_E)
    return state


def choose(
    tokens_E: np.ndarray,
    table_ER: np.ndarray,
    num_replicas_E: np.ndarray,
    num_ranks: int,
    num_physical: int,
) -> np.ndarray:
    """Column per expert, int32 [E], -1 inactive: the first replica on the chosen rank."""
    state = solve(tokens_E, table_ER, num_replicas_E, num_ranks, num_physical)
    on_rank_ER = state.ranks_ER == state.rank_E[:, None]
    return np.where(state.rank_E >= 0, np.argmax(on_rank_ER, 1), -1).astype(np.int32)
