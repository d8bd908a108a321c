"""The guess for the next layer: the same on all ranks, scaled to the batch, none in decode."""

import torch

from vllm_balance.experts.look_ahead import MAX_ROWS, LookAhead

E, K, D = 8, 2, 8


def ahead(rank: int = 0, num_ranks: int = 2, all_reduce=lambda t: t, **changes) -> LookAhead:
    settings = {
        "gate": lambda rows: rows,
        "top_k": K,
        "num_experts": E,
        "rank": rank,
        "num_ranks": num_ranks,
        "all_reduce": all_reduce,
        "min_pairs": 16.0,
    }
    return LookAhead(**(settings | changes))


def test_all_rows_are_seen_by_the_ranks_together():
    hidden_GD = torch.randn(101, D, generator=torch.Generator().manual_seed(1))
    seen = []
    for rank in range(2):
        ahead(rank, all_reduce=lambda t: seen.append(t.clone()) or t).guess(hidden_GD)
    total_E = seen[0] + seen[1]
    true_E = torch.bincount(hidden_GD.topk(K).indices.flatten(), minlength=E)
    assert torch.equal(total_E.long(), true_E)
    guess = ahead(0, all_reduce=lambda t: total_E).guess(hidden_GD)
    assert guess.shape == (1, E) and guess.dtype == torch.int32
    assert torch.equal(guess[0].long(), true_E)


def test_a_large_batch_is_sampled_and_scaled():
    rows = []
    hidden_GD = torch.zeros(64 * MAX_ROWS, D)
    hidden_GD[:, 3] = 2.0
    hidden_GD[:, 5] = 1.0
    look = ahead(gate=lambda part: rows.append(len(part)) or part)
    guess = look.guess(hidden_GD)
    assert rows == [MAX_ROWS]
    assert guess[0, 3] == guess[0, 5] == len(hidden_GD) and int(guess.sum()) == K * len(hidden_GD)


def test_few_tokens_ask_nobody():
    def never(tensor):
        raise AssertionError

    assert ahead(gate=never, all_reduce=never).guess(torch.zeros(8, D)) is None
    assert ahead(min_pairs=15).guess(torch.zeros(8, D)) is not None
