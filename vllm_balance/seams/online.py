"""Online GEM in a worker: what the ranks do together, with vLLM's own exchange of weights."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from vllm_balance import documents, maps
from vllm_balance.balancer import LayerBalancer
from vllm_balance.config import BalancerConfig
from vllm_balance.errors import BalancerError
from vllm_balance.initial_placement import InitialPlacement
from vllm_balance.online import OnlinePlacement, record_load_into, require_whole_batch
from vllm_balance.placement.online import Decision, compile_ahead
from vllm_balance.placement.policy import Array, Cluster
from vllm_balance.seams.collective import from_all_ranks
from vllm_balance.seams.loading import write_maps
from vllm_balance.seams.settings_files import measured_costs, placement_of
from vllm_balance.worker_balancer import WorkerBalancer

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


def move_to_map(
    file: str, served: WorkerBalancer, config: BalancerConfig, vllm_config: Any
) -> dict[str, Any]:
    """Moves all experts to where a map has them; all ranks call it between the same two steps.

    What was moved, or under `error` why nothing was: the same on every rank.
    """
    from vllm.distributed import get_ep_group

    placement, problem = None, None
    try:
        placement = _placement_to_move_to(file, config, vllm_config)
    except BalancerError as error:
        problem = str(error)
    start = time.perf_counter()
    own = problem, placement and placement.checksum
    found = from_all_ranks(get_ep_group(), own)
    problems = [f"Rank {rank}: {said}" for rank, (said, _) in enumerate(found) if said is not None]
    if not problems and len(set(found)) > 1:
        problems = [f"The ranks read different maps from {file}; put the same file on all nodes."]
    if problems:
        return {"error": f"{problems[0]} No expert was moved."}
    assert placement is not None and served.online is not None
    changed = served.online.adopt(placement.placement_LP)
    served.placement = f"{placement.origin} {placement.checksum[:12]} moved to while serving"
    return {
        "rank": served.rank,
        "placement": served.placement,
        "slots_changed": changed,
        "seconds": time.perf_counter() - start,
    }


def _placement_to_move_to(file: str, config: BalancerConfig, vllm_config: Any) -> InitialPlacement:
    """The placement of a map that this server can move to.

    Raises:
        BalancerError: nothing can move here, or the map cannot be read or does not fit.
    """
    if config.online is None:
        raise BalancerError(
            f"--moe-balancer {config.name} was started without what moves experts to a map while "
            f"serving. Restart the server with this map as `map` in --moe-balancer-config, or with "
            f"--moe-balancer gem and `online`, and maps can change from then on."
        )
    if vllm_config.parallel_config.data_parallel_size > 1:
        raise BalancerError(
            "Data-parallel engines take steps of their own between requests, so they cannot all "
            "move experts between the same two. Restart the server with this map as `map`."
        )
    found = maps.load(documents.expanded(file))
    return placement_of(found, vllm_config, config.num_redundant_experts or 0)


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
