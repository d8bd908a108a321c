"""A layer with dynamic slots: what it decides, counts and reports, and that it keeps nothing."""

import gc

import numpy as np
import psutil
import pytest
import torch

from vllm_balance.balancer import WorkerBalancer, new_counters, warm_up
from vllm_balance.experts.dynamic_slots import LayerSlots
from vllm_balance.experts.host_store import ExpertLayout, HostStore, Machine
from vllm_balance.experts.local_pairs import LocalPairExperts
from vllm_balance.experts.look_ahead import LookAhead
from vllm_balance.experts.prefetch import SyncPrefetch, ThreadPrefetch
from vllm_balance.kernels.rebalance import Rules
from vllm_balance.routing import FETCHING, LayerTables
from vllm_balance.slot_balancer import SlotBalancer
from vllm_balance.types import DynamicSlots

E, S, D, K, HIDDEN = 16, 2, 2, 2, 32
NUM_PHYSICAL = E + S * D


class Nothing:
    """Where copies go when only decisions are looked at."""

    def __call__(self, copy) -> None:
        assert copy.slot >= E // S


def layer(prefetch=None, policy="harmoeny", rank=0, **changes) -> SlotBalancer:
    tables = LayerTables(
        logical_to_physical_ER=torch.arange(E)[:, None],
        num_replicas_E=torch.ones(E, dtype=torch.int64),
        num_ranks=S,
        num_physical=NUM_PHYSICAL,
        load_P=torch.zeros(NUM_PHYSICAL, dtype=torch.int32),
        record_enabled=torch.tensor(True),
        counters=new_counters(S, torch.device("cpu")),
    )
    state = DynamicSlots.empty(num_logical=E, num_ranks=S, num_dynamic=D)
    dynamic = LayerSlots(
        layer=0,
        rank=rank,
        state=state,
        prefetch=prefetch or SyncPrefetch(Nothing()),
        expert_bytes=100,
    )
    settings = {
        "layer_name": "layer",
        "policy": FETCHING[policy](Rules(threshold_tokens=4, knee_tokens=2.0)),
        "tables": tables,
        "way": "replicated",
        "rank": rank,
        "all_reduce": lambda tensor: tensor,
        "dynamic": dynamic,
    }
    return SlotBalancer(**(settings | changes))


def hot(expert: int, num_tokens: int = 200, seed: int = 0) -> torch.Tensor:
    """Every token uses one expert and another, drawn evenly."""
    generator = torch.Generator().manual_seed(seed)
    other = (expert + torch.randint(1, E, (num_tokens, 1), generator=generator)) % E
    return torch.cat([torch.full((num_tokens, 1), expert), other], dim=1)


