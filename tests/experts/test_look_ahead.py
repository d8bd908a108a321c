"""The guess for the next layer: the same on all ranks, scaled to the batch, none in decode."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_balance.experts.look_ahead import MAX_ROWS, LookAhead
from vllm_balance.kernels.rebalance import Rules, count, schedule
from vllm_balance.types import DynamicSlots, Outcome

E, K, D = 8, 2, 8


def ahead(rank: int = 0, num_ranks: int = 2, all_reduce=lambda t: t, **changes) -> LookAhead:
    settings = {
        "gate": lambda rows: rows,
        "top_k": K,
        "num_experts": E,
        "rank": rank,
        "num_ranks": num_ranks,
        "all_reduce": all_reduce,
        "knee_tokens": 8.0,
    }
    return LookAhead(**(settings | changes))


def test_all_rows_are_seen_by_the_ranks_together():
    hidden_GH = torch.randn(101, D, generator=torch.Generator().manual_seed(1))
    seen = []
    for rank in range(2):
        ahead(rank, all_reduce=lambda t: seen.append(t.clone()) or t).guess(hidden_GH)
    total_E = seen[0] + seen[1]
    true_E = torch.bincount(hidden_GH.topk(K).indices.flatten(), minlength=E)
    assert torch.equal(total_E.long(), true_E)
    guess = ahead(0, all_reduce=lambda t: total_E).guess(hidden_GH)
    assert guess.shape == (1, E) and guess.dtype == torch.int32
    assert torch.equal(guess[0].long(), true_E)


def test_a_large_batch_is_sampled_and_scaled():
    rows = []
    hidden_GH = torch.zeros(64 * MAX_ROWS, D)
    hidden_GH[:, 3] = 2.0
    hidden_GH[:, 5] = 1.0
    look = ahead(gate=lambda part: rows.append(len(part)) or part)
    guess = look.guess(hidden_GH)
    assert rows == [MAX_ROWS]
    assert guess[0, 3] == guess[0, 5] == len(hidden_GH) and int(guess.sum()) == K * len(hidden_GH)


def test_ranks_with_tokens_of_their_own_see_them_all():
    """Of unequal numbers, one with none; where all are sampled, each by the same share."""
    hidden_GH = torch.randn(101, D, generator=torch.Generator().manual_seed(1))
    rows_S = [70, 0, 31]
    parts, seen = hidden_GH.split(rows_S), []
    for rank, part_TH in enumerate(parts):
        look = ahead(rank, 3, all_reduce=lambda t: seen.append(t.clone()) or t)
        look.guess(part_TH, rows_S)
    total_E = sum(seen)
    true_E = torch.bincount(hidden_GH.topk(K).indices.flatten(), minlength=E)
    assert torch.equal(total_E.long(), true_E)
    for rank, part_TH in enumerate(parts):
        guess = ahead(rank, 3, all_reduce=lambda t: total_E).guess(part_TH, rows_S)
        assert torch.equal(guess[0].long(), true_E)
    looked_at = []
    look = ahead(gate=lambda part: looked_at.append(len(part)) or part)
    for own in (4 * MAX_ROWS, MAX_ROWS, 0):
        guess = look.guess(torch.randn(own, D), [4 * MAX_ROWS, MAX_ROWS, 0])
    assert looked_at == [MAX_ROWS, MAX_ROWS // 4, 0] and not guess.any()


def test_a_rank_with_few_tokens_of_a_large_batch_takes_part():
    """All ranks or none: it is a collective."""
    assert ahead().guess(torch.zeros(1, D), [1, 8]) is not None
    assert ahead().guess(torch.zeros(4, D), [4, 4]) is None


def test_few_tokens_ask_nobody():
    def never(tensor):
        raise AssertionError

    assert ahead(gate=never, all_reduce=never).guess(torch.zeros(8, D)) is None
    assert ahead(knee_tokens=7.9).guess(torch.zeros(8, D)) is not None


@given(st.integers(0, 2**32 - 1))
def test_a_batch_that_asks_nobody_is_memory_bound_and_no_larger_bound_would_do(seed):
    """Whatever its experts are. One token more, all on the same two experts, may be a prefill."""
    rng = np.random.default_rng(seed)
    knee, q = int(rng.integers(1, 50)), int(rng.integers(1, 50))
    rules = Rules(threshold_tokens=q, fetch_tokens=q, knee_tokens=float(knee))
    slots = DynamicSlots.empty(num_logical=E, num_ranks=2, num_dynamic=2)

    def outcome(num_tokens: int, choices: int) -> Outcome:
        ids_TK = rng.random((num_tokens, choices)).argsort(1)[:, :K].copy()
        return schedule(count(torch.from_numpy(ids_TK), E)[None], slots, rules).outcome

    for choices in (K, E):
        assert outcome(knee, choices) is Outcome.MEMORY_BOUND
    assert outcome(knee + 1, K) is not Outcome.MEMORY_BOUND
