"""One rank of a gloo group whose layer has dynamic slots; started by test_slot_ranks.py.

    python gloo.py slot_ranks.py WORLD_SIZE FOLDER

Weights are real rows, filled from a store that the ranks share, so that a slot with the wrong
expert, or with half of one, gives wrong tokens. Every batch is compared with the dense layer.
"""

import copy
import json
import sys
import time
from functools import partial
from pathlib import Path

import cases
import numpy as np
import ranks
import torch
import torch.distributed as dist

from vllm_balance.balancer import new_counters
from vllm_balance.experts.dynamic_slots import LayerSlots
from vllm_balance.experts.host_store import ExpertLayout, HostStore, Machine
from vllm_balance.experts.local_pairs import LocalPairExperts
from vllm_balance.experts.look_ahead import LookAhead
from vllm_balance.experts.mapped_experts import as_they_arrive
from vllm_balance.experts.prefetch import Copy, Prefetch, RunCopy, SyncPrefetch, ThreadPrefetch
from vllm_balance.kernels.rebalance import Rules
from vllm_balance.routing import FETCHING, LayerTables
from vllm_balance.slot_balancer import SlotBalancer
from vllm_balance.types import DynamicSlots

WAYS = ("replicated", "after_gather", "all_reduce")
NUM_EXPERTS, TOP_K, HIDDEN, NUM_DYNAMIC = 12, 3, 6, 2
INNER = 5
BATCHES = 10
COPIES = {2: ("async", "slow", "sync", "slow, mapped"), 4: ("async", "slow")}
"""How copies run, by the number of ranks. Synchronous ones are no other in a larger group, nor is a
kernel that takes an expert map."""
KINDS = ("memory_bound_batches", "compute_bound_batches", "empty_batches")


class Layer:
    """The rows of one rank: home experts, then slots full of NaN until something is fetched."""

    def __init__(self, index: int, rank: int, world_size: int) -> None:
        generator = torch.Generator().manual_seed(index)
        options = {"generator": generator, "dtype": torch.float64}
        self.w1_EHI = torch.randn(NUM_EXPERTS, HIDDEN, INNER, **options)
        self.w2_EIH = torch.randn(NUM_EXPERTS, INNER, HIDDEN, **options)
        num_home = NUM_EXPERTS // world_size
        home = slice(rank * num_home, (rank + 1) * num_home)
        self.tensors = []
        for whole in (self.w1_EHI, self.w2_EIH):
            empty = whole.new_full((NUM_DYNAMIC, *whole.shape[1:]), torch.nan)
            self.tensors.append(torch.cat([whole[home], empty]))

    def kernel(self, out, rows, weights, ids) -> None:
        out.fill_(torch.nan)
        w1, w2 = self.tensors
        for row, local in enumerate(ids.flatten().tolist()):
            out[row] = torch.tanh(rows[row] @ w1[local]) @ w2[local] * weights[row].double()

    def mapped(self, out_GH, rows_GH, weights_GK, ids_GK, expert_map_P) -> torch.Tensor:
        """As a GPU's kernel: skips what the map does not have, and reuses its output's memory."""
        out_GH.zero_()
        local_GK = torch.where(ids_GK >= 0, expert_map_P[ids_GK], -1)
        token_N, choice_N = (local_GK >= 0).nonzero(as_tuple=True)
        rows_NH = torch.empty(len(token_N), HIDDEN, dtype=torch.float64)
        where = (token_N, choice_N)
        self.kernel(rows_NH, rows_GH[token_N], weights_GK[where], local_GK[where])
        return out_GH.index_add_(0, token_N, rows_NH)

    def dense(self, ids_GK, weights_GK, hidden_GH) -> torch.Tensor:
        output_GH = torch.zeros_like(hidden_GH)
        for expert in range(NUM_EXPERTS):
            rows_GH = torch.tanh(hidden_GH @ self.w1_EHI[expert]) @ self.w2_EIH[expert]
            share_G = ((ids_GK == expert) * weights_GK.double()).sum(1)
            output_GH += rows_GH * share_G[:, None]
        return output_GH