@pytest.mark.parametrize("policy", FETCHING)
def test_a_hot_expert_is_split_over_the_ranks(policy):
    balancer = layer(policy=policy)
    slots_TK = balancer.in_router(hot(3), None)
    per_rank = torch.bincount(slots_TK[:, 0] // (NUM_PHYSICAL // S), minlength=S)
    assert per_rank.min() > 60, "one rank computes nearly all of the hot expert"
    status = balancer.status()
    assert status["compute_bound_batches"] == 1 and status["fetched_schedules"] == 1
    assert status["max_tokens_sum"] < 260


def test_padding_rows_of_a_graph_count_nowhere():
    balancer = layer()
    ids_TK = torch.cat([hot(3, 50), torch.full((70, 2), 9)])
    slots_TK = balancer.in_router(ids_TK, torch.tensor([50], dtype=torch.int32))
    assert slots_TK.shape == ids_TK.shape and balancer.status()["pairs"] == 100


def test_reasons_for_stepping_aside_are_counted():
    balancer = layer()
    even_TK = torch.arange(E * 20).view(-1, 2) % E
    balancer.in_router(even_TK, None)
    balancer.in_router(hot(3)[:1], None)
    balancer.in_router(hot(3)[:0], None)
    balancer.in_router(hot(3), None)
    worker = WorkerBalancer(balancer="harmoeny", rank=0, layers=[balancer])
    assert worker.status()["stepped_aside"] == {
        "home ranks even enough": 1,
        "no move worth a fetch": 0,
        "memory-bound batch, one replica per expert": 1,
        "no tokens": 1,
    }
    assert "recent_experts_us" in worker.status(per_layer=True)["layers"][0]
    worker.reset()
    status = worker.status()
    assert not any(status["stepped_aside"].values()) and status["hits"] == 0
    assert (balancer.dynamic.state.content_SD >= 0).any(), "a reset empties no slot"


def test_warming_up_fetches_and_counts_nothing():
    balancer = layer()
    warm_up(balancer)
    assert not balancer.tables.counters.any() and balancer.decisions == 0
    assert (balancer.dynamic.state.content_SD < 0).all()


def test_a_guess_lets_the_next_layer_fetch_early():
    following = layer(rank=1)
    gate = torch.zeros(HIDDEN, E)
    gate[:, 3], gate[:, 5] = 2.0, 1.0
    ahead = LookAhead(
        gate=lambda rows: rows @ gate,
        top_k=K,
        num_experts=E,
        rank=0,
        num_ranks=1,
        all_reduce=lambda tensor: tensor,
        min_pairs=2.0 * E,
    )
    first = layer(rank=1, look_ahead=ahead, following=following)
    first.before_experts(torch.ones(300, HIDDEN))
    status = following.status()
    assert status["early_fetches"] > 0 and status["fetches"] == 0 and status["decisions"] == 0
    following.in_router(hot(3), None)
    status = following.status()
    assert status["early_hits"] > 0 and status["fetches"] == 0
    assert first.status()["look_ahead_us"] > 0
    first.before_experts(torch.ones(2, HIDDEN))
    assert following.status()["early_fetches"] == status["early_fetches"]
    layer().before_experts(torch.ones(300, HIDDEN))


def test_memory_does_not_grow_over_2000_batches():
    """A rank with real copies and experts, skew that changes in every batch."""
    tensors = [torch.randn(E // S + D, HIDDEN, 64), torch.randn(E // S + D, 64, HIDDEN)]
    store = HostStore.shared(
        ExpertLayout.of(tensors),
        num_layers=1,
        num_experts=E,
        machine=Machine(rank=0, share=lambda mine: [mine]),
    )
    for expert in range(E):
        store.write(0, expert, expert % (E // S), tensors)

    def copy(each) -> None:
        store.read(each.layer, each.expert, each.slot, tensors)

    prefetch = ThreadPrefetch(copy)
    balancer = layer(prefetch)
    per_rank = NUM_PHYSICAL // S
    map_P = torch.cat([torch.arange(per_rank), torch.full((per_rank,), -1)]).int()
    experts = LocalPairExperts(map_P)
    experts.arrivals = balancer.dynamic

    def kernel(out, rows, weights, ids) -> None:
        out.copy_(rows * weights * tensors[0][ids.flatten().long(), :, 0])

    rng = np.random.default_rng(0)
    process, output = psutil.Process(), torch.empty(64, HIDDEN)
    hidden, weights = torch.randn(64, HIDDEN), torch.ones(64, K)
    sizes = []
    for batch in range(2000):
        slots_TK = balancer.in_router(hot(int(rng.integers(E)), 64, seed=batch % 50), None)
        experts(output, hidden, weights, slots_TK, kernel)
        if batch in (500, 1999):
            gc.collect()
            sizes.append((process.memory_info().rss, len(gc.get_objects())))
    prefetch.close()
    assert balancer.status()["fetches"] > 200 and balancer.status()["evictions"] > 200
    assert sizes[1][0] - sizes[0][0] < 8 * 2**20
    assert sizes[1][1] - sizes[0][1] < 1000
