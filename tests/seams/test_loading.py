"""Loading by a placement, through vLLM's own loop over a checkpoint's expert weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from vllm_balance.errors import BalancerError
from vllm_balance.initial_placement import HOME, InitialPlacement
from vllm_balance.seams.loading import PlacedLoading

LAYER = "model.layers.3.mlp.experts"
EXPERTS = 4


class Rank:
    """One rank's slots of one layer; `original` is what vLLM's loader does for one slot."""

    layer_name = LAYER
    quant_config = None

    def __init__(self, rank: int, num_physical: int, num_ranks: int = 2) -> None:
        self.moe_config = SimpleNamespace(num_logical_experts=EXPERTS)
        self.expert_map_manager = SimpleNamespace(num_fused_shared_experts=0)
        self.slots = num_physical // num_ranks
        self.first = rank * self.slots
        self.weight = torch.full((self.slots, 2), float("nan"))

    def _map_global_expert_id_to_local_expert_id(self, slot: int) -> int:
        return slot - self.first if self.first <= slot < self.first + self.slots else -1

    def original(self, layer, *, loaded_weight, shard_id, expert_id, return_success, **_) -> bool:
        assert return_success
        local = self._map_global_expert_id_to_local_expert_id(expert_id)
        if local < 0:
            return False
        self.weight[local, 0 if shard_id == "w1" else 1] = loaded_weight
        return True


def call(expert: int, shard: str, weight: torch.Tensor) -> dict:
    name = f"{LAYER}.{'w2' if shard == 'w2' else 'w13'}_weight"
    return {
        "param": None,
        "loaded_weight": weight,
        "weight_name": name,
        "shard_id": shard,
        "expert_id": expert,
    }


def loaded(slots: list[int], rank: Rank, *, skip: tuple[int, ...] = ()) -> PlacedLoading:
    """After vLLM has offered every physical expert of its own placement, 0 to E - 1 first."""
    placement = InitialPlacement.of("test", (3,), np.array([slots]))
    loading = PlacedLoading(placement)
    for physical in range(len(slots)):
        logical = physical % EXPERTS
        if physical in skip:
            continue
        for shard, value in (("w1", logical), ("w2", 10 + logical)):
            loading.load(rank.original, rank, call(physical, shard, torch.tensor(float(value))))
    return loading


@given(st.permutations(range(EXPERTS)), st.lists(st.integers(0, EXPERTS - 1), max_size=2))
def test_every_slot_gets_its_expert(order, extra):
    extra = extra if len(extra) == 2 else []
    slots = list(order) + extra
    for number in range(2):
        rank = Rank(number, len(slots))
        loading = loaded(slots, rank)
        own = slots[rank.first : rank.first + rank.slots]
        assert rank.weight.tolist() == [[float(e), 10.0 + e] for e in own]
        assert loading.problem([rank], "auto") is None


def test_what_a_rank_does_not_hold_is_reported_as_not_loaded():
    rank = Rank(0, EXPERTS)
    loading = PlacedLoading(InitialPlacement.of("test", (3,), np.array([[3, 2, 1, 0]])))
    weight = torch.tensor(1.0)
    assert loading.load(rank.original, rank, call(3, "w1", weight))
    assert not loading.load(rank.original, rank, call(0, "w1", weight))
    assert not loading.load(rank.original, rank, call(EXPERTS, "w1", weight))


def test_an_empty_slot_stays_empty():
    rank = Rank(1, 6)
    loading = loaded([0, 1, 2, 3, -1, 0], rank)
    assert rank.weight[1].isnan().all()
    assert rank.weight[2].tolist() == [0.0, 10.0]
    assert loading.problem([rank], "auto") is None


def test_weights_that_did_not_arrive_are_named():
    rank = Rank(0, EXPERTS)
    problem = loaded([3, 2, 1, 0], rank, skip=(2,)).problem([rank], "auto")
    assert "slot 1" in problem and "hold expert 2" in problem and "got nothing" in problem
    twice = loaded([3, 2, 1, 0], rank)
    twice.load(rank.original, rank, call(3, "w1", torch.tensor(3.0)))
    assert "w13_weight w1 x2" in twice.problem([rank], "auto")


def test_every_part_may_come_twice_if_all_do():
    """vLLM measures each part before it quantises a model while loading it."""
    rank = Rank(0, EXPERTS)
    loading = loaded([3, 2, 1, 0], rank)
    for expert in range(EXPERTS):
        for shard in ("w1", "w2"):
            loading.load(rank.original, rank, call(expert, shard, torch.tensor(float(expert))))
    assert loading.problem([rank], "auto") is None


def test_a_loader_that_goes_another_way_is_noticed():
    rank = Rank(0, EXPERTS)
    untouched = PlacedLoading(InitialPlacement.of("test", (3,), np.array([[3, 2, 1, 0]])))
    assert "'sharded_state'" in untouched.problem([rank], "sharded_state")
    assert untouched.problem([rank], "dummy") is None


@pytest.mark.parametrize(
    ("origin", "remedy"), [("gem map", "Omit `map`"), (HOME, "that fetches no experts")]
)
def test_experts_that_are_loaded_together_are_refused(origin, remedy):
    rank = Rank(0, EXPERTS)
    loading = PlacedLoading(InitialPlacement.of(origin, (3,), np.array([[3, 2, 1, 0]])))
    with pytest.raises(BalancerError, match=f"loaded all at once.*{remedy} for this model"):
        loading.load(rank.original, rank, call(0, "w1", torch.zeros(4, 2, 2)))
    rank.expert_map_manager.num_fused_shared_experts = 1
    with pytest.raises(BalancerError, match="shared experts"):
        loading.load(rank.original, rank, call(0, "w1", torch.tensor(1.0)))


@pytest.mark.parametrize("offered", [EXPERTS, EXPERTS + 2], ids=["fused", "each expert"])
def test_redundant_experts_are_loaded_without_a_map_whatever_the_checkpoint(offered):
    """From fused checkpoints vLLM offers the first E physical experts only."""
    loading = PlacedLoading(InitialPlacement.vllms_own(EXPERTS, redundant=2))
    ranks = [Rank(number, EXPERTS + 2) for number in range(2)]
    for rank in ranks:
        for physical in range(offered):
            for shard, value in (("w1", physical % EXPERTS), ("w2", 10 + physical % EXPERTS)):
                loading.load(rank.original, rank, call(physical, shard, torch.tensor(value)))
    slots = torch.cat([rank.weight for rank in ranks])
    assert slots.tolist() == [[e, 10 + e] for e in (0, 1, 2, 3, 0, 1)]
    assert loading.problem(ranks, "auto") is None


def test_vllms_own_placement_leaves_other_loaders_alone():
    rank = Rank(0, EXPERTS + 2)
    loading = PlacedLoading(InitialPlacement.vllms_own(EXPERTS, redundant=2))
    assert loading.problem([rank], "sharded_state") is None
    asked = []

    def original(layer, **given) -> bool:
        asked.append(given["expert_id"])
        return True

    assert loading.load(original, rank, call(5, "w1", torch.zeros(4, 2, 2)))
    assert asked == [5]


def test_a_redundant_expert_that_did_not_arrive_is_named(monkeypatch):
    rank = Rank(1, EXPERTS + 2)
    loading = PlacedLoading(InitialPlacement.vllms_own(EXPERTS, redundant=2))
    same = loading.placement.checksum
    for shard in ("w1", "w2"):
        loading.load(rank.original, rank, call(0, shard, torch.tensor(0.0)))
        loading.load(rank.original, rank, call(3, shard, torch.tensor(3.0)))
    with pytest.raises(BalancerError, match=r"slot 5 .* expert 1, got nothing.*balancer static"):
        verified(monkeypatch, loading, rank, (same, None))
    for shard in ("w1", "w2"):
        loading.load(rank.original, rank, call(1, shard, torch.tensor(1.0)))
    assert verified(monkeypatch, loading, rank, (same, None)) == "vLLM's own"


def test_a_layer_without_entry_is_refused():
    rank = Rank(0, EXPERTS)
    loading = PlacedLoading(InitialPlacement.of("test", (5,), np.array([[3, 2, 1, 0]])))
    with pytest.raises(BalancerError, match="no entry for layer 3"):
        loading.load(rank.original, rank, call(0, "w1", torch.tensor(1.0)))


def test_vllms_eplb_learns_the_placement():
    slots = [[3, 2, 1, 0, 3, 3], [0, 1, 2, 3, 1, 2]]
    loading = PlacedLoading(InitialPlacement.of("test", (1, 3), np.array(slots)))
    names = ("model.layers.1.mlp.experts", LAYER)
    model = SimpleNamespace(
        moe_layers=[SimpleNamespace(layer_name=name) for name in names],
        num_logical_experts=EXPERTS,
    )
    state = SimpleNamespace(
        physical_to_logical_map=torch.zeros(2, 6, dtype=torch.int64),
        logical_to_physical_map=torch.zeros(2, EXPERTS, 8, dtype=torch.int64),
        logical_replica_count=torch.zeros(2, EXPERTS, dtype=torch.int64),
    )
    loading.place_state(model, state)
    assert state.physical_to_logical_map.tolist() == slots
    assert state.logical_replica_count.tolist() == [[1, 1, 1, 3], [1, 2, 2, 1]]
    assert state.logical_to_physical_map[0].tolist() == [
        [3, *[-1] * 7],
        [2, *[-1] * 7],
        [1, *[-1] * 7],
        [0, 4, 5, *[-1] * 5],
    ]
    assert state.logical_to_physical_map[1, 2].tolist() == [2, 5, *[-1] * 6]


def test_placements_with_the_same_content_have_the_same_checksum():
    one = InitialPlacement.of("a", (0,), np.array([[0, 1]]))
    assert one.checksum == InitialPlacement.of("b", (0,), np.array([[0, 1]])).checksum
    assert one.checksum != InitialPlacement.of("a", (0,), np.array([[1, 0]])).checksum
    assert one.checksum != InitialPlacement.of("a", (1,), np.array([[0, 1]])).checksum
    with pytest.raises(ValueError, match="2 layers"):
        InitialPlacement.of("a", (0, 1), np.array([[0, 1]]))


def test_the_mark_by_which_models_load_experts_survives():
    from vllm_balance.seams import install
    from vllm_balance.seams.loading import LOADING_SEAMS

    install(LOADING_SEAMS)
    assert RoutedExperts.weight_loader.supports_moe_loading


def verified(monkeypatch, loading: PlacedLoading, rank: Rank, other: tuple[str, str | None]) -> str:
    """What a worker says of its placement if the other rank of two reports this."""
    from vllm_balance.seams.agreement import verified_placement

    def all_gather_object(found, own, group) -> None:
        found[:] = [own, other]

    group = SimpleNamespace(world_size=2, cpu_group=None)
    monkeypatch.setattr("vllm.distributed.get_ep_group", lambda: group)
    monkeypatch.setattr("torch.distributed.all_gather_object", all_gather_object)
    return verified_placement(loading, "auto", [SimpleNamespace(routed_experts=rank)])


def test_all_ranks_verify_or_all_refuse(monkeypatch):
    rank = Rank(0, EXPERTS)
    loading = loaded([3, 2, 1, 0], rank)
    same = loading.placement.checksum
    assert verified(monkeypatch, loading, rank, (same, None)) == f"test {same[:12]} verified"
    with pytest.raises(BalancerError, match="rank 1: slot 5 got nothing"):
        verified(monkeypatch, loading, rank, (same, "slot 5 got nothing"))
    with pytest.raises(BalancerError, match="the ranks loaded different files"):
        verified(monkeypatch, loading, rank, ("0" * 64, None))
    with pytest.raises(BalancerError, match="rank 0: slot 0"):
        verified(monkeypatch, loaded([3, 2, 1, 0], rank, skip=(3,)), rank, (same, None))
