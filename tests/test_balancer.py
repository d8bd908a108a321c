"""The hub: where ids are mapped in each way of exchange, and what the counters say afterwards."""

import math
from dataclasses import replace

import pytest
import torch

from vllm_balance.balancer import LayerBalancer, new_counters, warm_up
from vllm_balance.routing import ROUTING, LayerTables
from vllm_balance.routing.metro import MetroRouting
from vllm_balance.types import Placement
from vllm_balance.worker_balancer import WorkerBalancer

IDS_TK = torch.tensor([[0, 1], [0, 2], [3, 0]])


def balancer(
    way: str = "replicated", policy=None, content=(0, 1, 2, 3, 0, 1), num_ranks=2, **changes
):
    """A layer of four experts on two ranks; experts 0 and 1 have a second copy on rank 1."""
    placement = Placement.from_physical_to_logical(
        torch.tensor(content), num_logical=4, num_ranks=num_ranks
    )
    tables = LayerTables(
        logical_to_physical_ER=placement.logical_to_physical_ER,
        num_replicas_E=placement.num_replicas_E,
        num_ranks=num_ranks,
        num_physical=len(content),
        load_P=torch.zeros(len(content), dtype=torch.int32),
        record_enabled=torch.tensor(True),
        counters=new_counters(num_ranks, torch.device("cpu")),
    )
    settings = {
        "layer_name": "model.layers.0.mlp.experts",
        "policy": policy or MetroRouting(math.inf),
        "tables": tables,
        "way": way,
        "rank": 0,
        "all_reduce": lambda tensor: tensor,
    }
    return LayerBalancer(**(settings | changes))


def policy_of(name: str):
    return MetroRouting(2.0) if name == "metro" else ROUTING[name]()


def logical(layer: LayerBalancer, slots_TK: torch.Tensor) -> torch.Tensor:
    return layer.tables.placement.physical_to_logical_P[slots_TK.long()].long()


def test_replicated_maps_in_the_router():
    layer = balancer("replicated")
    slots_TK = layer.in_router(IDS_TK.clone(), None)
    assert torch.equal(logical(layer, slots_TK), IDS_TK)
    assert layer.after_gather(slots_TK) is slots_TK
    assert layer.status()["decisions"] == 1


def test_after_gather_leaves_the_router_alone():
    layer = balancer("after_gather")
    ids_TK = IDS_TK.clone()
    assert layer.in_router(ids_TK, None) is ids_TK
    assert layer.status()["decisions"] == 0
    assert torch.equal(logical(layer, layer.after_gather(ids_TK)), IDS_TK)
    assert layer.status()["decisions"] == 1


@pytest.mark.parametrize(("name", "calls"), [("metro", 1), ("eplb", 0), ("first_copy", 0)])
def test_all_reduce_sends_only_what_decides(name, calls):
    sent = []

    def all_reduce(tensor):
        sent.append(tensor.clone())
        tensor[1] += torch.tensor([0, 9, 0, 0], dtype=torch.int32)
        return tensor

    policy = MetroRouting(math.inf) if name == "metro" else ROUTING[name]()
    layer = balancer("all_reduce", policy, all_reduce=all_reduce)
    slots_TK = layer.in_router(IDS_TK.clone(), None)
    assert torch.equal(logical(layer, slots_TK), IDS_TK)
    assert layer.after_gather(slots_TK) is slots_TK
    assert len(sent) == calls
    status = layer.status()
    if calls:
        assert sent[0].tolist() == [[3, 1, 1, 1], [0, 0, 0, 0]]
        assert status["exchanged_bytes"] == 4 * 2 * 4
        assert status["pairs"] == 6 + 9
    else:
        assert status["exchanged_bytes"] == 0 and status["pairs"] == 6
    assert int(layer.tables.load_P.sum()) == 6


@pytest.mark.parametrize("way", ["replicated", "after_gather", "all_reduce"])
@pytest.mark.parametrize(("flag", "recorded"), [(True, 6), (None, 6), (False, 0)])
def test_the_load_is_recorded_unless_the_flag_says_no(way, flag, recorded):
    layer = balancer(way)
    enabled = None if flag is None else torch.tensor(flag)
    layer.tables = replace(layer.tables, record_enabled=enabled)
    layer.after_gather(layer.in_router(IDS_TK.clone(), None))
    assert int(layer.tables.load_P.sum()) == recorded and layer.status()["pairs"] == 6


def test_an_idle_rank_takes_part_with_rows_that_count_nowhere():
    sent = []

    def all_reduce(tensor):
        sent.append(tensor.clone())
        return tensor

    layer = balancer("all_reduce", all_reduce=all_reduce)
    idle_TK = torch.full((3, 2), -1)
    assert torch.equal(layer.in_router(idle_TK, None), idle_TK)
    assert len(sent) == 1 and not sent[0].any()
    assert layer.status()["empty_batches"] == 1
    assert not layer.tables.load_P.any()


