"""The CPU kernels, pair by pair, against the plain definitions in each reference.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import Case, random_case
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_balance.kernels.assign import assign, even_split
from vllm_balance.kernels.assign import reference as assign_reference
from vllm_balance.kernels.eplb_hash import map_and_record
from vllm_balance.kernels.eplb_hash import reference as hash_reference
from vllm_balance.kernels.metro import choose, route, split
from vllm_balance.kernels.metro import reference as metro_reference
from vllm_balance.kernels.record import (
    Counter,
    Regime,
    counters_size,
    record,
    record_load,
    record_split,
)
from vllm_balance.kernels.record import reference as record_reference
from vllm_balance.types import Placement

POISON = -(2**30)
SEEDS = st.integers(0, 2**32 - 1)


class Buffers:
    """Everything one layer routes with, as vLLM lays it out: int64 maps padded wide, or ours."""

    def __init__(self, case: Case, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.case, self.placement = case, case.placement
        self.like_vllm = bool(rng.integers(2))
        self.map_type = torch.int64 if self.like_vllm else torch.int32
        table_ER = case.placement.logical_to_physical_ER.to(self.map_type)
        if self.like_vllm:
            wide = torch.full((len(table_ER), 1024), -1, dtype=self.map_type)
            wide[:, : table_ER.shape[1]] = table_ER
            table_ER = wide
        self.table_ER = table_ER
        self.ids_TK = torch.from_numpy(case.topk_ids_TK).to(
            torch.int64 if rng.integers(2) else torch.int32
        )
        self.load_P = torch.from_numpy(
            rng.integers(0, 9, case.placement.num_physical + 3).astype(np.int32)
        )
        self.counters = torch.from_numpy(
            rng.integers(0, 9, counters_size(case.placement.num_ranks))
        )
        self.record_enabled = torch.tensor(bool(rng.integers(2)))
        valid = case.num_valid_tokens
        self.num_valid_tokens = None if valid is None else torch.tensor(valid, dtype=torch.int32)

    def arguments(self) -> dict:
        return {
            "logical_to_physical_ER": self.table_ER,
            "num_replicas_E": self.placement.num_replicas_E.to(self.map_type),
            "num_ranks": self.placement.num_ranks,
            "num_physical": self.placement.num_physical,
            "load_P": self.load_P,
            "record_enabled": self.record_enabled,
            "num_valid_tokens": self.num_valid_tokens,
            "counters": self.counters,
        }

    def expected(self, slots_TK: np.ndarray, regime: Regime) -> tuple[np.ndarray, np.ndarray]:
        """Load and counters after a batch with these slots, from the state before it."""
        load_P, counters = self.load_P.numpy().copy(), self.counters.numpy().copy()
        record_reference.record(
            slots_TK,
            num_physical=self.placement.num_physical,
            num_ranks=self.placement.num_ranks,
            load_P=load_P,
            record_enabled=bool(self.record_enabled),
            num_valid_tokens=self.case.num_valid_tokens,
            counters=counters,
            regime=regime,
        )
        return load_P, counters

    def column_E(self) -> np.ndarray | None:
        tokens_E = metro_reference.count(
            self.case.topk_ids_TK, self.placement.num_logical, self.case.num_valid_tokens
        )
        return choose(torch.from_numpy(tokens_E), self.placement).numpy()


@settings(max_examples=400, deadline=None)
@given(
    seed=SEEDS,
    knee=st.sampled_from([0.0, 1.0, 2.5, 1e9, float("inf")]),
    free=st.sampled_from([None, None, 0.0, 1.5, 3.0]),
)
def test_route(seed, knee, free):
    """Experts in turn: whichever of both ways lets the slowest rank end first, by its own sum."""
    case = random_case(seed)
    buffers = Buffers(case, seed)
    tokens_E = metro_reference.count(
        case.topk_ids_TK, case.placement.num_logical, case.num_valid_tokens
    )
    even = (
        metro_reference.is_compute_bound(tokens_E, knee)
        if free is None
        else metro_reference.is_even_sooner(
            tokens_E,
            buffers.column_E(),
            case.table_ER,
            case.num_replicas_E,
            case.placement.num_ranks,
            case.placement.num_physical,
            knee,
            free,
        )
    )
    slots_TK = metro_reference.map_pairs(
        case.topk_ids_TK,
        None if even else buffers.column_E(),
        case.table_ER,
        case.num_replicas_E,
        case.num_valid_tokens,
    )
    load_P, counters = buffers.expected(
        slots_TK, Regime.COMPUTE_BOUND if even else Regime.MEMORY_BOUND
    )
    out = torch.full_like(buffers.ids_TK, POISON)
    result = route(
        buffers.ids_TK, knee_tokens=knee, free_tokens=free, out=out, **buffers.arguments()
    )
    assert result is out
    assert (out.numpy() == slots_TK).all()
    assert (buffers.load_P.numpy() == load_P).all()
    assert (buffers.counters.numpy() == counters).all()
    valid = case.topk_ids_TK >= 0
    assert (out.numpy()[valid] >= 0).all()
    assert (
        case.placement.physical_to_logical_P.numpy()[out.numpy()[valid]] == case.topk_ids_TK[valid]
    ).all()


@settings(max_examples=300, deadline=None)
@given(
    seed=SEEDS,
    knee=st.sampled_from([0.0, 1.0, 2.5, 1e9, float("inf")]),
    free=st.sampled_from([None, None, 0.0, 1.3, 3.0]),
)
def test_split_and_its_records_are_those_of_route(seed, knee, free):
    """Counts alone: the slots that ``assign`` gives by the split, and the same counters."""
    case = random_case(seed)
    buffers, again = Buffers(case, seed), Buffers(case, seed)
    num_experts, R = case.table_ER.shape
    tokens_E = metro_reference.count(case.topk_ids_TK, num_experts, case.num_valid_tokens)
    threshold = {"knee_tokens": knee, "free_tokens": free}
    slots_TK = route(buffers.ids_TK, **threshold, **buffers.arguments())
    width = min(buffers.table_ER.shape[1], case.placement.num_physical - num_experts + 1)
    arguments = again.arguments()
    placement = Placement(
        logical_to_physical_ER=again.table_ER[:, :width],
        num_replicas_E=arguments["num_replicas_E"],
        num_ranks=case.placement.num_ranks,
        num_physical=case.placement.num_physical,
    )
    split_ER = split(torch.from_numpy(tokens_E), placement, **threshold)
    assert split_ER.dtype is torch.int32 and split_ER.shape == (num_experts, width)
    assert (split_ER.sum(1).numpy() == tokens_E).all() and not split_ER[:, R:].any()
    assigned_TK = assign(
        again.ids_TK, split_ER, again.table_ER, num_valid_tokens=again.num_valid_tokens
    )
    assert torch.equal(assigned_TK, slots_TK)
    regime = None
    if buffers.counters[Counter.COMPUTE_BOUND_BATCHES] > again.counters[1]:
        regime = Regime.COMPUTE_BOUND
    record_split(
        split_ER,
        placement.logical_to_physical_ER,
        num_physical=placement.num_physical,
        num_ranks=placement.num_ranks,
        counters=again.counters,
        regime=regime,
    )
    assert torch.equal(again.counters, buffers.counters)


@settings(max_examples=200, deadline=None)
@given(seed=SEEDS)
def test_record(seed):
    case = random_case(seed)
    buffers = Buffers(case, seed)
    rng = np.random.default_rng(seed)
    slots_TK = rng.integers(-1, case.placement.num_physical, case.topk_ids_TK.shape)
    regime = Regime(int(rng.integers(2)))
    load_P, counters = buffers.expected(slots_TK, regime)
    arguments = buffers.arguments()
    del arguments["logical_to_physical_ER"], arguments["num_replicas_E"]
    record(torch.from_numpy(slots_TK), regime=regime, **arguments)
    assert (buffers.load_P.numpy() == load_P).all()
    assert (buffers.counters.numpy() == counters).all()


@settings(max_examples=200, deadline=None)
@given(seed=SEEDS, flag=st.sampled_from([True, False, None]))
def test_record_load(seed, flag):
    """What ``record`` adds to the load, and no flag means true."""
    case = random_case(seed)
    buffers, again = Buffers(case, seed), Buffers(case, seed)
    num_physical = case.placement.num_physical
    slots_TK = np.random.default_rng(seed).integers(-2, num_physical, case.topk_ids_TK.shape)
    enabled = None if flag is None else torch.tensor(flag)
    sizes = {"num_physical": num_physical, "record_enabled": enabled}
    record(
        torch.from_numpy(slots_TK),
        num_ranks=case.placement.num_ranks,
        load_P=buffers.load_P,
        num_valid_tokens=None,
        counters=buffers.counters,
        regime=Regime.MEMORY_BOUND,
        **sizes,
    )
    record_load(torch.from_numpy(slots_TK), load_P=again.load_P, **sizes)
    assert torch.equal(again.load_P, buffers.load_P)


@settings(max_examples=300, deadline=None)
@given(seed=SEEDS)
def test_assign_any_split(seed):
    """Random splits, also ones that do not fit the batch, from any occurrence on."""
    case = random_case(seed)
    rng = np.random.default_rng(seed)
    R = case.table_ER.shape[1]
    split_ER = rng.integers(0, 6, (case.placement.num_logical, R)).astype(np.int32)
    split_ER[rng.random(split_ER.shape) < 0.4] = 0
    split_ER[np.arange(R)[None] >= case.num_replicas_E[:, None]] = 0
    offset_E = rng.integers(0, 6, case.placement.num_logical) if rng.integers(2) else None
    buffers = Buffers(case, seed)
    expected_TK = assign_reference.assign(
        case.topk_ids_TK, split_ER, case.table_ER, offset_E, case.num_valid_tokens
    )
    slots_TK = assign(
        buffers.ids_TK,
        torch.from_numpy(split_ER),
        buffers.table_ER,
        None if offset_E is None else torch.from_numpy(offset_E),
        buffers.num_valid_tokens,
    )
    assert slots_TK.dtype == buffers.ids_TK.dtype
    assert (slots_TK.numpy() == expected_TK).all()


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS, cut=st.integers(0, 64))
def test_assign_on_two_ranks_equals_one(seed, cut):
    """Each rank with its own tokens and the occurrences before it decides as if it saw all."""
    case = random_case(seed)
    cut = min(cut, len(case.topk_ids_TK))
    table_ER = case.placement.logical_to_physical_ER
    ids_TK = torch.from_numpy(case.topk_ids_TK)
    num_experts, R = table_ER.shape
    tokens_E = torch.from_numpy(metro_reference.count(case.topk_ids_TK, num_experts, None))
    split_ER = even_split(tokens_E, case.placement.num_replicas_E, R)
    before_E = torch.from_numpy(metro_reference.count(case.topk_ids_TK[:cut], num_experts, None))
    whole_TK = assign(ids_TK, split_ER, table_ER)
    first_TK = assign(ids_TK[:cut].contiguous(), split_ER, table_ER, torch.zeros_like(before_E))
    second_TK = assign(ids_TK[cut:].contiguous(), split_ER, table_ER, before_E)
    assert torch.equal(torch.cat([first_TK, second_TK]), whole_TK)
    counts_P = np.bincount(whole_TK[whole_TK >= 0].numpy(), minlength=case.placement.num_physical)
    has_slot = case.table_ER >= 0
    assert (counts_P[case.table_ER[has_slot]] == split_ER.numpy()[has_slot]).all()


@settings(max_examples=200, deadline=None)
@given(seed=SEEDS)
def test_even_split(seed):
    rng = np.random.default_rng(seed)
    tokens_E = rng.integers(0, 50, 20)
    replicas_E = rng.integers(1, 9, 20)
    split_ER = even_split(torch.from_numpy(tokens_E), torch.from_numpy(replicas_E), 8).numpy()
    assert split_ER.dtype == np.int32
    assert (split_ER == assign_reference.even_split(tokens_E, replicas_E, 8)).all()
    assert (split_ER.sum(1) == tokens_E).all()
    for row, count in zip(split_ER, replicas_E, strict=True):
        assert (row[count:] == 0).all()
        assert row[:count].max() - row[:count].min() <= 1


def test_even_split_favours_no_replica():
    """One token more than an even number, over all experts and sizes: all replicas get it."""
    extra_R = np.zeros(4, np.int64)
    for quotient in range(8):
        tokens_E = np.full(64, 4 * quotient + 1)
        extra_R += (assign_reference.even_split(tokens_E, np.full(64, 4), 4) - quotient).sum(0)
    assert extra_R.tolist() == [128] * 4


@settings(max_examples=200, deadline=None)
@given(seed=SEEDS, only_first=st.booleans())
def test_eplb_hash(seed, only_first):
    """With one replica for each expert in the counts, the first one, counted as asked."""
    case = random_case(seed)
    buffers = Buffers(case, seed)
    arguments, replicas_E = buffers.arguments(), case.num_replicas_E
    regime = Regime.COMPUTE_BOUND
    if only_first:
        replicas_E, regime = np.ones_like(replicas_E), Regime.MEMORY_BOUND
        ones_E = torch.ones_like(arguments["num_replicas_E"])
        arguments |= {"num_replicas_E": ones_E, "regime": regime}
    slots_TK = hash_reference.map_to_physical(case.topk_ids_TK, case.table_ER, replicas_E)
    load_P, counters = buffers.expected(slots_TK, regime)
    out = map_and_record(buffers.ids_TK, **arguments)
    assert out.dtype == buffers.ids_TK.dtype
    assert (out.numpy() == slots_TK).all()
    assert (buffers.load_P.numpy() == load_P).all()
    assert (buffers.counters.numpy() == counters).all()


def test_a_split_needs_a_slot_for_every_replica():
    placement = Placement(
        logical_to_physical_ER=torch.tensor([[0, -1], [-1, -1], [1, -1]]),
        num_replicas_E=torch.tensor([1, 1, 2]),
        num_ranks=2,
        num_physical=2,
    )
    for knee in (0.0, float("inf")):
        with pytest.raises(ValueError, match="logical expert 1 has tokens but"):
            split(torch.tensor([1, 1, 0]), placement, knee)
        with pytest.raises(ValueError, match="logical expert 2 has tokens but"):
            split(torch.tensor([1, 0, 2]), placement, knee)
        assert split(torch.tensor([3, 0, 0]), placement, knee).tolist() == [[3, 0], [0, 0], [0, 0]]


def test_a_split_is_recorded_beside_its_map():
    table_ER, counters = torch.zeros(3, 2, dtype=torch.int32), torch.zeros(11, dtype=torch.int64)
    sizes = {"num_physical": 4, "num_ranks": 2}
    for shape, dtype in (((3, 3), torch.int32), ((2, 2), torch.int32), ((3, 2), torch.int64)):
        with pytest.raises(ValueError, match="split_ER must be"):
            record_split(torch.zeros(shape, dtype=dtype), table_ER, counters=counters, **sizes)
    with pytest.raises(ValueError, match="counters must be"):
        record_split(table_ER, table_ER, counters=counters[:9], **sizes)


def small() -> Buffers:
    return Buffers(next(c for c in map(random_case, range(99)) if c.topk_ids_TK.size > 40), 0)


def test_route_does_not_write_over_its_ids():
    buffers = small()
    with pytest.raises(ValueError, match="out must not be the ids"):
        route(buffers.ids_TK, knee_tokens=3.0, out=buffers.ids_TK, **buffers.arguments())
    with pytest.raises(ValueError, match="out has shape"):
        route(buffers.ids_TK, knee_tokens=3.0, out=buffers.ids_TK[1:], **buffers.arguments())


def test_maps_changed_in_place_are_seen():
    buffers = small()
    arguments = buffers.arguments()
    route(buffers.ids_TK, knee_tokens=1e9, **arguments)
    mirrored = buffers.placement.num_physical - 1 - buffers.table_ER
    buffers.table_ER.copy_(torch.where(buffers.table_ER >= 0, mirrored, -1))
    slots_TK = route(buffers.ids_TK, knee_tokens=1e9, **arguments)
    held_P = torch.full((buffers.placement.num_physical,), -1, dtype=buffers.ids_TK.dtype)
    held_P[:] = buffers.placement.physical_to_logical_P.flip(0)
    valid = buffers.ids_TK >= 0
    assert torch.equal(held_P[slots_TK[valid].long()], buffers.ids_TK[valid])


@pytest.mark.parametrize("num_tokens", [5, 17])
def test_torch_compile_equals_eager(num_tokens):
    """The registered operations, traced by Dynamo without a graph break, mutate their buffers."""
    buffers = small()
    placement, R = buffers.placement, buffers.placement.logical_to_physical_ER.shape[1]

    def step(ids_TK, load_P, counters):
        arguments = buffers.arguments() | {"load_P": load_P, "counters": counters}
        arguments["num_valid_tokens"] = None
        routed_TK = route(ids_TK + 0, knee_tokens=1e9, **arguments)
        hashed_TK = map_and_record(ids_TK, **arguments)
        split_ER = even_split(placement.num_replicas_E * 3, placement.num_replicas_E, R)
        assigned_TK = assign(ids_TK, split_ER, buffers.table_ER)
        del arguments["logical_to_physical_ER"], arguments["num_replicas_E"]
        record(routed_TK, regime=Regime.MEMORY_BOUND, **arguments)
        return routed_TK + 1, hashed_TK, assigned_TK * 2

    ids_TK = buffers.ids_TK.repeat(4, 1)[:num_tokens].contiguous()
    eager = [buffers.load_P.clone(), buffers.counters.clone()]
    compiled = [tensor.clone() for tensor in eager]
    expected = step(ids_TK, *eager)
    outputs = torch.compile(step, fullgraph=True, backend="aot_eager")(ids_TK, *compiled)
    for left, right in zip([*expected, *eager], [*outputs, *compiled], strict=True):
        assert torch.equal(left, right)
    assert eager[1][Counter.PAIRS] > buffers.counters[Counter.PAIRS]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_ranks": 7}, "do not divide over 7 ranks"),
        ({"counters": torch.zeros(3, dtype=torch.int64)}, "counters must be"),
        ({"load_P": torch.zeros(999, dtype=torch.int64)}, "load_P must be"),
        ({"record_enabled": torch.ones(1)}, "record_enabled must be"),
        ({"num_valid_tokens": torch.ones(1, dtype=torch.int64)}, "num_valid_tokens must be"),
        ({"logical_to_physical_ER": torch.zeros(2, 2, dtype=torch.int32)}, "has 2 experts"),
        ({"logical_to_physical_ER": torch.zeros(2, 2)}, "logical_to_physical_ER must be"),
    ],
)
def test_wrong_buffers_are_errors(change, message):
    buffers = small()
    for run in (map_and_record, lambda ids, **kw: route(ids, knee_tokens=1.0, **kw)):
        with pytest.raises(ValueError, match=message):
            run(buffers.ids_TK, **{**buffers.arguments(), **change})


def test_strided_ids_are_an_error():
    buffers = small()
    with pytest.raises(ValueError, match="must be contiguous"):
        map_and_record(buffers.ids_TK.repeat(2, 1)[::2], **buffers.arguments())


def test_no_kernel_for_other_devices():
    buffers = small()
    meta = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in buffers.arguments().items()
    }
    with pytest.raises(ValueError, match="got one on meta"):
        route(buffers.ids_TK.to("meta"), knee_tokens=1.0, **meta)
    with pytest.raises(ValueError, match="on meta"):
        map_and_record(buffers.ids_TK.to("meta"), **meta)
