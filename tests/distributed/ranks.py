"""One rank of a gloo group that runs many cases; started by test_ranks.py, prints its findings.

    python gloo.py ranks.py WORLD_SIZE FOLDER

Every assertion that needs one rank only is made here; what ranks must agree on is written to a
file in FOLDER for the test to compare.
"""

import json
import math
import sys
import zlib
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import cases
import numpy as np
import torch
import torch.distributed as dist

from vllm_balance.balancer import LayerBalancer, new_counters
from vllm_balance.experts.local_pairs import LocalPairExperts
from vllm_balance.kernels.assign import assign
from vllm_balance.routing import ROUTING, LayerTables
from vllm_balance.routing.metro import MetroRouting
from vllm_balance.seams.cpu import _all_gatherv, _reduce_scatterv
from vllm_balance.types import Placement

WAYS = ("replicated", "after_gather", "all_reduce")
POLICIES = {
    "static": ROUTING["static"],
    "eplb": ROUTING["eplb"],
    "first_copy": ROUTING["first_copy"],
    "metro": lambda: MetroRouting(math.inf),
    "metro_even": lambda: MetroRouting(0.0),
    "metro_knee": lambda: MetroRouting(2.0),
    "metro_turns": lambda: MetroRouting(4.0, 2.0),
    "gem": ROUTING["gem"],
    "exflow": ROUTING["exflow"],
}
"""metro_turns is what CPU servers use."""
ONE_COPY = ("static", "exflow")
"""Served without redundant experts."""
BY_INDEX = ("eplb", "gem")
"""Where there are replicas, vLLM's hash of a token's index in the batch decides, no plan."""
NUM_EXPERTS, TOP_K, HIDDEN, INNER = 10, 3, 6, 5


class Batches:
    """Tokens of all ranks, known to every rank, so that each can compute the truth."""

    def __init__(self, name: str, ids_of_rank: list[np.ndarray], placement: Placement) -> None:
        self.name, self.placement = name, placement
        self.sizes = [len(ids) for ids in ids_of_rank]
        self.ids_of_rank = [torch.from_numpy(ids).long() for ids in ids_of_rank]
        self.ids_GK = torch.cat(self.ids_of_rank)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        shape = (len(self.ids_GK), HIDDEN)
        self.hidden_GH = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.weights_GK = torch.rand(self.ids_GK.shape, generator=generator)

    def rows(self, rank: int) -> slice:
        first = sum(self.sizes[:rank])
        return slice(first, first + self.sizes[rank])


class Communicator:
    """What the seams find in vLLM's CpuCommunicator, on the whole gloo group."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank_in_group, self.world_size = rank, world_size
        self.calls = 0

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        assert dim == 0
        gathered = tensor.new_empty((self.world_size * len(tensor), *tensor.shape[1:]))
        dist.all_gather_into_tensor(gathered, tensor)
        return gathered

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        dist.all_reduce(tensor)
        return tensor

    all_gatherv = _all_gatherv(lambda *_: None)
    reduce_scatterv = _reduce_scatterv(lambda *_: None)


class Layer:
    """Experts of one MoE layer; rank s holds those in its slots, `dense` knows them all."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        options = {"generator": generator, "dtype": torch.float64}
        self.w1_EHI = torch.randn(NUM_EXPERTS, HIDDEN, INNER, **options)
        self.w2_EIH = torch.randn(NUM_EXPERTS, INNER, HIDDEN, **options)

    def expert(self, rows_NH: torch.Tensor, expert: int) -> torch.Tensor:
        return torch.tanh(rows_NH @ self.w1_EHI[expert]) @ self.w2_EIH[expert]

    def dense(self, batches: Batches) -> torch.Tensor:
        output_GH = torch.zeros_like(batches.hidden_GH)
        for expert in range(NUM_EXPERTS):
            all_rows_GH = self.expert(batches.hidden_GH, expert)
            share_G = ((batches.ids_GK == expert) * batches.weights_GK.double()).sum(1)
            output_GH += all_rows_GH * share_G[:, None]
        return output_GH

    def kernel_of(self, placement: Placement, rank: int):
        """The kernel of one rank: local ids only, every other id is out of range."""
        first = rank * placement.slots_per_rank
        held = placement.physical_to_logical_P[first : first + placement.slots_per_rank].tolist()

        def kernel(out, rows, weights, ids) -> None:
            out.fill_(torch.nan)
            for row, local in enumerate(ids.flatten().tolist()):
                out[row] = self.expert(rows[row], held[local]) * weights[row].double()

        return kernel


