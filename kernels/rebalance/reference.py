"""Schedules with dynamic slots in plain Python: the definition the kernel is tested against.

A move is (expert, receiving rank, tokens). The functions here are written for reading. Moves come
from `rebalance` (Algorithm 2 of HarMoEny, arXiv 2506.12417) with `keep_what_fits`, from `balance`
or from `spread`; `place_moves` gives them slots.
"""

from __future__ import annotations

import numpy as np

from ..metro.reference import is_compute_bound
from .rules import Eviction

Move = tuple[int, int, int]


def rebalance(tokens_FE: np.ndarray, num_ranks: int, q: int) -> np.ndarray:
    """Algorithm 2: S[from, e, to], int64 [F, E, S]. Ties go to the lowest source, expert, rank."""
    num_sources, num_experts = tokens_FE.shape
    home_E = np.arange(num_experts) // (num_experts // num_ranks)
    moved_FES = np.zeros((num_sources, num_experts, num_ranks), np.int64)
    moved_FES[:, np.arange(num_experts), home_E] = tokens_FE
    mean = int(tokens_FE.sum()) // num_ranks
    while moved_FES.sum((0, 1)).max() > mean:
        tokens_S = moved_FES.sum((0, 1))
        busiest, idlest = int(tokens_S.argmax()), int(tokens_S.argmin())
        source = int(moved_FES[:, :, busiest].sum(1).argmax())
        expert = int(moved_FES[source, :, busiest].argmax())
        movable = int(moved_FES[source, expert, busiest])
        if movable < q or idlest == busiest or tokens_S[idlest] + q > mean:
            break
        tokens = min(movable, mean - int(tokens_S[idlest]))
        moved_FES[source, expert, busiest] -= tokens
        moved_FES[source, expert, idlest] += tokens
    return moved_FES