class Model:
    """Two layers on this rank with their store, copies and balancers."""

    def __init__(self, policy, way, copies, rank, world_size, link) -> None:
        self.way, self.rank, self.link = way, rank, link
        self.layers = [Layer(index, rank, world_size) for index in range(2)]
        machine = Machine(rank=rank, share=lambda mine: share(mine, world_size))
        layout = ExpertLayout.of(self.layers[0].tensors)
        self.store = HostStore.shared(
            layout, num_layers=2, num_experts=NUM_EXPERTS, machine=machine
        )
        num_home = NUM_EXPERTS // world_size
        for index, layer in enumerate(self.layers):
            for slot in range(num_home):
                self.store.write(index, rank * num_home + slot, slot, layer.tensors)
        machine.share(None)
        self.random = np.random.default_rng(rank)
        run = self.copy_slowly if copies.startswith("slow") else self.copy
        self.prefetch = self.running(run, copies)
        self.expert_map_P = self.expert_map(world_size)
        self.balancers = [self.balancer(i, policy, world_size) for i in range(2)]
        if copies.endswith("mapped"):
            for balancer in self.balancers:
                balancer.experts = None
        first = self.balancers[0]
        first.following = self.balancers[1]
        first.look_ahead = LookAhead(
            gate=gate,
            top_k=TOP_K,
            num_experts=NUM_EXPERTS,
            rank=rank,
            num_ranks=world_size,
            all_reduce=first.summed,
            knee_tokens=1.0,
        )

    def running(self, run: RunCopy, copies: str) -> Prefetch:
        return SyncPrefetch(run) if copies == "sync" else ThreadPrefetch(run)

    def copy(self, copy: Copy) -> None:
        self.store.read(copy.layer, copy.expert, copy.slot, self.layers[copy.layer].tensors)

    def copy_slowly(self, copy: Copy) -> None:
        """The slot is broken for a while, as memory is in the middle of a copy."""
        for tensor in self.layers[copy.layer].tensors:
            tensor[copy.slot] = torch.nan
        time.sleep(self.random.choice([0.0, 0.003, 0.01]))
        self.copy(copy)

    def expert_map(self, world_size: int) -> torch.Tensor:
        """The local id of each slot, -1 for those of other ranks, int32 [P]."""
        num_physical = NUM_EXPERTS + world_size * NUM_DYNAMIC
        per_rank = num_physical // world_size
        expert_map_P = torch.full((num_physical,), -1, dtype=torch.int32)
        own = slice(self.rank * per_rank, (self.rank + 1) * per_rank)
        expert_map_P[own] = torch.arange(per_rank, dtype=torch.int32)
        return expert_map_P

    def balancer(self, index: int, policy: str, world_size: int) -> SlotBalancer:
        dynamic = LayerSlots(
            layer=index,
            rank=self.rank,
            state=DynamicSlots.empty(
                num_logical=NUM_EXPERTS, num_ranks=world_size, num_dynamic=NUM_DYNAMIC
            ),
            prefetch=self.prefetch,
            expert_bytes=self.store.layout.expert_bytes,
        )
        experts = LocalPairExperts(self.expert_map_P)
        tables = LayerTables(
            logical_to_physical_ER=torch.arange(NUM_EXPERTS)[:, None],
            num_replicas_E=torch.ones(NUM_EXPERTS, dtype=torch.int64),
            num_ranks=world_size,
            num_physical=len(self.expert_map_P),
            load_P=torch.zeros(len(self.expert_map_P), dtype=torch.int32),
            record_enabled=torch.tensor(True),
            counters=new_counters(world_size, torch.device("cpu")),
        )
        made = SlotBalancer(
            layer_name=f"layer {index}",
            policy=FETCHING[policy](Rules(threshold_tokens=2, fetch_tokens=2, knee_tokens=1.0)),
            tables=tables,
            way=self.way,
            rank=self.rank,
            all_reduce=self.link.all_reduce,
            experts=experts,
            dynamic=dynamic,
            experts_wait=True,
        )
        experts.arrivals = dynamic
        return made

    def run(self, index: int, batches, where: str) -> list[list[int]]:
        """One batch through one layer as the seams do; compares with the dense layer."""
        balancer, layer, link = self.balancers[index], self.layers[index], self.link
        mine = batches.rows(self.rank)
        if self.way == "replicated":
            hidden, chosen = batches.hidden_GH, (batches.weights_GK, batches.ids_GK.clone())
            differs = link.world_size > 2
            own = ranks.near_ties(*chosen, self.rank) if differs else chosen
            weights, ids_GK = balancer.of_first_rank(*own)
            slots_GK = balancer.after_gather(balancer.in_router(ids_GK, None))
            balancer.before_experts(hidden)
        else:
            ids_TK = balancer.in_router(batches.ids_GK[mine].clone(), None)
            balancer.before_experts(batches.hidden_GH[mine], batches.sizes)
            parts = [batches.hidden_GH[mine], batches.weights_GK[mine], ids_TK]
            hidden, weights, ids_GK = link.all_gatherv(parts, sizes=batches.sizes)
            slots_GK = balancer.after_gather(ids_GK, batches.sizes)
        part = torch.full_like(hidden, torch.nan)
        if balancer.experts is None:
            kernel = partial(layer.mapped, part, hidden, weights, slots_GK)
            part = as_they_arrive(balancer.dynamic, self.expert_map_P, kernel)
        else:
            balancer.experts(part, hidden, weights, slots_GK, layer.kernel)
        expected = layer.dense(batches.ids_GK, batches.weights_GK, batches.hidden_GH)
        if self.way == "replicated":
            output = link.all_reduce(part)
        else:
            output = link.reduce_scatterv(part, dim=0, sizes=batches.sizes)
            expected = expected[mine]
        assert torch.allclose(output, expected, rtol=1e-12, atol=1e-12), where
        return slots_GK.tolist()


