"""GEM's objective with redundant experts: which experts get replicas, and where.

Not in the paper, which keeps one copy of each expert. The search moves experts between ranks and
gives redundant slots to other experts, and scores both as the routing will use them.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from vllm_balance.placement.eplb import EplbPlacement
from vllm_balance.placement.gem import coefficients, mean_loads
from vllm_balance.placement.policy import (
    Array,
    Cluster,
    Progress,
    check_history,
    place_layers,
)
from vllm_balance.placement.score import Split

TRIALS: dict[Split, int] = {"even": 200_000, "one": 50_000}
"""Most moves tried per layer; one takes ten times as long to score if one replica serves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GemReplicaPlacement:
    """Descent from a packed placement with popular experts repeated."""

    name: ClassVar[str] = "gem_r"
    split: Split = "even"
    """How the routing uses replicas: evenly, or one per batch and expert as metro does."""
    trials: int | None = None
    """Most moves tried per layer, which bounds the search time; None: TRIALS."""
    eplb: EplbPlacement = field(default_factory=EplbPlacement)
    """Makes one of the starts."""

    def place(
        self, history_NLE: Array, cluster: Cluster, progress: Progress | None = None
    ) -> Array:
        """See `PlacementPolicy.place`. Never worse in the model than linear or vLLM's EPLB on this
        history."""
        check_history(history_NLE)
        cluster.num_physical(history_NLE.shape[2])
        coefficient_S8 = coefficients(cluster)
        eplb_LP = self.eplb.place(history_NLE, cluster)

        def place_layer(layer: int) -> Array:
            slots_P = self._search(history_NLE[:, layer], cluster, coefficient_S8, eplb_LP[layer])
            return slots_P.astype(np.int32)

        return place_layers(place_layer, history_NLE.shape[1], progress)

    def _search(
        self, history_NE: Array, cluster: Cluster, coefficient_S8: Array, eplb_P: Array
    ) -> Array:
        from vllm_balance.placement.replica_load import EVEN, ONE
        from vllm_balance.placement.replica_search import BLOCK, descend_replicas

        num_steps, num_experts = history_NE.shape
        # Every block of the search is a sample of the whole recording.
        spread_N = np.argsort(np.arange(num_steps) % -(-num_steps // BLOCK), kind="stable")
        tokens_NE = history_NE[spread_N].astype(np.float64)
        linear_P = np.arange(cluster.num_physical(num_experts)) % num_experts
        split = EVEN if self.split == "even" else ONE
        packed_P = packed_replicas(history_NE, cluster).astype(np.int64)

        def score(slots_P: Array, trials: int) -> float:
            found, _ = descend_replicas(
                tokens_NE, slots_P, coefficient_S8, split, trials, np.empty(0)
            )
            return float(found)

        trials = TRIALS[self.split] if self.trials is None else self.trials
        found = [(score(packed_P, trials), packed_P)]
        found += [(score(slots_P, 0), slots_P) for slots_P in (linear_P, eplb_P.astype(np.int64))]
        return min(found, key=lambda scored: scored[0])[1]


def replicas_by_load(load_E: Array, num_redundant: int, most: int) -> Array:
    """Replicas of each expert, [E]: each further one to the expert with most load per replica.

    No expert gets more than `most` unless all have them.
    """
    num_replicas_E = np.ones(len(load_E), np.int64)
    heap = [(-float(load), expert) for expert, load in enumerate(load_E)]
    heapq.heapify(heap)
    for left in range(num_redundant, 0, -1):
        if not heap:
            num_replicas_E[np.arange(left) % len(load_E)] += 1
            break
        _, expert = heapq.heappop(heap)
        num_replicas_E[expert] += 1
        if num_replicas_E[expert] < most:
            heapq.heappush(heap, (-float(load_E[expert]) / num_replicas_E[expert], expert))
    return num_replicas_E


def packed_replicas(history_NE: Array, cluster: Cluster) -> Array:
    """Expert of each slot, [P]: popular experts repeated, the heaviest replica placed first.

    Each goes to the free rank without a copy of it, if there is one, that then ends first.
    """
    load_E = history_NE.mean(0)
    num_ranks = cluster.num_ranks
    slots = cluster.num_physical(len(load_E)) // num_ranks
    num_replicas_E = replicas_by_load(load_E, cluster.num_redundant, num_ranks)
    load_SE3 = mean_loads(history_NE / num_replicas_E, cluster)
    content: list[list[int]] = [[] for _ in range(num_ranks)]
    load_S3 = np.zeros((num_ranks, 3))
    for expert in np.repeat(np.arange(len(load_E)), num_replicas_E)[
        np.argsort(-np.repeat(load_SE3[0, :, 1], num_replicas_E), kind="stable")
    ]:
        free = [s for s in range(num_ranks) if len(content[s]) < slots]
        apart = [s for s in free if expert not in content[s]] or free
        after_S3 = load_S3 + load_SE3[:, expert]
        rank = min(apart, key=lambda s: float(cluster.costs[s].time_us(*after_S3[s])))
        content[rank].append(int(expert))
        load_S3[rank] = after_S3[rank]
    return np.array(content).ravel()