@pytest.mark.parametrize("way", ["after_gather", "all_reduce"])
@pytest.mark.parametrize("name", sorted(ROUTING))
def test_marked_padding_counts_nowhere(name, way):
    """On GPUs the ids of padding rows come as -2 - id."""
    layer = balancer(way, policy_of(name))
    ids_TK = torch.tensor([[0, 1], [-2, -5], [3, 0]])
    slots_TK = layer.after_gather(layer.in_router(ids_TK, None))
    assert (slots_TK[1] < 0).all()
    assert torch.equal(logical(layer, slots_TK[::2]), ids_TK[::2])
    assert layer.status()["pairs"] == int(layer.tables.load_P.sum()) == 4


@pytest.mark.parametrize(("num_ranks", "alike"), [(3, True), (2, False)])
def test_cpu_ranks_that_round_differently_take_what_the_first_chose(num_ranks, alike):
    """This one has another expert in the second row, and the same ones the other way round in the
    third, as `topk` without sorting may return them."""
    ranks = {"num_ranks": num_ranks, "ranks_are_alike": alike}
    ids_TK, weights_TK = IDS_TK.int(), torch.rand(3, 2) - 0.5
    own_TK, own_weights_TK = ids_TK.clone(), weights_TK * (1 + 1e-6)
    own_TK[1, 1] = 3
    own_TK[2], own_weights_TK[2] = own_TK[2].flip(0), own_weights_TK[2].flip(0)
    sent = []

    def all_reduce(tensor):
        sent.append(tensor.clone())
        return tensor

    first = balancer(all_reduce=all_reduce, **ranks)
    found = first.of_first_rank(weights_TK, ids_TK)
    assert torch.equal(found[0], weights_TK) and torch.equal(found[1], ids_TK)

    def add(tensor):
        assert not tensor.any()
        return tensor.add_(sent[0])

    other = balancer(rank=1, all_reduce=add, **ranks)
    kept = own_TK.clone(), own_weights_TK.clone()
    weights, ids = other.of_first_rank(own_weights_TK, own_TK)
    assert torch.equal(weights, weights_TK) and torch.equal(ids, ids_TK)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert weights.is_contiguous() and ids.is_contiguous()
    assert torch.equal(own_TK, kept[0]) and torch.equal(own_weights_TK, kept[1])
    assert first.exchanged_bytes == other.exchanged_bytes == 8 * IDS_TK.numel()
    assert other.status()["exchange_us"] > 0 and other.status()["decide_us"] > 0
    other.of_first_rank(own_weights_TK[:0], own_TK[:0])
    assert other.exchanged_bytes == 8 * IDS_TK.numel()


def test_two_ranks_round_alike_and_send_nothing():
    layer = balancer(all_reduce=None)
    weights_TK = torch.rand(3, 2)
    assert layer.of_first_rank(weights_TK, IDS_TK) == (weights_TK, IDS_TK)
    layer.in_router(IDS_TK.clone(), None)
    assert layer.status()["exchanged_bytes"] == 0


def test_strided_ids_are_taken():
    layer = balancer()
    wide_TK = torch.cat([IDS_TK, IDS_TK], dim=1)[:, :2]
    assert not wide_TK.is_contiguous()
    assert torch.equal(logical(layer, layer.in_router(wide_TK, None)), IDS_TK)


@pytest.mark.parametrize("name", sorted(ROUTING))
def test_warming_up_counts_nothing(name):
    layer = balancer(policy=policy_of(name))
    warm_up(layer, top_k=2)
    assert not layer.tables.counters.any()
    assert not layer.tables.load_P.any()
    assert layer.status()["decisions"] == 0


def test_warming_up_has_a_load_of_its_own_where_requests_have_one():
    """vLLM's kernel on GPUs takes no batch without one."""
    seen = []

    class Watching(type(policy_of("eplb"))):
        def route(self, topk_ids_TK, tables, num_valid_tokens):
            seen.append(tables.load_P)
            return super().route(topk_ids_TK, tables, num_valid_tokens)

    layer = balancer(policy=Watching())
    warm_up(layer, top_k=2)
    assert len(seen) == 2 and all(load_P.any() for load_P in seen)
    assert not layer.tables.load_P.any()
    layer.tables = replace(layer.tables, load_P=None)
    warm_up(layer, top_k=2)
    assert seen[2:] == [None, None]


def test_warming_up_goes_the_way_that_requests_go():
    sent = []

    def all_reduce(tensor):
        sent.append(tensor.tolist())
        return tensor

    layer = balancer("all_reduce", all_reduce=all_reduce)
    warm_up(layer, top_k=3)
    assert sent == [[[6, 0, 0, 0], [0, 0, 0, 0]]] * 2, "once for each dtype of ids"
    assert not layer.tables.counters.any() and not layer.tables.load_P.any()
    assert layer.exchanged_bytes == layer.exchange_ns == layer.decide_ns == 0


@pytest.mark.parametrize("way", ["replicated", "after_gather", "all_reduce"])
@pytest.mark.parametrize("name", sorted(ROUTING))
def test_every_batch_is_one_decision(name, way):
    layer = balancer(way, policy_of(name))
    batches = (IDS_TK, IDS_TK[:0], torch.full((2, 2), -1), IDS_TK[:1], IDS_TK.repeat(20, 1))
    for number, ids_TK in enumerate(batches, start=1):
        layer.after_gather(layer.in_router(ids_TK.clone(), None))
        assert layer.status()["decisions"] == number