def share(mine, world_size: int) -> list:
    found = [None] * world_size
    dist.all_gather_object(found, mine)
    return found


def gate(rows_NH: torch.Tensor) -> torch.Tensor:
    """The router of the second layer: logits [N, E] of hidden states."""
    generator = torch.Generator().manual_seed(7)
    return rows_NH @ torch.randn(HIDDEN, NUM_EXPERTS, generator=generator, dtype=torch.float64)


def of_the_gate(batches: ranks.Batches, rng: np.random.Generator | None) -> ranks.Batches:
    """The same tokens in the second layer, where its router decides; with `rng` something else,
    which nobody could guess from the first layer's inputs."""
    found = copy.copy(batches)
    found.ids_GK = gate(batches.hidden_GH).topk(TOP_K, dim=1).indices
    if rng is not None:
        shift = int(rng.integers(1, NUM_EXPERTS))
        found.ids_GK = (found.ids_GK + shift) % NUM_EXPERTS
    return found


def sequence(world_size: int) -> list[tuple[ranks.Batches, ranks.Batches]]:
    """Batches in the two layers, whose hot experts change, so that two slots are never enough for
    long. The second layer's are what its router says of the first one's inputs, but in every third
    batch, of which look-ahead guesses wrong.

    The last but one has no tokens on any rank, the last as many for every expert of both layers.
    """
    rng = np.random.default_rng(world_size)
    found = []
    for number in range(BATCHES):
        kind = number % 5
        sizes = [[20] * world_size, [3 * r + 1 for r in range(world_size)]][number % 2]
        weights_E = np.full(NUM_EXPERTS, 0.02)
        if kind < 3:
            weights_E[rng.permutation(NUM_EXPERTS)[: 1 + 2 * (number % 2)]] = 10.0
        if kind == 3:
            sizes = [1] + [0] * (world_size - 1)
        ids = [cases.draw_topk(size, TOP_K, weights_E, rng) for size in sizes]
        if kind == 4:
            ids[0][:] = -1
            ids[-1] = np.full_like(ids[-1], number)
        batches = ranks.Batches(f"batch {number}", ids, None)
        num_home = NUM_EXPERTS // world_size
        hot = rng.integers(world_size) * num_home + rng.permutation(num_home)[:3]
        batches.hidden_GH += gate(torch.eye(HIDDEN).double())[:, hot].sum(1)
        found.append((batches, of_the_gate(batches, rng if number % 3 == 2 else None)))
    nothing = np.empty((0, TOP_K), np.int32)
    even = np.arange(20 * TOP_K, dtype=np.int32).reshape(20, TOP_K) % NUM_EXPERTS
    for name, ids in (("no tokens", nothing), ("even", even)):
        found.append((ranks.Batches(name, [ids] * world_size, None),) * 2)
    return found


def main() -> None:
    world_size, rank = int(sys.argv[1]), int(sys.argv[2])
    ranks.join(world_size, rank, sys.argv[3])
    findings = {}
    for policy in FETCHING:
        for way in WAYS:
            for copies in COPIES[world_size]:
                link = ranks.Communicator(rank, world_size)
                model = Model(policy, way, copies, rank, world_size, link)
                slots = []
                for of_layer in sequence(world_size):
                    for index, batches in enumerate(of_layer):
                        where = f"{policy}, {way}, {copies}, {batches.name}, layer {index}"
                        slots.append(model.run(index, batches, where))
                model.prefetch.close()
                status = [balancer.status() for balancer in model.balancers]
                findings[f"{policy} | {way} | {copies}"] = {
                    "slots": slots,
                    "content": [b.dynamic.state.content_SD.tolist() for b in model.balancers],
                    "batches": [[layer[name] for name in KINDS] for layer in status],
                    "balanced": sum(layer["balanced_schedules"] for layer in status),
                    "collectives": link.calls,
                    "fetches": sum(layer["fetches"] for layer in status),
                    "early_fetches": sum(layer["early_fetches"] for layer in status),
                    "early_hits": sum(layer["early_hits"] for layer in status),
                    "evictions": sum(layer["evictions"] for layer in status),
                    "wasted_bytes": sum(layer["wasted_bytes"] for layer in status),
                }
    Path(sys.argv[4]).write_text(json.dumps(findings))
    dist.barrier()
    dist.destroy_process_group()
