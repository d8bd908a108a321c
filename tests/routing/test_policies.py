"""Every policy: its plan gives every token to a replica, and its routing does what it planned."""

import math
from dataclasses import replace

import pytest
import torch
from cases import Case, planned, random_case
from hypothesis import given
from hypothesis import strategies as st

from vllm_balance.config import BALANCERS, FETCHES
from vllm_balance.kernels.assign import assign
from vllm_balance.kernels.limits import MAX_PAIRS
from vllm_balance.kernels.record import Counter, counters_size
from vllm_balance.routing import FETCHING, ROUTING, LayerTables, metro, static
from vllm_balance.routing.metro import MetroRouting
from vllm_balance.types import Placement

SEEDS = st.integers(0, 2**32 - 1)
NAMES = sorted(ROUTING)
KNEES = [0.0, 2.0, math.inf]
ONE_COPY = ("gem", "exflow")
"""Planned without redundant experts; gem with them is as eplb."""


def make(name: str, knee_tokens: float = math.inf):
    return MetroRouting(knee_tokens) if name == "metro" else ROUTING[name]()


def one_copy(case: Case) -> Case:
    """The same batch on one copy of each expert, on as many of the ranks as divide them."""
    num_experts = case.placement.num_logical
    generator = torch.Generator().manual_seed(num_experts)
    placement = Placement.from_physical_to_logical(
        torch.randperm(num_experts, generator=generator),
        num_logical=num_experts,
        num_ranks=math.gcd(num_experts, case.placement.num_ranks),
    )
    return replace(case, placement=placement)


def tokens_of(case: Case) -> torch.Tensor:
    ids = torch.from_numpy(case.topk_ids_TK).flatten().long()
    return torch.bincount(ids[ids >= 0], minlength=case.placement.num_logical).to(torch.int32)


def tables_of(case: Case, width: int | None = None) -> LayerTables:
    """As vLLM holds them: int64, padded with -1 to `width` columns."""
    placement = case.placement
    table_ER = placement.logical_to_physical_ER.long()
    if width is not None:
        wide = torch.full((placement.num_logical, width), -1, dtype=torch.int64)
        wide[:, : table_ER.shape[1]] = table_ER
        table_ER = wide
    return LayerTables(
        logical_to_physical_ER=table_ER,
        num_replicas_E=placement.num_replicas_E.long(),
        num_ranks=placement.num_ranks,
        num_physical=placement.num_physical,
        load_P=torch.zeros(placement.num_physical, dtype=torch.int32),
        record_enabled=torch.tensor(True),
        counters=torch.zeros(counters_size(placement.num_ranks), dtype=torch.int64),
    )


def tokens_per_slot(split_ER: torch.Tensor, case: Case) -> torch.Tensor:
    table_ER = case.placement.logical_to_physical_ER
    tokens_P = torch.zeros(case.placement.num_physical, dtype=torch.int64)
    for expert, row in enumerate(table_ER.tolist()):
        for column, slot in enumerate(row):
            if slot >= 0:
                tokens_P[slot] += int(split_ER[expert, column])
    return tokens_P


def test_every_balancer_of_the_flag_has_a_policy():
    assert sorted(BALANCERS) == sorted([*ROUTING, *FETCHING])
    assert sorted(FETCHES) == sorted(FETCHING)
    for policies in (ROUTING, FETCHING):
        assert all(policy.name == name for name, policy in policies.items())


@given(SEEDS, st.sampled_from(KNEES))
def test_a_plan_serves_every_token_once(seed, knee):
    case = random_case(seed)
    tokens_E = tokens_of(case)
    split_ER = planned(MetroRouting(knee), tokens_E, case.placement)
    assert split_ER.dtype is torch.int32
    assert split_ER.shape == case.placement.logical_to_physical_ER.shape
    assert torch.equal(split_ER.sum(1, dtype=torch.int32), tokens_E)
    assert (split_ER >= 0).all()
    assert not split_ER[case.placement.logical_to_physical_ER < 0].any()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "eplb"])
