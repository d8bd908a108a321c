"""Each rank computes its own (token, expert) pairs and no others; the ranks' sum is the layer.

Inputs are small whole numbers and weights are powers of two, so that every pair is exact in every
dtype and results are compared to the bit: a sum that was rounded in between would show.
"""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_balance.errors import BalancerError
from vllm_balance.experts.local_pairs import (
    LocalPairExperts,
    PairBuffers,
    select_local_pairs,
)
from vllm_balance.kernels.local_pairs import select

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
HIDDEN = 6


class Experts:
    """A kernel that multiplies by one matrix per local expert, and remembers what it was given."""

    def __init__(self, num_local: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(num_local)
        shape = (num_local, HIDDEN, HIDDEN)
        self.matrix_EHH = torch.randint(-2, 3, shape, generator=generator).to(dtype)
        self.calls = []

    def __call__(self, out, rows, weights_N1, ids) -> None:
        assert weights_N1.dtype is torch.float32 and ids.dtype is torch.int32
        assert weights_N1.shape == ids.shape == (len(rows), 1)
        assert out.is_contiguous() and rows.is_contiguous()
        assert not rows.isnan().any(), "a row that was not filled"
        self.calls.append((out, rows, ids.flatten().tolist()))
        out.fill_(torch.nan)
        for row, (expert, weight) in enumerate(zip(ids, weights_N1, strict=True)):
            out[row] = (rows[row] @ self.matrix_EHH[expert].squeeze(0)) * weight.to(rows.dtype)


def dense(hidden_TH, weights_TK, local_TK, experts: Experts) -> torch.Tensor:
    """The weighted sum of the local pairs, one pair at a time in float64, rounded once."""
    out_TH = torch.zeros(hidden_TH.shape, dtype=torch.float64)
    for token, row in enumerate(local_TK.tolist()):
        for choice, expert in enumerate(row):
            if expert >= 0:
                pair = hidden_TH[token].double() @ experts.matrix_EHH[expert].double()
                out_TH[token] += pair * weights_TK[token, choice].double()
    return out_TH.to(hidden_TH.dtype)


def tokens(num_tokens: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (num_tokens, HIDDEN), generator=generator).to(dtype)


def weights(ids_TK: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2.0 ** -torch.randint(0, 3, ids_TK.shape, generator=generator).float()


@st.composite
def batches(draw):
    """(physical ids [T, K], expert map [P]) with foreign slots and choices that nobody computes."""
    num_physical = draw(st.integers(1, 9))
    local = draw(st.lists(st.booleans(), min_size=num_physical, max_size=num_physical))
    numbers = iter(range(num_physical))
    expert_map = [next(numbers) if own else -1 for own in local]
    tokens, choices = draw(st.integers(0, 12)), draw(st.integers(1, 4))
    ids = [[draw(st.integers(-1, num_physical - 1)) for _ in range(choices)] for _ in range(tokens)]
    return torch.tensor(ids, dtype=torch.int64).view(tokens, choices), torch.tensor(expert_map)


@given(batches(), st.sampled_from([torch.int32, torch.int64]), st.booleans())
def test_selected_pairs_are_exactly_the_local_ones(batch, dtype, is_strided):
    ids_TK, map_P = batch
    ids_TK = ids_TK.to(dtype)
    weights_TK = torch.rand(ids_TK.shape)
    if is_strided:
        ids_TK, weights_TK = (
            rows_TK.repeat(1, 2)[:, : rows_TK.shape[1]] for rows_TK in (ids_TK, weights_TK)
        )
    pairs = select_local_pairs(ids_TK, weights_TK, map_P.to(torch.int32))
    expected = [
        (token, int(map_P[slot]), float(weights_TK[token, choice]))
        for token, row in enumerate(ids_TK.tolist())
        for choice, slot in enumerate(row)
        if slot >= 0 and map_P[slot] >= 0
    ]
    found = zip(
        pairs.token_N.tolist(),
        pairs.expert_N1.flatten().tolist(),
        pairs.weight_N1.flatten().tolist(),
        strict=True,
    )
    assert list(found) == expected
    firsts = [sum(token < t for token, _, _ in expected) for t in range(len(ids_TK))]
    assert pairs.first_T.tolist() == firsts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk_ids_TK": torch.zeros(4, 2)}, "the slots must be int32 or int64"),
        ({"topk_ids_TK": torch.zeros(2, 4, dtype=torch.int32).T}, "must be dense"),
        ({"topk_weights_TK": torch.zeros(4, 3)}, r"\[T, K\] alike"),
        ({"topk_weights_TK": torch.zeros(4, 2).double()}, "weights must be a contiguous"),
        ({"local_P": torch.zeros(3, dtype=torch.int64)}, "local_P must be a contiguous"),
        ({"topk_ids_TK": torch.zeros(4, 2, dtype=torch.int32, device="meta")}, "got meta"),
    ],
)
def test_tensors_that_the_kernel_cannot_take_are_errors(change, message):
    arguments = {
        "topk_ids_TK": torch.zeros(4, 2, dtype=torch.int32),
        "topk_weights_TK": torch.zeros(4, 2),
        "local_P": torch.zeros(3, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        select(**(arguments | change))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(batches(), st.integers(0, 2**31))
def test_output_is_the_sum_of_the_local_pairs(dtype, batch, seed):
    ids_TK, map_P = batch
    hidden_TH, weights_TK = tokens(len(ids_TK), dtype, seed), weights(ids_TK, seed)
    kernel = Experts(int((map_P >= 0).sum()), dtype)
    output_TH = torch.full_like(hidden_TH, torch.nan)
    LocalPairExperts(map_P)(output_TH, hidden_TH, weights_TK, ids_TK, kernel)

    local_TK = torch.where(ids_TK >= 0, map_P[ids_TK.clamp(min=0)], -1)
    assert torch.equal(output_TH, dense(hidden_TH, weights_TK, local_TK, kernel))
    computed = [expert for _, _, experts in kernel.calls for expert in experts]
    assert computed == local_TK[local_TK >= 0].tolist()
    assert len(kernel.calls) == (len(computed) > 0)


def test_layers_share_their_buffers():
    """48 layers with rows of their own would take gibibytes that no check of memory knows."""
    map_P, buffers = torch.tensor([0, -1, 1, -1]), PairBuffers()
    layers = [LocalPairExperts(map_P, buffers) for _ in range(3)]
    kernels = [Experts(2, torch.float32) for _ in layers]
    hidden_TH, ids_TK = (
        tokens(5, torch.float32),
        torch.tensor([[0, 2], [1, 3], [2, 0], [0, 1], [3, 2]]),
    )
    weights_TK = weights(ids_TK)
    local_TK = map_P[ids_TK]
    for experts, kernel in zip(layers, kernels, strict=True):
        output_TH = torch.full_like(hidden_TH, torch.nan)
        experts(output_TH, hidden_TH, weights_TK, ids_TK, kernel)
        assert torch.equal(output_TH, dense(hidden_TH, weights_TK, local_TK, kernel))
    rows = {kernel.calls[0][1]._base.data_ptr() for kernel in kernels}
    assert len(rows) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reused_buffers_leak_nothing_of_the_batch_before(dtype):
    map_P = torch.tensor([0, -1, 1, -1])
    experts, kernel = LocalPairExperts(map_P), Experts(2, dtype)

    def run(ids) -> tuple[torch.Tensor, torch.Tensor]:
        ids_TK = torch.tensor(ids)
        hidden_TH, weights_TK = tokens(len(ids), dtype), weights(ids_TK)
        output_TH = torch.full_like(hidden_TH, torch.nan)
        experts(output_TH, hidden_TH, weights_TK, ids_TK, kernel)
        local_TK = torch.where(ids_TK >= 0, map_P[ids_TK.clamp(min=0)], -1)
        return output_TH, dense(hidden_TH, weights_TK, local_TK, kernel)

    run([[0, 2]] * 8)
    first_rows, first_out = (tensor._base for tensor in kernel.calls[0][:2])
    for ids in ([[0, 1]], [[2, 0], [1, 3], [3, 2]], [[1, 3]], [[-1, -1]], [[0, 2]] * 7):
        first_rows.fill_(torch.nan)
        first_out.fill_(torch.nan)
        found, expected = run(ids)
        assert torch.equal(found, expected)
    for out, rows, _ in kernel.calls[1:]:
        assert {out._base.data_ptr(), rows._base.data_ptr()} == {
            first_rows.data_ptr(),
            first_out.data_ptr(),
        }


def test_buffers_grow_and_follow_the_dtype():
    experts = LocalPairExperts(torch.tensor([0]))
    for num_tokens, dtype in ((2, torch.float32), (9, torch.float32), (4, torch.bfloat16)):
        kernel = Experts(1, dtype)
        hidden_TH = tokens(num_tokens, dtype)
        output_TH = torch.empty_like(hidden_TH)
        ids_TK, weights_TK = (
            torch.zeros(num_tokens, 1, dtype=torch.int64),
            torch.ones(num_tokens, 1),
        )
        experts(output_TH, hidden_TH, weights_TK, ids_TK, kernel)
        assert torch.equal(output_TH, dense(hidden_TH, weights_TK, ids_TK, kernel))


@pytest.mark.parametrize("ids", [[], [[1, 1], [1, -1]]], ids=["no tokens", "all foreign"])
def test_nothing_to_compute_calls_no_kernel_and_writes_zeros(ids):
    ids_TK = torch.tensor(ids, dtype=torch.int64).view(-1, 2)
    kernel = Experts(1, torch.float32)
    output_TH = torch.full((len(ids_TK), HIDDEN), torch.nan)
    LocalPairExperts(torch.tensor([0, -1]))(
        output_TH, tokens(len(ids_TK), torch.float32), weights(ids_TK), ids_TK, kernel
    )
    assert torch.equal(output_TH, torch.zeros_like(output_TH))
    assert kernel.calls == []


def test_output_may_be_the_input():
    kernel = Experts(2, torch.float64)
    hidden_TH = tokens(5, torch.float64)
    ids_TK = torch.tensor([[0, 1], [1, 0], [0, 2], [2, 2], [1, -1]])
    weights_TK, map_P = weights(ids_TK), torch.tensor([0, 1, -1])
    separate_TH = torch.empty_like(hidden_TH)
    LocalPairExperts(map_P)(separate_TH, hidden_TH, weights_TK, ids_TK, kernel)
    LocalPairExperts(map_P)(hidden_TH, hidden_TH, weights_TK, ids_TK, kernel)
    assert torch.equal(hidden_TH, separate_TH)


class Late:
    """Slots that have not arrived: their matrices are broken until somebody waits."""

    def __init__(self, kernel: Experts, pending: set[int], error: BalancerError | None) -> None:
        self.kernel, self.slots, self.error = kernel, pending, error
        self.whole_EHH = kernel.matrix_EHH.clone()
        self.waits, self.inside = 0, 0
        kernel.matrix_EHH[[*pending]] = torch.nan

    def pending(self) -> set[int]:
        return self.slots

    def wait(self) -> None:
        assert self.inside
        self.waits += 1
        if self.error is not None:
            raise self.error
        self.kernel.matrix_EHH.copy_(self.whole_EHH)

    @contextmanager
    def computing(self):
        self.inside += 1
        yield
        self.inside -= 1


@given(batches(), st.sets(st.integers(0, 8)), st.sampled_from(DTYPES))
def test_late_experts_are_computed_behind_the_others_and_change_no_bit(batch, pending, dtype):
    ids_TK, map_P = batch
    num_local = max(1, int((map_P >= 0).sum()))
    pending = {slot for slot in pending if slot < num_local}
    hidden_TH, weights_TK = tokens(len(ids_TK), dtype), weights(ids_TK)
    kernel = Experts(num_local, dtype)
    local_TK = torch.where(ids_TK >= 0, map_P[ids_TK.clamp(min=0)], -1)
    expected_TH = dense(hidden_TH, weights_TK, local_TK, kernel)
    late = Late(kernel, pending, None)
    experts = LocalPairExperts(map_P)
    experts.arrivals = late
    output_TH = torch.full_like(hidden_TH, torch.nan)
    experts(output_TH, hidden_TH, weights_TK, ids_TK, kernel)
    assert torch.equal(output_TH, expected_TH)
    of_calls = [set(ids) for _, _, ids in kernel.calls]
    used = set(local_TK[local_TK >= 0].tolist())
    assert of_calls == [part for part in (used - pending, used & pending) if part]
    assert late.waits == bool(used & pending) and late.inside == 0


def test_an_expert_that_cannot_arrive_is_an_error_and_not_a_number():
    kernel = Experts(2, torch.float32)
    experts = LocalPairExperts(torch.tensor([0, 1]))
    experts.arrivals = Late(kernel, {1}, BalancerError("the copy failed."))
    ids_TK = torch.tensor([[0, 1], [1, 0]])
    output_TH = torch.full((2, HIDDEN), torch.nan)
    with pytest.raises(BalancerError, match="the copy failed"):
        experts(output_TH, tokens(2, torch.float32), weights(ids_TK), ids_TK, kernel)
    assert [ids for _, _, ids in kernel.calls] == [[0, 0]], "only the expert that was there"


def test_batches_without_own_pairs_take_no_time():
    experts = LocalPairExperts(torch.tensor([0, -1]))
    for ids_TK in (torch.tensor([[1, 1]]), torch.empty((0, 2), dtype=torch.int64)):
        hidden_TH = tokens(len(ids_TK), torch.float32)
        output_TH = torch.empty_like(hidden_TH)
        experts(output_TH, hidden_TH, weights(ids_TK), ids_TK, Experts(1, torch.float32))
    assert list(experts.recent_ns) == [0, 0]
