"""Whether to move a few experts now: modelled gain over a horizon against the cost of moving.

Not in GEM's paper, whose placement is fixed when the model is loaded. Swaps are chosen on the even
steps of the recent window and judged on the odd ones, so that chance does not move experts. A rank
is slower than the others only if the parts of the window agree that it is.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from vllm_balance.cost import agreed
from vllm_balance.placement.gem import coefficients
from vllm_balance.placement.policy import Array, Cluster, check_history
from vllm_balance.placement.score import lower_bound_L, score_L, step_times

MOST_LAYERS = 8
"""Layers that one decision searches, in turn: serving waits for it."""
LEAST_STEPS = 8
"""Recorded steps below which nothing is decided."""
PARTS = 8
"""Consecutive parts of the window in which the ranks' speeds are measured."""
CERTAIN_T = 3.499
"""Student's t of PARTS - 1 degrees of freedom, 99 %: so many standard errors must be between the
slowdowns of a rank and of the median rank."""


class OnlineSettings(BaseModel):
    """The keys of the setting ``online``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    interval: int = Field(default=200, ge=1)
    """Steps between two decisions."""
    window: int = Field(default=64, ge=LEAST_STEPS)
    """Most recent steps that a decision looks at."""
    horizon: int = Field(default=2000, ge=1)
    """Steps within which a move must have paid for itself."""
    max_swaps: int = Field(default=4, ge=1)
    """Most swaps of two experts in one decision, over all layers."""
    hysteresis: float = Field(default=0.01, ge=0, lt=1)
    """Least gain for which experts move, as a share of the modelled time of the layers searched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """Two slots of one layer, on different ranks, that exchange their experts."""

    layer: int
    """Row of the placement."""
    slots: tuple[int, int]
    gain_us: float
    """Modelled time per step that it saves after the swaps before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do, and the numbers that it rests on. All times are per step."""

    swaps: tuple[Swap, ...]
    """Empty: leave everything where it is."""
    step_us: float
    """Modelled time of the layers searched, as experts are placed now."""
    gain_us: float
    """What the best few swaps would save, whether they are made or not."""
    reason: str

    def placement(self, placement_LP: Array) -> Array:
        """The placement after the swaps, int32 [L, P]."""
        moved_LP = placement_LP.copy()
        for swap in self.swaps:
            moved_LP[swap.layer, list(swap.slots)] = moved_LP[swap.layer, list(swap.slots[::-1])]
        return moved_LP