@given(SEEDS, st.sampled_from(KNEES))
def test_routing_does_what_was_planned(name, seed, knee):
    case = one_copy(random_case(seed)) if name in ONE_COPY else random_case(seed)
    policy, tables = make(name, knee), tables_of(case)
    ids_TK = torch.from_numpy(case.topk_ids_TK)
    slots_TK = policy.route(ids_TK.clone(), tables, None)
    split_ER = planned(policy, tokens_of(case), case.placement)
    assert torch.equal(slots_TK < 0, ids_TK < 0)
    used = slots_TK[slots_TK >= 0].long()
    assert torch.equal(
        case.placement.physical_to_logical_P[used], ids_TK[ids_TK >= 0].to(torch.int32)
    )
    tokens_P = torch.bincount(used, minlength=case.placement.num_physical)
    assert torch.equal(tokens_P, tokens_per_slot(split_ER, case))
    assert torch.equal(tables.load_P.long(), tokens_P)
    assert tables.counters[Counter.PAIRS] == len(used)
    if name in ("static", "first_copy"):
        assert tables.counters[Counter.COMPUTE_BOUND_BATCHES] == 0


@given(SEEDS, st.sampled_from(KNEES), st.sampled_from([None, 0.0, 2.0, 2.5]))
def test_metro_assigns_as_its_plan_does_pair_by_pair(seed, knee, free):
    """Ranks that route by exchanged counts (plan, assign) agree with ranks that see all tokens."""
    case = random_case(seed)
    policy = MetroRouting(knee, free)
    ids_TK = torch.from_numpy(case.topk_ids_TK)
    split_ER = planned(policy, tokens_of(case), case.placement)
    planned_TK = assign(ids_TK, split_ER, case.placement.logical_to_physical_ER)
    assert torch.equal(policy.route(ids_TK.clone(), tables_of(case), None), planned_TK)


@pytest.mark.parametrize("name", ["eplb", "gem"])
@given(SEEDS)
def test_replicas_of_the_right_expert(name, seed):
    case = random_case(seed)
    ids_TK, tables, placement = torch.from_numpy(case.topk_ids_TK), tables_of(case), case.placement
    slots_TK = make(name).route(ids_TK.clone(), tables, None)
    assert torch.equal(slots_TK < 0, ids_TK < 0)
    used = slots_TK[slots_TK >= 0].long()
    assert torch.equal(placement.physical_to_logical_P[used], ids_TK[ids_TK >= 0].to(torch.int32))
    assert torch.equal(tables.load_P.long(), torch.bincount(used, minlength=len(tables.load_P)))


@given(SEEDS)
def test_metro_activates_as_few_experts_on_the_worst_rank_as_any_policy(seed):
    case = random_case(seed)
    placement = case.placement

    def worst_rank(name: str) -> int:
        tokens_P = tokens_per_slot(planned(make(name), tokens_of(case), placement), case)
        return int((tokens_P > 0).view(placement.num_ranks, -1).sum(1).max())

    assert worst_rank("metro") <= min(worst_rank("first_copy"), worst_rank("eplb"))


def test_metro_is_better_than_the_first_copy_where_it_can_be():
    """Two ranks, experts 0 to 3 first on rank 0 and again on rank 1: two there, two here."""
    placement = Placement.from_physical_to_logical(
        torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]), num_logical=4, num_ranks=2
    )
    tokens_E = torch.tensor([5, 1, 1, 1], dtype=torch.int32)
    split_ER = planned(MetroRouting(math.inf), tokens_E, placement)
    assert (split_ER > 0).sum(0).tolist() == [2, 2]


def test_the_knee_is_mean_tokens_per_active_expert():
    placement = Placement.from_physical_to_logical(
        torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]), num_logical=6, num_ranks=2
    )

    def is_spread(*tokens: int) -> bool:
        tokens_E = torch.tensor(tokens, dtype=torch.int32)
        split_ER = planned(MetroRouting(3.0), tokens_E, placement)
        spread_E = ((split_ER > 0).sum(1) > 1)[tokens_E > 1]
        assert spread_E.all() == spread_E.any() or not len(spread_E)
        return bool(spread_E.any())

    assert not is_spread(4, 0, 0, 2, 0, 0)
    assert is_spread(6, 0, 0, 3, 0, 0)
    assert not is_spread(3, 3, 3, 0, 0, 0)
    assert not is_spread(0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("tokens", "spread"),
    [
        ([4, 4], False),  # One each: 6 and 6. Spread: twice 4 on both.
        ([40, 4], True),  # One each: 42 and 6. Spread: 22 + 4 on both.
        ([9, 3], False),  # One each: 11 and 5. Spread: 7 + 4 and 6 + 4, no sooner.
        ([0, 0], False),
    ],
)
def test_experts_in_turn_are_spread_where_the_slowest_rank_ends_sooner(tokens, spread):
    """Two experts on both of two ranks; an expert takes the time of 4 + max(0, n - 2) tokens."""
    placement = Placement.from_physical_to_logical(
        torch.tensor([0, 1, 0, 1]), num_logical=2, num_ranks=2
    )
    tokens_E = torch.tensor(tokens, dtype=torch.int32)
    split_ER = planned(MetroRouting(4.0, 2.0), tokens_E, placement)
    assert bool((split_ER > 0).all()) == spread