def random_ids(sizes: list[int], seed: int, skew: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    weights_E = cases.popularity(NUM_EXPERTS, skew, rng)
    return [cases.draw_topk(size, TOP_K, weights_E, rng) for size in sizes]


def every_case(world_size: int) -> list[Batches]:
    """Odd sizes and odd placements; the same list on every rank."""
    rng = np.random.default_rng(world_size)
    slots = 2 * world_size * -(-NUM_EXPERTS // world_size)
    spread = cases.place(np.full(NUM_EXPERTS, 0.1), slots, world_size, rng)
    # Experts 0 to 2 have all their extra replicas on the rank of slot 0, next to each other.
    crowded_P = [e % 3 for e in range(slots // world_size)]
    crowded_P += [e % NUM_EXPERTS for e in range(slots - len(crowded_P))]
    crowded = Placement.from_physical_to_logical(
        torch.tensor(crowded_P), num_logical=NUM_EXPERTS, num_ranks=world_size
    )
    last_only = [0] * (world_size - 1) + [5]
    unequal = [7 * rank + 1 for rank in range(world_size)]
    one_token = [1] + [0] * (world_size - 1)
    to_one = [np.full_like(ids, 4) for ids in random_ids(unequal, 3)]
    padded = random_ids([6] * world_size, 4)
    for rank, ids in enumerate(padded):
        ids[rank + 2 :] = -1
    idle = random_ids([4] * world_size, 5)
    idle[0][:] = -1
    found = []
    for where, placement in (("spread", spread), ("crowded", crowded)):
        for name, ids in {
            "no tokens": random_ids([0] * world_size, 0),
            "one token": random_ids(one_token, 1),
            "tokens on the last rank only": random_ids(last_only, 2),
            "unequal ranks": random_ids(unequal, 6),
            "all tokens to one expert": to_one,
            "padding rows": padded,
            "first rank idle": idle,
            "many tokens": random_ids([40] * world_size, 7, skew=2.0),
        }.items():
            found.append(Batches(f"{name}, {where}", ids, placement))
    return found


def without_redundancy(batches: Batches, world_size: int) -> Batches:
    """The same tokens on one copy per expert; experts that make the ranks even get none."""
    num_experts = NUM_EXPERTS + -NUM_EXPERTS % world_size
    placement = Placement.from_physical_to_logical(
        torch.arange(num_experts).flip(0), num_logical=num_experts, num_ranks=world_size
    )
    return Batches(batches.name, [ids.numpy() for ids in batches.ids_of_rank], placement)


def near_ties(
    weights_TK: torch.Tensor, ids_TK: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a rank's rounding makes of a router's choice: all but the first have other experts here
    and there, and the same ones in another order.

    So it is with three or more tensor-parallel ranks on CPU.
    """
    own_TK, own_weights_TK = ids_TK.clone(), weights_TK.clone()
    if rank > 0:
        last_N = own_TK[::3, -1]
        own_TK[::3, -1] = torch.where(last_N < 0, last_N, (last_N + rank) % NUM_EXPERTS)
        own_TK[1::3], own_weights_TK[1::3] = own_TK[1::3].flip(1), own_weights_TK[1::3].flip(1)
    return own_weights_TK, own_TK


def tables_of(placement: Placement) -> LayerTables:
    wide_ER = torch.full((placement.num_logical, 64), -1, dtype=torch.int64)
    table_ER = placement.logical_to_physical_ER
    wide_ER[:, : table_ER.shape[1]] = table_ER
    return LayerTables(
        logical_to_physical_ER=wide_ER,
        num_replicas_E=placement.num_replicas_E.long(),
        num_ranks=placement.num_ranks,
        num_physical=placement.num_physical,
        load_P=torch.zeros(placement.num_physical, dtype=torch.int32),
        record_enabled=torch.tensor(True),
        counters=new_counters(placement.num_ranks, torch.device("cpu")),
    )


def run_case(
    policy_name: str, way: str, batches: Batches, layer: Layer, rank: int, world_size: int
) -> dict[str, object]:
    """Runs one batch through one balanced layer as the seams do; returns what ranks compare."""
    placement, link = batches.placement, Communicator(rank, world_size)
    policy = POLICIES[policy_name]()
    exchange = Communicator(rank, world_size)
    balancer = LayerBalancer(
        layer_name="layer",
        policy=policy,
        tables=tables_of(placement),
        way=way,
        rank=rank,
        all_reduce=exchange.all_reduce,
    )
    mine = batches.rows(rank)
    takes_first = way == "replicated" and world_size > 2
    if way == "replicated":
        hidden, chosen = batches.hidden_GH, (batches.weights_GK, batches.ids_GK.clone())
        own = near_ties(*chosen, rank) if takes_first else chosen
        weights, ids_GK = balancer.of_first_rank(*own)
        slots_GK = balancer.after_gather(balancer.in_router(ids_GK, None))
    else:
        ids_TK = balancer.in_router(batches.ids_GK[mine].clone(), None)
        hidden, weights, ids_GK = link.all_gatherv(
            [batches.hidden_GH[mine], batches.weights_GK[mine], ids_TK], sizes=batches.sizes
        )
        assert torch.equal(hidden, batches.hidden_GH)
        slots_GK = balancer.after_gather(ids_GK)

    first = rank * placement.slots_per_rank
    map_P = torch.full((placement.num_physical,), -1, dtype=torch.int32)
    map_P[first : first + placement.slots_per_rank] = torch.arange(placement.slots_per_rank)
    partial = torch.full_like(hidden, torch.nan)
    kernel = layer.kernel_of(placement, rank)
    LocalPairExperts(map_P)(partial, hidden, weights, slots_GK, kernel)

    expected = layer.dense(batches)
    if way == "replicated":
        output = link.all_reduce(partial)
    else:
        output = link.reduce_scatterv(partial, dim=0, sizes=batches.sizes)
        expected = expected[mine]
    where = f"{policy_name}, {way}, {batches.name}"
    assert output.shape == expected.shape, where
    # Weights are float32 in both; sums of at most TOP_K float64 values differ by their rounding.
    assert torch.allclose(output, expected, rtol=1e-12, atol=1e-12), where

    is_expert_GK = batches.ids_GK >= 0
    assert torch.equal(slots_GK >= 0, is_expert_GK), where
    used = slots_GK[is_expert_GK]
    logical = placement.physical_to_logical_P[used].long()
    assert torch.equal(logical, batches.ids_GK[is_expert_GK]), where
    if policy_name not in BY_INDEX:
        check_plan(policy, slots_GK, batches, where)

    sends_counts = way == "all_reduce" and policy.counts_decide
    sent_bytes = 4 * world_size * NUM_EXPERTS if sends_counts else 0
    sent_bytes += 8 * batches.ids_GK.numel() if takes_first else 0
    assert exchange.calls == int(sent_bytes > 0), where
    sees_all = way != "all_reduce" or policy.counts_decide
    pairs = int(is_expert_GK.sum() if sees_all else (batches.ids_GK[mine] >= 0).sum())
    status = balancer.status()
    assert status["decisions"] == 1 and status["pairs"] == pairs, where
    assert status["exchanged_bytes"] == sent_bytes, where
    own_pairs = int((batches.ids_GK[mine] >= 0).sum()) if way == "all_reduce" else pairs
    assert int(balancer.tables.load_P.sum()) == own_pairs, where
    counted = {k: v for k, v in status.items() if not k.endswith("_us")} if sees_all else None
    return {"slots": slots_GK.tolist(), "collectives": exchange.calls, "counted": counted}


def check_plan(policy, slots_GK: torch.Tensor, batches: Batches, where: str) -> None:
    """What all ranks did together is what the policy planned for the global batch."""
    ids = batches.ids_GK[batches.ids_GK >= 0]
    tokens_E = torch.bincount(ids, minlength=batches.placement.num_logical).to(torch.int32)
    split_ER = cases.planned(policy, tokens_E, batches.placement)
    planned_GK = assign(batches.ids_GK, split_ER, batches.placement.logical_to_physical_ER)
    assert torch.equal(slots_GK, planned_GK), where


def gather_and_scatter(rank: int, world_size: int) -> None:
    """The two functions that vLLM's CPU communicator lacks, with unequal and zero sizes.

    Values are small whole numbers, so that sums over ranks are exact in bfloat16 too.
    """
    link = Communicator(rank, world_size)
    for sizes in (
        [0] * world_size,
        [3] * world_size,
        [0] * (world_size - 1) + [1],
        [5] + [0] * (world_size - 1),
        [2 * other + 1 for other in range(world_size)],
    ):
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.int32):
            parts = [
                (torch.arange(size * 2).view(size, 2) % 5 + 5 * other).to(dtype)
                for other, size in enumerate(sizes)
            ]
            whole = torch.cat(parts)
            assert torch.equal(link.all_gatherv(parts[rank], sizes=sizes), whole)
            first, second = link.all_gatherv([parts[rank], parts[rank][:, :1]], 0, sizes)
            assert torch.equal(first, whole) and torch.equal(second, whole[:, :1])
            strided = parts[rank].repeat(1, 2)[:, ::2]
            assert torch.equal(link.all_gatherv(strided, sizes=sizes), whole.repeat(1, 2)[:, ::2])
            start = sum(sizes[:rank])
            summed = link.reduce_scatterv(whole * (rank + 1), dim=0, sizes=sizes)
            factor = world_size * (world_size + 1) // 2
            assert torch.equal(summed, (whole * factor)[start : start + sizes[rank]])
    equal = torch.full((3, 2), float(rank))
    gathered = link.all_gatherv(equal)
    assert gathered[::3, 0].tolist() == list(map(float, range(world_size)))
    assert link.reduce_scatterv(gathered, dim=0).tolist() == [[rank * world_size] * 2] * 3
    for run in (link.all_gatherv, link.reduce_scatterv):
        refuse_dimension(run, equal)


def refuse_dimension(run, tensor: torch.Tensor) -> None:
    try:
        run(tensor, dim=1, sizes=None)
    except ValueError as error:
        assert "dimension 0 only" in str(error)
    else:
        raise AssertionError("a dimension that is not served was accepted")


def join(world_size: int, rank: int, meeting_file: str, timeout_s: float = 600) -> None:
    """Makes the gloo group; a rank may compile kernels for long before it comes to a collective."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting_file}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def main() -> None:
    arguments = SimpleNamespace(
        **dict(zip(("world", "rank", "init", "out"), sys.argv[1:], strict=True))
    )
    rank, world_size = int(arguments.rank), int(arguments.world)
    join(world_size, rank, arguments.init)
    gather_and_scatter(rank, world_size)
    layer, findings = Layer(), {}
    for batches in every_case(world_size):
        for way in WAYS:
            for policy in POLICIES:
                is_single = policy in ONE_COPY
                used = without_redundancy(batches, world_size) if is_single else batches
                key = f"{policy} | {way} | {batches.name}"
                findings[key] = run_case(policy, way, used, layer, rank, world_size)
    Path(arguments.out).write_text(json.dumps(findings))
    dist.barrier()
    dist.destroy_process_group()
