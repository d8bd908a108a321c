"""Online GEM in a worker: what the ranks do together, with vLLM's own exchange of weights."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from vllm_balance.balancer import LayerBalancer
from vllm_balance.config import BalancerConfig
from vllm_balance.online import OnlinePlacement, record_load_into, require_whole_batch
from vllm_balance.placement.online import Decision, compile_ahead
from vllm_balance.placement.policy import Array, Cluster
from vllm_balance.seams.loading import write_maps
from vllm_balance.seams.settings_files import measured_costs

PROBES = 3
"""Times that two experts change places and back before serving, to know what it costs."""


class WorkerRanks:
    """The ranks of vLLM's expert-parallel group; the maps and weights are those of its EPLB."""

    def __init__(self, state: Any) -> None:
        """`state` is vLLM's EplbModelState."""
        from vllm.distributed import get_ep_group

        self._state, self._group = state, get_ep_group()

    @property
    def placement_LP(self) -> Array:
        """Expert of each slot as vLLM's EPLB has it, int32 [L, P]."""
        found: Array = self._state.physical_to_logical_map.cpu().numpy().astype(np.int32)
        return found

    def gather(self, own: Array) -> Array:
        """One small all-gather over the host group."""
        mine = torch.from_numpy(own)
        found = [torch.empty_like(mine) for _ in range(self._group.world_size)]
        torch.distributed.all_gather(found, mine, group=self._group.cpu_group)
        return torch.stack(found).numpy()

    def from_first(self, decision: Decision | None) -> Decision:
        """Broadcast, so that no rounding on a rank can part it from the others."""
        box = [decision]
        torch.distributed.broadcast_object_list(
            box, src=self._group.ranks[0], group=self._group.cpu_group
        )
        assert box[0] is not None
        return box[0]

    def move(self, placement_LP: Array) -> None:
        """Exchanges the weights of the layers that change, then writes the maps in place."""
        from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace

        state = self._state
        rows = np.flatnonzero((placement_LP != self.placement_LP).any(1)).tolist()
        if not rows:
            return
        rearrange_expert_weights_inplace(
            old_global_expert_indices=state.physical_to_logical_map[rows],
            new_global_expert_indices=torch.from_numpy(placement_LP[rows].astype(np.int64)),
            expert_weights=[state.model.expert_weights[row] for row in rows],
            expert_buffer=state.expert_buffer,
            ep_group=self._group.device_group,
            communicator=state.communicator,
        )
        for row in rows:
            write_maps(state, row, placement_LP[row], state.model.num_logical_experts)

    def swap_us(self) -> float:
        """Measured time of one swap between the first two ranks, microseconds; all takes part.

        The median of a few, there and back, in the first layer.
        """
        here_LP = self.placement_LP
        there_LP = here_LP.copy()
        pair = [0, here_LP.shape[1] // self._group.world_size]
        there_LP[0, pair] = there_LP[0, pair[::-1]]
        spent_s = []
        for _ in range(PROBES):
            self._group.barrier()
            start = time.perf_counter()
            self.move(there_LP)
            self.move(here_LP)
            spent_s.append(time.perf_counter() - start)
        return float(np.median(spent_s)) / 2 * 1e6


def online_placement(
    config: BalancerConfig, vllm_config: Any, eplb_state: Any, layers: list[LayerBalancer]
) -> OnlinePlacement:
    """Starts recording in every layer and gives what decides and moves; every rank takes part.

    Raises:
        BalancerError: the ranks do not all see the whole batch.
    """
    from vllm.logger import init_logger

    require_whole_batch(layers[0].way)
    costs = measured_costs(config, vllm_config)
    assert config.online is not None and costs is not None
    if layers[0].rank == 0:  # Which decides for all.
        compile_ahead(Cluster(costs=costs))
    (state,) = eplb_state.model_states.values()
    ranks = WorkerRanks(state)
    placement_LP = ranks.placement_LP
    load_LP = torch.zeros(placement_LP.shape, dtype=torch.int32)
    for layer, load_P in zip(layers, load_LP, strict=True):
        record_load_into(layer, load_P)
    return OnlinePlacement(
        settings=config.online,
        costs=costs,
        layers=layers,
        load_LP=load_LP,
        placement_LP=placement_LP,
        ranks=ranks,
        swap_us=ranks.swap_us(),
        report=init_logger(f"vllm.{__name__}").info if layers[0].rank == 0 else lambda _: None,
    )