@given(SEEDS, st.sampled_from([None, 64, 1024]))
def test_tables_know_their_placement(seed, width):
    case = random_case(seed)
    if width is not None and width < case.placement.logical_to_physical_ER.shape[1]:
        width = None
    found, made = tables_of(case, width).placement, case.placement
    assert torch.equal(found.physical_to_logical_P, made.physical_to_logical_P)
    assert torch.equal(found.num_replicas_E, made.num_replicas_E)
    assert found.num_ranks == made.num_ranks
    used = made.logical_to_physical_ER.shape[1]
    assert torch.equal(found.logical_to_physical_ER[:, :used], made.logical_to_physical_ER)
    assert (found.logical_to_physical_ER[:, used:] == -1).all()
    assert found.logical_to_physical_ER.shape[1] <= made.num_physical - made.num_logical + 1


def test_tables_see_a_rearrangement_in_place():
    case = random_case(3)
    tables = tables_of(case, width=1024)
    before_P = tables.placement.physical_to_logical_P
    slots = tables.logical_to_physical_ER
    slots.copy_(torch.where(slots >= 0, case.placement.num_physical - 1 - slots, -1))
    assert torch.equal(tables.placement.physical_to_logical_P, before_P.flip(0))


def on_gpu(num_tokens: int, top_k: int) -> torch.Tensor:
    """Ids of a device that is not here: a shape without memory."""
    return torch.empty((num_tokens, top_k), dtype=torch.int32, device="meta")


def test_gpu_batches_that_are_compute_bound_by_their_shape_are_spread_by_vllms_kernel(monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(metro, "vllm_hash", lambda *_: asked.append("hash"))
    monkeypatch.setattr(metro, "route", lambda *_, **__: asked.append("fused"))
    tables = tables_of(random_case(1))
    most = 10 * tables.num_logical * tables.num_ranks
    assert most < MAX_PAIRS
    for knee_tokens, ids_TK, held in (
        (10.0, on_gpu(most, 1), tables),
        (10.0, on_gpu(most + 1, 1), tables),
        (math.inf, on_gpu(MAX_PAIRS, 1), tables),
        (math.inf, on_gpu(MAX_PAIRS + 1, 1), tables),
        (10.0, on_gpu(most + 1, 1), replace(tables, load_P=None)),
        (10.0, torch.zeros((most + 1, 1), dtype=torch.int32), tables),
    ):
        MetroRouting(knee_tokens).route(ids_TK, held, None)
    assert asked == ["fused", "hash", "fused", "hash", "fused", "fused"]


def test_gpu_batches_larger_than_any_graph_of_one_rank_have_no_padding(monkeypatch):
    """Ranks that hold the same batch: from the knee on, where no CUDA graph has padded it."""
    asked: list[str] = []
    monkeypatch.setattr(metro, "vllm_hash", lambda *_: asked.append("hash"))
    monkeypatch.setattr(metro, "route", lambda *_, **__: asked.append("fused"))
    tables = tables_of(random_case(1))
    assert tables.num_ranks > 1
    most = 10 * tables.num_logical
    for num_tokens, most_padded in (
        (most, 0),
        (most + 1, 0),
        (most + 1, most),
        (most + 1, most + 1),
        (most + 1, None),
        (tables.num_ranks * most + 1, 2**20),
    ):
        held = replace(tables, most_padded=most_padded)
        MetroRouting(10.0).route(on_gpu(num_tokens, 1), held, None)
    assert asked == ["fused", "hash", "hash", "fused", "fused", "hash"]


def test_on_a_gpu_static_counts_and_maps_nothing(monkeypatch):
    counted: list[torch.Tensor] = []
    monkeypatch.setattr(static, "record", lambda ids_TK, **_: counted.append(ids_TK))
    ids_TK = on_gpu(4, 2)
    assert make("static").route(ids_TK, tables_of(one_copy(random_case(1))), None) is ids_TK
    assert counted == [ids_TK]
