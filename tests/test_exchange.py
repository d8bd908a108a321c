"""How counts become global: the way for each layout, and the one tensor that is sent."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_balance.errors import BalancerError
from vllm_balance.exchange import counts_per_rank, way_of_exchange


@pytest.mark.parametrize("gathers", [True, False])
def test_tensor_parallel_ranks_hold_all_tokens(gathers):
    assert way_of_exchange(data_parallel_size=1, gathers_tokens=gathers) == "replicated"


@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("asked_for", ["after_gather", "all_reduce"])
def test_tensor_parallel_ranks_have_nothing_to_exchange(asked_for, gathers):
    with pytest.raises(BalancerError, match=f"asks for '{asked_for}', but tensor-parallel ranks"):
        way_of_exchange(data_parallel_size=1, gathers_tokens=gathers, asked_for=asked_for)


def test_a_dispatch_that_gathers_nothing_cannot_be_mapped_after_it():
    with pytest.raises(BalancerError, match="--all2all-backend allgather_reducescatter"):
        way_of_exchange(data_parallel_size=2, gathers_tokens=False, asked_for="after_gather")


@pytest.mark.parametrize(
    ("gathers", "asked_for", "way"),
    [
        (True, "auto", "after_gather"),
        (True, "after_gather", "after_gather"),
        (True, "all_reduce", "all_reduce"),
        (False, "auto", "all_reduce"),
        (False, "all_reduce", "all_reduce"),
    ],
)
@pytest.mark.parametrize("data_parallel_size", [2, 8])
def test_data_parallel_ranks(data_parallel_size, gathers, asked_for, way):
    found = way_of_exchange(
        data_parallel_size=data_parallel_size, gathers_tokens=gathers, asked_for=asked_for
    )
    assert found == way


@given(
    st.integers(1, 12),
    st.lists(st.lists(st.integers(-2, 13), max_size=20), min_size=1, max_size=5),
    st.sampled_from([torch.int32, torch.int64]),
)
def test_every_rank_sends_its_own_row_and_only_experts_count(num_logical, ids_of_rank, dtype):
    sent = []

    def remember(tensor):
        sent.append(tensor.clone())
        return tensor

    for rank, ids in enumerate(ids_of_rank):
        counts_per_rank(
            torch.tensor(ids, dtype=dtype).view(-1, 1),
            num_logical=num_logical,
            rank=rank,
            num_ranks=len(ids_of_rank),
            all_reduce=remember,
        )
    assert len(sent) == len(ids_of_rank)
    for tensor in sent:
        assert tensor.dtype is torch.int32
        assert tensor.shape == (len(ids_of_rank), num_logical)
    counts_SE = torch.stack(sent).sum(0)
    expected = [[ids.count(e) for e in range(num_logical)] for ids in ids_of_rank]
    assert counts_SE.tolist() == expected
