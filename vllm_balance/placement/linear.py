"""vLLM's default: consecutive experts on each rank."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from vllm_balance.placement.policy import Array, Cluster, Progress, check_history


class LinearPlacement:
    """Experts 0, 1, 2 ... in slot order; redundant slots repeat them from 0, as vLLM starts."""

    name: ClassVar[str] = "linear"

    def place(
        self, history_NLE: Array, cluster: Cluster, progress: Progress | None = None
    ) -> Array:
        """See `PlacementPolicy.place`."""
        check_history(history_NLE)
        _, num_layers, num_experts = history_NLE.shape
        slots_P = np.arange(cluster.num_physical(num_experts), dtype=np.int32) % num_experts
        return np.tile(slots_P, (num_layers, 1))
