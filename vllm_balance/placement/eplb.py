"""vLLM's own EPLB placement, called as its periodic rebalancing calls it."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from vllm_balance.placement.policy import Array, Cluster, Progress, check_history


class EplbPlacement:
    """Sums the history over its steps and hands it to vLLM's DefaultEplbPolicy; speeds unknown."""

    name: ClassVar[str] = "eplb"

    def place(
        self, history_NLE: Array, cluster: Cluster, progress: Progress | None = None
    ) -> Array:
        """See `PlacementPolicy.place`."""
        import torch

        check_history(history_NLE)
        num_physical = cluster.num_physical(history_NLE.shape[2])
        load_LE = torch.from_numpy(history_NLE.sum(0).astype(np.float32))
        map_LP = self._policy().rebalance_experts(
            weight=load_LE,
            num_replicas=num_physical,
            num_groups=cluster.num_groups,
            num_nodes=cluster.num_nodes,
            num_ranks=cluster.num_ranks,
        )
        return np.asarray(map_LP.numpy()).astype(np.int32)

    def _policy(self) -> Any:
        from vllm.distributed.eplb.policy.default import DefaultEplbPolicy

        return DefaultEplbPolicy
