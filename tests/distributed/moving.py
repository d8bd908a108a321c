"""One rank of a gloo group whose experts move while it computes; started by test_moving.py.

    python moving.py WORLD_SIZE RANK INIT_FILE OUT_FILE

Three times from the start: with traffic that turns, with a slow rank, and with nothing to gain by
the settings that are default. Weights are moved by vLLM's own exchange. Every batch is compared
with the dense layer here; what ranks must agree on is written to OUT_FILE.
"""

import json
import sys
from datetime import timedelta
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import vllm.distributed.eplb.rebalance_execute  # noqa: F401  (once, before the ranks are forked)
from vllm.distributed.eplb.eplb_communicator import create_eplb_communicator

from vllm_balance.balancer import LayerBalancer, new_counters
from vllm_balance.cost import CostModel
from vllm_balance.experts.local_pairs import LocalPairExperts
from vllm_balance.online import OnlinePlacement, record_load_into
from vllm_balance.placement.online import OnlineSettings
from vllm_balance.routing import ROUTING, LayerTables
from vllm_balance.seams.loading import write_maps
from vllm_balance.seams.online import WorkerRanks

LAYERS, EXPERTS, TOP_K, HIDDEN, STEPS = 3, 8, 2, 6, 60
EAGER = {"window": 10, "horizon": 10**9, "hysteresis": 0.0}
CASES = {
    "turning": {"settings": EAGER, "busy": ([0, 1, 2], [5, 6, 7]), "slowness": (1.0, 1.0)},
    "slow": {"settings": EAGER, "busy": ([0, 1, 2, 4, 5, 6],) * 2, "slowness": (1.0, 1.5)},
    "still": {"settings": {"window": 10}, "busy": ([], []), "slowness": (1.0, 1.0)},
}
"""Settings of `online`, the busy experts in the first and second half of the run, and the time of
each rank over what its curve says."""


class Group:
    """What vLLM's GroupCoordinator is to the code under test: the whole gloo group."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank_in_group, self.world_size, self.ranks = rank, size, list(range(size))
        self.cpu_group = self.device_group = dist.group.WORLD

    def barrier(self) -> None:
        dist.barrier()


def eplb_state(group: Group, weights_LEH: torch.Tensor) -> SimpleNamespace:
    """vLLM's EplbModelState with every expert at its linear place; its communicator is real."""
    slots = EXPERTS // group.world_size
    first = group.rank_in_group * slots
    weights = [[weights_EH[first : first + slots].clone()] for weights_EH in weights_LEH]
    buffer = [torch.empty_like(weight) for weight in weights[0]]
    state = SimpleNamespace(
        physical_to_logical_map=torch.zeros((LAYERS, EXPERTS), dtype=torch.int64),
        logical_to_physical_map=torch.zeros((LAYERS, EXPERTS, 4), dtype=torch.int64),
        logical_replica_count=torch.zeros((LAYERS, EXPERTS), dtype=torch.int64),
        model=SimpleNamespace(expert_weights=weights, num_logical_experts=EXPERTS),
        expert_buffer=buffer,
        communicator=create_eplb_communicator(group, "torch_nccl", weights, buffer),
    )
    for row in range(LAYERS):
        write_maps(state, row, np.arange(EXPERTS, dtype=np.int32), EXPERTS)
    return state


def layer_of(row: int, state: SimpleNamespace, group: Group) -> LayerBalancer:
    slots = EXPERTS // group.world_size
    expert_map_P = torch.full((EXPERTS,), -1)
    first = group.rank_in_group * slots
    expert_map_P[first : first + slots] = torch.arange(slots)
    return LayerBalancer(
        layer_name=f"layers.{row}",
        policy=ROUTING["gem"](),
        tables=LayerTables(
            logical_to_physical_ER=state.logical_to_physical_map[row],
            num_replicas_E=state.logical_replica_count[row],
            num_ranks=group.world_size,
            num_physical=EXPERTS,
            load_P=None,
            record_enabled=None,
            counters=new_counters(group.world_size, torch.device("cpu")),
        ),
        way="replicated",
        rank=group.rank_in_group,
        all_reduce=lambda tensor: tensor,
        experts=LocalPairExperts(expert_map_P),
    )


