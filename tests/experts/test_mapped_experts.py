"""Experts of a kernel that takes a map: fetched ones behind those that are there, the same sum."""

from contextlib import contextmanager

import pytest
import torch

from vllm_balance.experts.mapped_experts import as_they_arrive

NUM_SLOTS, HIDDEN, TOKENS, TOP_K = 6, 4, 20, 3
MAP_P = torch.tensor([-1, -1, -1, 0, 1, 2, 3, 4, 5, -1], dtype=torch.int32)


class Layer:
    """A rank's slots, of which some hold NaN until they have been waited for."""

    def __init__(self, late: set[int]) -> None:
        generator = torch.Generator().manual_seed(len(late))
        self.weights_S = torch.rand(NUM_SLOTS, generator=generator).double()
        self.hidden_TH = torch.rand(TOKENS, HIDDEN, generator=generator).double()
        choices = torch.rand(TOKENS, len(MAP_P), generator=generator).argsort(1)
        self.ids_TK = choices[:, :TOP_K]
        local_TK = MAP_P[self.ids_TK].long()
        share_TK = torch.where(local_TK >= 0, self.weights_S[local_TK], 0.0)
        self.expected_TH = self.hidden_TH * share_TK.sum(1, keepdim=True)
        self.late = {slot: float(self.weights_S[slot]) for slot in late}
        for slot in late:
            self.weights_S[slot] = torch.nan
        self.memory_TH = torch.empty(TOKENS, HIDDEN, dtype=torch.float64)
        self.said: list[str] = []

    def kernel(self, map_P: torch.Tensor) -> torch.Tensor:
        assert self.is_computing, "a slot could be overwritten meanwhile"
        self.said.append("compute")
        local_TK = map_P[self.ids_TK].long()
        share_TK = torch.where(local_TK >= 0, self.weights_S[local_TK], 0.0)
        return torch.mul(self.hidden_TH, share_TK.sum(1, keepdim=True), out=self.memory_TH)

    def pending(self) -> set[int]:
        return {*self.late}

    def wait(self) -> None:
        self.said.append("wait")
        for slot, weight in self.late.items():
            self.weights_S[slot] = weight

    is_computing = False

    @contextmanager
    def computing(self):
        self.is_computing = True
        yield
        self.is_computing = False


@pytest.mark.parametrize("late", [{4}, {0, 5}, {*range(NUM_SLOTS)}])
def test_the_sum_is_that_of_one_call_behind_the_copies(late):
    layer = Layer(late)
    found_TH = as_they_arrive(layer, MAP_P, layer.kernel)
    assert torch.allclose(found_TH, layer.expected_TH, rtol=1e-12)
    assert layer.said == ["compute", "wait", "compute"]
    assert MAP_P.tolist() == [-1, -1, -1, 0, 1, 2, 3, 4, 5, -1], "vLLM's map is not ours to change"


def test_one_call_where_nothing_is_under_way():
    layer = Layer(set())
    found_TH = as_they_arrive(layer, MAP_P, layer.kernel)
    assert torch.equal(found_TH, layer.expected_TH) and layer.said == ["compute"]


def test_a_copy_that_fails_is_raised_and_nothing_is_returned():
    layer = Layer({2})

    def wait() -> None:
        raise RuntimeError("gone")

    layer.wait = wait
    with pytest.raises(RuntimeError, match="gone"):
        as_they_arrive(layer, MAP_P, layer.kernel)
    assert layer.said == ["compute"]
