"""vLLM's other static placement: experts dealt over the ranks in turn."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from vllm_balance.placement.policy import (
    Array,
    Cluster,
    Progress,
    check_history,
    refuse_redundant,
)


class RoundRobinPlacement:
    """Expert e on rank e modulo the number of ranks; no redundant experts."""

    name: ClassVar[str] = "round_robin"

    def place(
        self, history_NLE: Array, cluster: Cluster, progress: Progress | None = None
    ) -> Array:
        """See `PlacementPolicy.place`."""
        check_history(history_NLE)
        refuse_redundant(cluster, self.name)
        _, num_layers, num_experts = history_NLE.shape
        experts_E = np.arange(cluster.num_physical(num_experts), dtype=np.int32)
        slots_P = experts_E.reshape(-1, cluster.num_ranks).T.ravel()
        return np.tile(slots_P, (num_layers, 1))