def test_what_a_graph_repeats_on_the_device_is_a_decision_too():
    layer = balancer()
    layer.in_router(IDS_TK.clone(), None)
    layer.policy.route(IDS_TK, layer.tables, None)
    assert layer.status()["decisions"] == 2


def test_serving_starts_with_zeroed_counters_and_nothing_in_the_online_window():
    class Online:
        forgotten = told = 0

        def forget(self) -> None:
            assert layer.status()["decisions"] == 0
            self.forgotten += 1

        def counters_are_zero(self) -> None:
            assert layer.status()["decisions"] == 0
            self.told += 1

    layer, online = balancer(), Online()
    layer.in_router(IDS_TK.clone(), None)
    WorkerBalancer(balancer="gem", rank=0, layers=[layer], online=online).start_serving()
    assert online.forgotten == online.told == 1 and not layer.tables.counters.any()
    WorkerBalancer(balancer="metro", rank=0, layers=[layer]).start_serving()


def test_status_of_a_worker_sums_its_layers_and_reset_starts_over():
    layers = [balancer(), balancer()]
    worker = WorkerBalancer(balancer="metro", rank=1, layers=layers)
    for layer in layers:
        layer.in_router(IDS_TK.clone(), None)
    layers[1].in_router(torch.empty((0, 2), dtype=torch.int64), None)
    status = worker.status(per_layer=True)
    assert status["balancer"] == "metro" and status["rank"] == 1
    assert status["num_layers"] == 2 and status["num_ranks"] == 2
    assert (status["num_logical_experts"], status["num_physical_experts"]) == (4, 6)
    assert status["decisions"] == 3 and status["pairs"] == 12
    assert status["memory_bound_batches"] == 2 and status["empty_batches"] == 1
    # Expert 3 is alone on rank 1, experts 1 (or 0) and 2 on rank 0: two and two in each layer.
    assert status["max_activated_sum"] == 4 and status["activated_per_rank"] == [4, 4]
    assert status["decide_us"] > 0
    assert status["stepped_aside"] == {
        "compute_bound": 0,
        "no_tokens": 1,
    }
    assert [layer["decisions"] for layer in status["layers"]] == [1, 2]
    assert "layers" not in worker.status()

    worker.reset()
    status = worker.status()
    zero = ("decisions", "decide_us", "exchange_us", "exchanged_bytes", "pairs", "activated_sum")
    assert {name: status[name] for name in zero} == dict.fromkeys(zero, 0)
    assert status["tokens_per_rank"] == [0, 0]


@pytest.mark.parametrize("way", ["replicated", "after_gather"])
def test_a_layer_tells_its_experts_and_where_the_last_batch_went(way):
    layer = balancer(way, policy=ROUTING["first_copy"]())
    empty = {"physical_to_logical": [0, 1, 2, 3, 0, 1], "slot_tokens": [0] * 6}
    assert layer.slots() == empty
    layer.after_gather(layer.in_router(IDS_TK.clone(), None))
    layer.after_gather(layer.in_router(torch.tensor([[1, 0], [-1, -1]]), None))
    assert layer.slots() == empty | {"slot_tokens": [1, 1, 0, 0, 0, 0]}
    worker = WorkerBalancer(balancer="first_copy", rank=0, layers=[layer])
    assert worker.status(per_layer=True)["layers"][0]["slot_tokens"] == [1, 1, 0, 0, 0, 0]


def test_a_layer_without_replicas_says_that_there_is_nothing_to_choose():
    layer = balancer(content=(0, 1, 2, 3))
    worker = WorkerBalancer(balancer="metro", rank=0, layers=[layer])
    layer.in_router(IDS_TK.clone(), None)
    assert worker.status()["stepped_aside"] == {"one_copy": 1}


def test_a_compute_bound_batch_is_counted_as_stepping_aside():
    layer = balancer(policy=MetroRouting(0.5))
    worker = WorkerBalancer(balancer="metro", rank=0, layers=[layer])
    slots_TK = layer.in_router(IDS_TK.clone(), None)
    assert worker.status()["stepped_aside"]["compute_bound"] == 1
    of_expert_0 = slots_TK[IDS_TK == 0]
    assert len(of_expert_0.unique()) == 2, "expert 0 has three tokens for its two copies"


@pytest.mark.parametrize(
    ("way", "name", "is_global"),
    [
        ("replicated", "eplb", True),
        ("after_gather", "eplb", True),
        ("all_reduce", "eplb", False),
        ("all_reduce", "metro", True),
    ],
)
def test_the_status_says_whether_counts_are_global(way, name, is_global):
    policy = MetroRouting(2.0) if name == "metro" else ROUTING[name]()
    worker = WorkerBalancer(balancer=name, rank=0, layers=[balancer(way, policy)])
    assert worker.status()["counts_are_global"] is is_global
    assert worker.status()["exchange"] == way
