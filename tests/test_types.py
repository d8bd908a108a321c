"""Placement: both directions of the map agree, whatever the slots hold."""

import pytest
import torch
from cases import random_case
from hypothesis import given
from hypothesis import strategies as st

from vllm_balance.types import Placement


@st.composite
def slots(draw):
    """(content of the slots, experts, ranks) of any placement in which each expert has a slot."""
    num_ranks = draw(st.integers(1, 8))
    num_logical = draw(st.integers(1, 24))
    per_rank = draw(st.integers(-(-num_logical // num_ranks), 24))
    more = num_ranks * per_rank - num_logical
    extra = draw(st.lists(st.integers(0, num_logical - 1), min_size=more, max_size=more))
    return draw(st.permutations([*range(num_logical), *extra])), num_logical, num_ranks


@given(slots())
def test_both_directions_agree(example):
    content, num_logical, num_ranks = example
    placement = Placement.from_physical_to_logical(
        torch.tensor(content), num_logical=num_logical, num_ranks=num_ranks
    )
    assert placement.physical_to_logical_P.tolist() == content
    assert placement.num_logical == num_logical
    assert placement.num_physical == len(content)
    most = 0
    for expert in range(num_logical):
        held = [slot for slot, logical in enumerate(content) if logical == expert]
        row = placement.logical_to_physical_ER[expert].tolist()
        assert row == held + [-1] * (len(row) - len(held))
        assert placement.num_replicas_E[expert] == len(held)
        most = max(most, len(held))
    assert placement.logical_to_physical_ER.shape == (num_logical, most)
    assert placement.slots_per_rank == len(content) // num_ranks


@given(st.integers(0, 2**32 - 1), st.sampled_from([torch.int32, torch.int64]))
def test_all_tensors_are_int32(seed, dtype):
    made = random_case(seed).placement
    placement = Placement.from_physical_to_logical(
        made.physical_to_logical_P.to(dtype),
        num_logical=made.num_logical,
        num_ranks=made.num_ranks,
    )
    for name in ("physical_to_logical_P", "logical_to_physical_ER", "num_replicas_E"):
        assert getattr(placement, name).dtype is torch.int32
        assert torch.equal(getattr(placement, name), getattr(made, name))


@pytest.mark.parametrize(
    ("content", "num_logical", "num_ranks", "message"),
    [
        ([0, 1, 2], 3, 2, "3 physical experts do not divide over 2 ranks"),
        ([0, 1], 2, 0, "do not divide over 0 ranks"),
        ([0, 1, 2, 3], 3, 2, "names experts 0 to 3; the layer has experts 0 to 2"),
        ([0, -1, 1, 2], 3, 2, "names experts -1 to 2"),
        ([0, 0, 2, 2], 4, 2, r"logical experts \[1, 3\] have no slot"),
        ([], 2, 2, r"logical experts \[0, 1\] have no slot"),
    ],
)
def test_wrong_content_is_an_error(content, num_logical, num_ranks, message):
    with pytest.raises(ValueError, match=message):
        Placement.from_physical_to_logical(
            torch.tensor(content, dtype=torch.int64), num_logical=num_logical, num_ranks=num_ranks
        )


def test_a_placement_cannot_be_changed():
    placement = random_case(0).placement
    with pytest.raises(AttributeError):
        placement.num_ranks = 2