def expert(rows_NH: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor:
    return torch.tanh(rows_NH * weight_H)


def output(layer: LayerBalancer, weight_PH: torch.Tensor, batch) -> torch.Tensor:
    """This layer's output over all ranks: routed, computed from the weights held here, summed."""
    rows_TH, ids_TK, weights_TK = batch

    def kernel(out, inputs, weight_N1, local_N1) -> None:
        out.copy_(expert(inputs, weight_PH[local_N1.flatten().long()]) * weight_N1)

    out_TH = torch.full_like(rows_TH, torch.nan)
    layer.experts(out_TH, rows_TH, weights_TK, layer.in_router(ids_TK, None), kernel)
    dist.all_reduce(out_TH)
    return out_TH


def dense(weights_EH: torch.Tensor, batch) -> torch.Tensor:
    rows_TH, ids_TK, weights_TK = batch
    return (expert(rows_TH[:, None], weights_EH[ids_TK]) * weights_TK[..., None]).sum(1)


def batch_of(step: int, busy: tuple[list[int], list[int]]):
    """Tokens that ask mostly for the busy experts of this half of the run."""
    random = np.random.default_rng(step)
    share_E = np.full(EXPERTS, 0.2)
    share_E[busy[2 * step // STEPS]] = 3.0
    ids = [random.choice(EXPERTS, TOP_K, replace=False, p=share_E / share_E.sum()) for _ in "x" * 9]
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randn((9, HIDDEN), generator=generator),
        torch.tensor(np.array(ids)),
        torch.rand((9, TOP_K), generator=generator),
    )


def pretend_to_take(cost: CostModel, layers, load_LP, clock_us_L, group: Group) -> None:
    """Puts the modelled time on the clock of every layer: real times would decide by chance."""
    slots = EXPERTS // group.world_size
    first = group.rank_in_group * slots
    for row, load_P in enumerate(load_LP.numpy()):
        clock_us_L[row] += cost.of_experts(load_P[first : first + slots])
        layers[row].experts.kernel_ns = int(1e3 * clock_us_L[row])


def run(group: Group, *, settings: dict, busy: tuple, slowness: tuple[float, ...]) -> dict:
    weights_LEH = torch.randn((LAYERS, EXPERTS, HIDDEN), generator=torch.Generator().manual_seed(1))
    state = eplb_state(group, weights_LEH)
    layers = [layer_of(row, state, group) for row in range(LAYERS)]
    load_LP = torch.zeros((LAYERS, EXPERTS), dtype=torch.int32)
    for layer, load_P in zip(layers, load_LP, strict=True):
        record_load_into(layer, load_P)
    with patch("vllm.distributed.get_ep_group", lambda: group):
        ranks = WorkerRanks(state)
    before = [weight[0].clone() for weight in state.model.expert_weights]
    swap_us = ranks.swap_us()
    assert swap_us > 0
    for weight, kept in zip(state.model.expert_weights, before, strict=True):
        assert torch.equal(weight[0], kept), "the probe changed the weights"
    cost = CostModel(a_us=1.0, b_us=1.0, c_us=0.0, beta_us=1.0)
    online = OnlinePlacement(
        settings=OnlineSettings(interval=10, **settings),
        costs=[cost] * group.world_size,
        layers=layers,
        load_LP=load_LP,
        placement_LP=ranks.placement_LP,
        ranks=ranks,
        swap_us=swap_us,
    )
    slots = EXPERTS // group.world_size
    shown = cost.slowed(slowness[group.rank_in_group])
    placements, pairs_NS, clock_us_L = [], [], [0.0] * LAYERS
    for step in range(STEPS):
        batch = batch_of(step, busy)
        for row, layer in enumerate(layers):
            held_PH = state.model.expert_weights[row][0]
            expected = dense(weights_LEH[row], batch)
            torch.testing.assert_close(output(layer, held_PH, batch), expected)
        pairs_NS.append(load_LP.reshape(LAYERS, group.world_size, -1).sum((0, 2)).tolist())
        pretend_to_take(shown, layers, load_LP, clock_us_L, group)
        online.after_step()
        placements.append(online.placement_LP.tolist())
        first = group.rank_in_group * slots
        for row, slots_P in enumerate(online.placement_LP):
            own = torch.from_numpy(slots_P[first : first + slots].astype(np.int64))
            assert torch.equal(state.model.expert_weights[row][0], weights_LEH[row][own])
    status = online.status()
    shared = ("steps", "decisions", "moves", "swaps", "slowdown_per_rank", "drift", "recent")
    found = {"placements": placements, "pairs_NS": pairs_NS}
    return found | {key: status[key] for key in shared}


def main() -> None:
    size, rank, init, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{init}",
        world_size=size,
        rank=rank,
        timeout=timedelta(seconds=600),
    )
    group = Group(rank, size)
    found = {name: run(group, **case) for name, case in CASES.items()}
    with open(out, "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