def decide(
    history_NLE: Array,
    placement_LP: Array,
    cluster: Cluster,
    settings: OnlineSettings,
    swap_us: float,
    turn: int = 0,
) -> Decision:
    """The swaps that pay, or none with the reason. Pure: the same arguments, the same decision.

    At most MOST_LAYERS layers are searched, others with every `turn`, and no layer whose distance
    from the lower bound would not pay for one swap.

    Args:
        history_NLE: pairs of each expert in the recent steps, integers [N, L, E].
        placement_LP: expert of each slot now, [L, E]; one copy each.
        cluster: the ranks with their present speeds.
        swap_us: measured time of one swap, microseconds, during which no rank serves.

    Raises:
        BalancerError: the history is not one.
    """
    check_history(history_NLE)
    if len(history_NLE) < LEAST_STEPS:
        reason = f"{len(history_NLE)} steps recorded, {LEAST_STEPS} needed"
        return Decision(swaps=(), step_us=0.0, gain_us=0.0, reason=reason)
    coefficient_S8 = coefficients(cluster)
    least_gain_us = swap_us / settings.horizon
    every = -(-len(placement_LP) // MOST_LAYERS)
    layers = range(turn % every, len(placement_LP), every)
    odd_NLE = history_NLE[1::2, layers]
    now_us_L = score_L(odd_NLE, placement_LP[layers], cluster) / len(odd_NLE)
    room_us_L = now_us_L - lower_bound_L(odd_NLE, cluster) / len(odd_NLE)
    chains = []
    for layer, now_us, room_us in zip(layers, now_us_L, room_us_L, strict=True):
        if room_us > least_gain_us:
            window_NE, slots_P = history_NLE[:, layer], placement_LP[layer]
            chain = _chain(window_NE, slots_P, now_us, cluster, coefficient_S8, settings.max_swaps)
            chains.append([Swap(layer=layer, slots=slots, gain_us=gain) for slots, gain in chain])
    swaps = _best(chains, settings.max_swaps, least_gain_us)
    step_us, gain_us = float(now_us_L.sum()), sum(swap.gain_us for swap in swaps)
    if not swaps:
        reason = "no swap pays for itself within the horizon"
    elif gain_us < settings.hysteresis * step_us:
        swaps, reason = (), "the gain is within the hysteresis"
    else:
        reason = "moved"
    return Decision(swaps=swaps, step_us=step_us, gain_us=gain_us, reason=reason)


def certain_slowdown_S(slowdown_MS: Array) -> Array:
    """Slowdown of each rank, [S]; where the parts do not agree that it is another than the median
    rank's, that one's.

    What else runs on a machine slows a rank for some steps, and a placement that took that for its
    speed would move load back and forth. What slows a rank as long as the whole window counts.

    Args:
        slowdown_MS: measured over modelled time in each of PARTS parts of the window, positive.
    """
    median_M = np.median(slowdown_MS, axis=1)
    relative_S = np.exp(agreed(np.log(slowdown_MS / median_M[:, None]), CERTAIN_T))
    return np.asarray(np.exp(np.log(median_M).mean()) * relative_S)


def compile_ahead(cluster: Cluster) -> None:
    """Compiles the search, which takes seconds the first time: no request should wait for it."""
    experts = 2 * cluster.num_ranks
    history_NE = np.ones((2, experts), np.int64)
    slots_P = np.arange(experts)
    _chain(history_NE, slots_P, 0.0, cluster, coefficients(cluster), most=1)


def drift(before_LE: Array, now_LE: Array) -> float:
    """How much of the load went to other experts: mean total variation distance, 0 to 1.

    Args:
        before_LE, now_LE: pairs of each expert, [L, E].
    """
    shares = [load / np.maximum(load.sum(1, keepdims=True), 1) for load in (before_LE, now_LE)]
    return float(np.abs(shares[0] - shares[1]).sum(1).mean() / 2)


def _chain(
    history_NE: Array,
    slots_P: Array,
    now_us: float,
    cluster: Cluster,
    coefficient_S8: Array,
    most: int,
) -> list[tuple[tuple[int, int], float]]:
    """The best swaps of one layer's even steps, in order, each with its gain on the odd ones."""
    from vllm_balance.placement.few_swaps import few_swaps

    slot_of_E = np.argsort(slots_P)
    rank_of_E = slot_of_E // (len(slots_P) // cluster.num_ranks)
    chosen_M2 = np.empty((most, 2), np.int64)
    even_NE = np.ascontiguousarray(history_NE[::2], dtype=np.int64)
    count = few_swaps(even_NE, rank_of_E.copy(), coefficient_S8, chosen_M2)
    trial_P, odd_NE = slots_P.copy(), history_NE[1::2]
    before_us, chain = float(now_us), []
    for one, two in chosen_M2[:count].tolist():
        slots = int(slot_of_E[one]), int(slot_of_E[two])
        slot_of_E[[one, two]] = slot_of_E[[two, one]]
        trial_P[list(slots)] = trial_P[list(slots[::-1])]
        after_us = float(step_times(odd_NE, trial_P, cluster).max(1).mean())
        chain.append((slots, before_us - after_us))
        before_us = after_us
    return chain


def _best(chains: list[list[Swap]], most: int, least_gain_us: float) -> tuple[Swap, ...]:
    """The swaps with the largest gains; those of a layer in their order, none that does not pay."""
    waiting = [(-chain[0].gain_us, place, 0) for place, chain in enumerate(chains) if chain]
    heapq.heapify(waiting)
    taken: list[Swap] = []
    while waiting and len(taken) < most:
        gain_us, place, done = heapq.heappop(waiting)
        if -gain_us <= least_gain_us:
            break
        taken.append(chains[place][done])
        if done + 1 < len(chains[place]):
            heapq.heappush(waiting, (-chains[place][done + 1].gain_us, place, done + 1))
    return tuple(taken)
