"""GEM: every expert on the rank whose speed and neighbours suit it.

arXiv 2605.19945. Equal experts per rank, one copy each; per layer, the sum over recorded steps of
the slowest rank's modelled time is searched by swaps between ranks. Steps are kept apart, so that
experts which fire together end up on different ranks although averages would not show them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from vllm_balance.placement.eplb import EplbPlacement
from vllm_balance.placement.policy import (
    Array,
    Cluster,
    Progress,
    check_history,
    place_layers,
    refuse_redundant,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GemPlacement:
    """Swap search with several starts and kicks; the same seed gives the same placement."""

    name: ClassVar[str] = "gem"
    seed: int = 0
    starts: int = 2
    """Random starts beside the linear one, the packed one and vLLM's EPLB placement."""
    kicks: int = 24
    """Most times that the best placement of a layer is shaken and improved again."""
    patience: int = 8
    """Kicks without success after which a layer is left."""
    eplb: EplbPlacement = field(default_factory=EplbPlacement)
    """Makes one of the starts."""

    def place(
        self, history_NLE: Array, cluster: Cluster, progress: Progress | None = None
    ) -> Array:
        """See `PlacementPolicy.place`. Never worse in the model than linear or vLLM's EPLB on this
        history."""
        check_history(history_NLE)
        refuse_redundant(cluster, self.name)
        num_experts = history_NLE.shape[2]
        cluster.num_physical(num_experts)
        coefficient_S8 = coefficients(cluster)
        eplb_LP = self.eplb.place(history_NLE, cluster)
        eplb_LE = np.argsort(eplb_LP, axis=1) // (num_experts // cluster.num_ranks)

        def place_layer(layer: int) -> Array:
            history_NE = history_NLE[:, layer]
            rank_of_E = self._search(history_NE, cluster, coefficient_S8, eplb_LE[layer], layer)
            return np.argsort(rank_of_E, kind="stable").astype(np.int32)

        return place_layers(place_layer, history_NLE.shape[1], progress)

    def _search(
        self,
        history_NE: Array,
        cluster: Cluster,
        coefficient_S8: Array,
        eplb_E: Array,
        layer: int,
    ) -> Array:
        from vllm_balance.placement.swap_search import search

        num_experts, num_ranks = history_NE.shape[1], cluster.num_ranks
        linear_E = np.arange(num_experts) // (num_experts // num_ranks)
        random = np.random.default_rng((self.seed, layer))
        starts_ME = [linear_E, packed(history_NE, cluster), eplb_E]
        starts_ME += [random.permutation(linear_E) for _ in range(self.starts)]
        rank_of_E = search(
            np.ascontiguousarray(history_NE, dtype=np.int64),
            np.array(starts_ME, dtype=np.int64),
            coefficient_S8,
            self.kicks,
            self.patience,
            int(random.integers(2**31)),
        )
        return np.asarray(rank_of_E)


def coefficients(cluster: Cluster) -> Array:
    """The ranks' curves as the compiled search takes them, float64 [S, 8]."""
    return np.array(
        [
            (c.a_us, c.b_us, c.tile_us, c.c_us, c.beta_us, c.tile_tokens or 0, c.free, c.in_turn)
            for c in cluster.costs
        ],
        dtype=np.float64,
    )


def packed(history_NE: Array, cluster: Cluster) -> Array:
    """Rank of each expert, int64 [E]: heaviest first, each to the rank that then ends first."""
    num_experts, num_ranks = history_NE.shape[1], cluster.num_ranks
    load_SE3 = mean_loads(history_NE, cluster)
    load_S3, held_S = np.zeros((num_ranks, 3)), np.zeros(num_ranks)
    rank_of_E = np.zeros(num_experts, np.int64)
    for expert in np.argsort(-load_SE3[0, :, 1], kind="stable"):
        time_S = [
            float(cost.time_us(*(load_S3[s] + load_SE3[s, expert])))
            for s, cost in enumerate(cluster.costs)
        ]
        free_S = held_S < num_experts // num_ranks
        rank = int(np.argmin(np.where(free_S, time_S, np.inf)))
        rank_of_E[expert] = rank
        load_S3[rank] += load_SE3[rank, expert]
        held_S[rank] += 1
    return rank_of_E


def mean_loads(history_NE: Array, cluster: Cluster) -> Array:
    """(activated, tokens, further tiles) of each expert on each rank, means over steps [S, E, 3].

    history_NE: pairs of each expert or, divided over its replicas, of one replica.
    """
    active_E, tokens_E = np.minimum(history_NE, 1).mean(0), history_NE.mean(0)
    return np.stack(
        [
            np.stack([active_E, tokens_E, cost.further(history_NE).mean(0)], axis=1)
            for cost in cluster.costs
        ]
    )