def keep_what_fits(moved_FES: np.ndarray, num_dynamic: int) -> list[Move]:
    """Per rank the D foreign experts with most tokens; the rest stays at home."""
    moved_ES = moved_FES.sum(0)
    num_experts, num_ranks = moved_ES.shape
    moves = []
    for rank in range(num_ranks):
        foreign = [e for e in range(num_experts) if e // (num_experts // num_ranks) != rank]
        foreign.sort(key=lambda e: (-moved_ES[e, rank], e))
        moves += [(e, rank, int(moved_ES[e, rank])) for e in foreign[:num_dynamic]]
    return [move for move in moves if move[2]]


def is_memory_bound(tokens_E: np.ndarray, knee_tokens: float, q: int) -> bool:
    """Whether the replicas that are there serve the batch: few tokens per active expert on
    average, and no expert with enough for streaming it once more and for its copy."""
    return not is_compute_bound(tokens_E, knee_tokens) and int(tokens_E.max()) < knee_tokens + q


class Filling:
    """One attempt to bring every rank to a target."""

    def __init__(
        self, tokens_E: np.ndarray, content_SD: np.ndarray, target: int, q: int, cost: int
    ) -> None:
        self.left_E = tokens_E.tolist()
        self.content_SD, self.target, self.q, self.cost = content_SD, target, q, cost
        self.home_S = tokens_E.reshape(len(content_SD), -1).sum(1).tolist()
        self.load_S, self.used_S = list(self.home_S), [0] * len(content_SD)
        self.fetches_S = [0] * len(content_SD)
        self.moves: list[Move] = []

    def run(self, way: str) -> list[Move] | None:
        """The moves; None if a rank stays above the target. ``way``: held, held_first, largest."""
        ranks = sorted(range(len(self.home_S)), key=lambda s: (-self.home_S[s], s))
        donors = [rank for rank in ranks if self.home_S[rank] > self.target]
        for stage in range(2 if way == "held_first" else 1):
            for donor in donors:
                for expert in self._by_tokens(donor):
                    if way == "largest" or stage == 0:
                        self._to_holders(expert, donor)
                    if way == "largest" or stage == 1:
                        self._by_fetching(expert, donor)
                if self.load_S[donor] > self.target and (way != "held_first" or stage == 1):
                    return None
        return self.moves

    def _by_tokens(self, donor: int) -> list[int]:
        """Home experts of a rank, most tokens of the batch first, lower number among equals."""
        num_home = len(self.left_E) // len(self.home_S)
        experts = range(donor * num_home, (donor + 1) * num_home)
        demand = {e: self.left_E[e] + sum(m[2] for m in self.moves if m[0] == e) for e in experts}
        return sorted(experts, key=lambda e: (-demand[e], e))

    def _start(self, rank: int, *, fetch: bool) -> int:
        """When a rank could begin with further tokens: a first fetch arrives after q - cost."""
        is_first = fetch and self.fetches_S[rank] == 0
        return max(self.load_S[rank], self.q - self.cost) if is_first else self.load_S[rank]

    def _receiver(self, allowed: list[int], limit: int, *, fetch: bool) -> int | None:
        """The rank with a slot left that can start first, up to ``limit``; lowest among equals."""
        start = {
            s: self._start(s, fetch=fetch)
            for s in allowed
            if self.used_S[s] < self.content_SD.shape[1]
        }
        fitting = [s for s in start if start[s] <= limit]
        return min(fitting, key=lambda s: (start[s], s), default=None)

    def _to_holders(self, expert: int, donor: int) -> None:
        holders = np.flatnonzero((self.content_SD == expert).any(1)).tolist()
        while self.load_S[donor] > self.target and self.left_E[expert]:
            receiver = self._receiver(holders, self.target - 1, fetch=False)
            if receiver is None:
                return
            excess = self.load_S[donor] - self.target
            room = self.target - self.load_S[receiver]
            self._move(expert, donor, receiver, min(self.left_E[expert], excess, room))

    def _by_fetching(self, expert: int, donor: int) -> None:
        everyone = list(range(len(self.home_S)))
        while self.load_S[donor] > self.target and self.left_E[expert] >= self.q:
            limit = self.target - self.cost - self.q
            receiver = self._receiver(everyone, limit, fetch=True)
            if receiver is None:
                return
            self.load_S[receiver] = self._start(receiver, fetch=True) + self.cost
            self.fetches_S[receiver] += 1
            excess = max(self.load_S[donor] - self.target, self.q)
            room = self.target - self.load_S[receiver]
            self._move(expert, donor, receiver, min(self.left_E[expert], excess, room))

    def _move(self, expert: int, donor: int, receiver: int, tokens: int) -> None:
        self.left_E[expert] -= tokens
        self.load_S[donor] -= tokens
        self.load_S[receiver] += tokens
        self.used_S[receiver] += 1
        self.moves.append((expert, receiver, tokens))


def balance(
    tokens_E: np.ndarray, content_SD: np.ndarray, q: int, cost: int, tolerance: float
) -> tuple[list[Move], bool]:
    """The improved schedule: (moves, whether the home ranks are even enough as they are)."""

    def fill(target: int, way: str) -> tuple[list[Move], int] | None:
        """The moves and how many of them are fetches; None if a rank stays above the target."""
        filling = Filling(tokens_E, content_SD, target, q, cost)
        moves = filling.run(way)
        return None if moves is None else (moves, sum(filling.fetches_S))

    home_S = tokens_E.reshape(len(content_SD), -1).sum(1)
    mean = -(-int(tokens_E.sum()) // len(content_SD))
    slack = int(mean * tolerance)
    goal, gain, precision = mean + slack, max(slack, 1), max(slack // 4, 1)
    target, way = int(home_S.max()), "held"
    if target <= goal:
        return [], True
    for candidate in ("held", "held_first", "largest"):
        if candidate == "held" or target - goal >= gain:
            found = _least(lambda at, c=candidate: fill(at, c) is not None, goal, target, precision)
            if candidate == "held" or target - found >= gain:
                target, way = found, candidate
    moves, fetches = fill(target, way) or ([], 0)
    for quarter in range(4):
        lower = fill(mean + (target - mean) * quarter // 4, way)
        if lower is not None and lower[1] <= fetches:
            return lower[0], False
    return moves, False


def _least(reachable, goal: int, high: int, precision: int) -> int:
    """The least target that can be reached, by bisection; ``high`` if none below it can."""
    if reachable(goal):
        return goal
    low = goal
    while high - low > precision:
        middle = (low + high) // 2
        low, high = (low, middle) if reachable(middle) else (middle, high)
    return high


def spread(tokens_E: np.ndarray, content_SD: np.ndarray, q: int, *, always: bool) -> list[Move]:
    """Even shares of the hottest experts on all ranks: all that fit, or while the time falls."""
    num_ranks, num_dynamic = content_SD.shape
    num_home = len(tokens_E) // num_ranks
    load_S = tokens_E.reshape(num_ranks, -1).sum(1).astype(np.int64)
    used_S, moves = np.zeros(num_ranks, np.int64), []
    for expert in np.argsort(-tokens_E.astype(np.int64), kind="stable").tolist():
        home, tokens = expert // num_home, int(tokens_E[expert])
        others = [rank for rank in range(num_ranks) if rank != home]
        fits = all(used_S[rank] < num_dynamic for rank in others)
        if tokens == 0 or not others or not (fits or always):
            break
        if not fits:
            continue
        base, rest = divmod(tokens, num_ranks)
        share_S = [base + ((s - expert - base) % num_ranks < rest) for s in range(num_ranks)]
        others = [rank for rank in others if share_S[rank]]
        after_S = load_S + share_S
        after_S[home] -= tokens
        after_S[[rank for rank in others if expert not in content_SD[rank]]] += q
        if not always and after_S.max() >= load_S.max():
            break
        load_S = after_S
        used_S[others] += 1
        moves += [(expert, rank, share_S[rank]) for rank in others]
    return moves


def place_moves(
    moves: list[Move], content_SD: np.ndarray, idle_SD: np.ndarray, eviction: Eviction
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(content, idle, fetch, served tokens) of the dynamic slots after the moves, each [S, D]."""
    content_SD, fetch_SD = content_SD.copy(), np.full_like(content_SD, -1)
    served_SD, needed_SD = np.zeros_like(content_SD), np.zeros(content_SD.shape, bool)
    before_SD = content_SD.copy()
    for expert, rank, tokens in moves:
        for d in np.flatnonzero(before_SD[rank] == expert):
            needed_SD[rank, d], served_SD[rank, d] = True, tokens
    for expert, rank, tokens in moves:
        if expert in before_SD[rank]:
            continue
        free = np.flatnonzero(~needed_SD[rank])
        is_held_D, idle_D = content_SD[rank] >= 0, idle_SD[rank] * (eviction == Eviction.LRU)
        d = min(free, key=lambda d, h=is_held_D, i=idle_D: (h[d], -i[d] if h[d] else 0, d))
        needed_SD[rank, d] = True
        content_SD[rank, d] = fetch_SD[rank, d] = expert
        served_SD[rank, d] = tokens
    return content_SD, np.where(needed_SD, 0, idle_SD + 1), fetch_SD, served_SD
