"""Routing replay: distinct experts, the asked skew, the same on every rank that shares tokens."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe.router.routing_simulator_router import RoutingSimulator

from vllm_balance.replay import STRATEGY, Replay, register
from vllm_balance.replay_rows import ReplaySettings

SHAPE = {"num_layers": 3, "num_experts": 32, "top_k": 4}
HOT = {"experts": 6, "fraction": 0.6}


def replay(rank: int = 0, shape: dict[str, int] = SHAPE, **settings: object) -> Replay:
    return Replay(ReplaySettings.model_validate(settings), rank=rank, **shape)


def counts(rows_NK: torch.Tensor, num_experts: int = 32) -> np.ndarray:
    return np.bincount(rows_NK.flatten().numpy(), minlength=num_experts)


def assert_distinct(rows_NK: torch.Tensor, num_experts: int) -> None:
    ordered = rows_NK.sort(dim=1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    assert ordered.min() >= 0
    assert ordered.max() < num_experts


def write_trace(path: Path, topk_ids: np.ndarray, num_experts: int = 32) -> Path:
    np.savez(path, topk_ids=topk_ids, num_experts=num_experts, top_k=topk_ids.shape[-1])
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    random = np.random.default_rng(5)
    ids = random.random((100, 2, 32)).argsort(axis=2)[..., :4].astype(np.uint8)
    return write_trace(tmp_path / "trace.npz", ids)


@pytest.mark.parametrize("source", [{"zipf": 0.8}, {"zipf": 0.0}, {"zipf": 3.0}, {"hot": HOT}])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 8192, 20000])
def test_each_token_gets_distinct_experts(source: dict, num_tokens: int) -> None:
    rows_TK = replay(**source).rows(1, num_tokens)
    assert rows_TK.shape == (num_tokens, 4)
    assert rows_TK.dtype == torch.int32
    if num_tokens:
        assert_distinct(rows_TK, 32)


@pytest.mark.parametrize("top_k", [1, 8])
def test_a_token_may_use_one_expert_or_all_of_them(top_k: int) -> None:
    shape = {"num_layers": 1, "num_experts": 8, "top_k": top_k}
    assert_distinct(replay(shape=shape, zipf=1.0).rows(0, 50), 8)


def test_ranks_that_share_tokens_agree_whatever_the_batch_sizes() -> None:
    one, other = replay(zipf=0.8, change_every=3), replay(zipf=0.8, change_every=3)
    for num_tokens in (5, 0, 3000, 8192, 1, 17):
        for layer in range(3):
            assert torch.equal(one.rows(layer, num_tokens), other.rows(layer, num_tokens))


def test_data_parallel_ranks_draw_other_tokens_from_the_same_distribution(trace: Path) -> None:
    for source in ({"zipf": 0.8}, {"hot": HOT}, {"trace": trace}):
        rows_0, rows_1 = replay(0, **source).rows(0, 8192), replay(1, **source).rows(0, 8192)
        assert not torch.equal(rows_0, rows_1)
        # 32,768 pairs: the standard deviation of one expert's share is below 0.003.
        assert np.abs(counts(rows_0) - counts(rows_1)).max() / rows_0.numel() < 0.015


def test_layers_and_seeds_differ() -> None:
    popular = {
        int(counts(replay(zipf=1.2, seed=seed).rows(layer, 8192)).argmax())
        for seed in range(4)
        for layer in range(3)
    }
    assert len(popular) > 4


def test_zipf_gives_a_single_choice_its_popularity() -> None:
    shape = {"num_layers": 1, "num_experts": 16, "top_k": 1}
    share = np.sort(counts(replay(shape=shape, zipf=0.8, rows=50_000).rows(0, 50_000), 16))[::-1]
    popularity = np.arange(1, 17) ** -0.8
    # Three standard deviations of a share estimated from 50,000 draws are 0.006.
    np.testing.assert_allclose(share / share.sum(), popularity / popularity.sum(), atol=0.006)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.6, 1.0])
def test_hot_experts_get_their_fraction_of_the_pairs(fraction: float) -> None:
    per_expert = counts(replay(hot={"experts": 6, "fraction": fraction}).rows(2, 8192))
    hottest = np.sort(per_expert)[-6:].sum() if fraction > 6 / 32 else np.sort(per_expert)[:6].sum()
    assert hottest / per_expert.sum() == pytest.approx(fraction, abs=0.01)


def test_hot_experts_are_at_home_on_one_rank_which_changes_with_them() -> None:
    hot = {"experts": 6, "fraction": 0.9, "ranks": 4}
    changing = replay(hot=hot, change_every=1)
    homes = set()
    for _ in range(12):
        hottest = np.argsort(counts(changing.rows(0, 4096)))[-6:]
        assert len(set(hottest // 8)) == 1
        homes.add(int(hottest[0]) // 8)
    assert len(homes) > 1
    assert torch.equal(replay(0, hot=hot).rows(0, 0), replay(1, hot=hot).rows(0, 0))


def test_fractions_follow_each_other_with_the_changes() -> None:
    hot = {"experts": 6, "fraction": 0.9, "ranks": 4, "further_fractions": [0.5, 0.25]}
    changing = replay(hot=hot, change_every=2)
    for batch in range(12):
        per_expert = counts(changing.rows(1, 4096))
        shares = np.sort(per_expert)[-6:].sum() / per_expert.sum()
        assert shares == pytest.approx([0.9, 0.5, 0.25][batch // 2 % 3], abs=0.02)


@pytest.mark.parametrize(("experts", "ranks"), [(9, 4), (2, 5)])
def test_hot_experts_that_no_rank_can_have_are_refused(experts: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="at home on one of"):
        replay(hot={"experts": experts, "fraction": 0.5, "ranks": ranks})


def test_the_popular_experts_change_after_the_asked_number_of_batches() -> None:
    changing = replay(zipf=2.0, change_every=2, rows=4096)
    popular = [int(counts(changing.rows(0, 4096)).argmax()) for _ in range(8)]
    assert all(popular[i] == popular[i + 1] for i in range(0, 8, 2))
    assert len(set(popular)) > 1


def test_rows_continue_where_the_last_batch_ended_and_start_over() -> None:
    whole = replay(zipf=0.5, rows=100).rows(0, 100)
    pieces = replay(zipf=0.5, rows=100)
    joined = torch.cat([pieces.rows(0, n) for n in (30, 60, 25, 85)])
    assert torch.equal(joined, whole.repeat(2, 1))


def test_the_caller_may_overwrite_what_it_got() -> None:
    overwritten, untouched = replay(zipf=0.5, rows=8), replay(zipf=0.5, rows=8)
    for _ in range(2):
        overwritten.rows(0, 8).fill_(-1)
        untouched.rows(0, 8)
    assert torch.equal(overwritten.rows(0, 8), untouched.rows(0, 8))


def test_trace_rows_are_recorded_rows_and_tokens_stay_together(trace: Path) -> None:
    recorded = np.load(trace)["topk_ids"].astype(int)
    played = replay(trace=trace, seed=3)
    rows = np.stack([played.rows(layer, 500).numpy() for layer in range(3)], axis=1)
    known = {token.tobytes() for token in recorded}
    assert all(token.tobytes() in known for token in rows[:, :2].astype(int))
    # The model has one layer more than the trace: it starts over.
    assert (rows[:, 2] == rows[:, 0]).all()


def test_counts_are_replayed_by_their_weight(tmp_path: Path) -> None:
    """Two steps: experts 0 to 3 only, or 4 to 9 with one that every token wants."""
    counts = np.zeros((2, 2, 32), int)
    counts[0, :, :4], counts[1, :, 4:9], counts[1, :, 9] = 50, 10, 10**6
    np.savez(tmp_path / "counts.npz", counts=counts, num_experts=32, top_k=4)
    rows_NK = replay(trace=tmp_path / "counts.npz").rows(0, 4000).numpy()
    assert_distinct(torch.from_numpy(rows_NK), 32)
    of_first_N = (rows_NK < 4).all(1)
    assert 0.45 < of_first_N.mean() < 0.55
    of_second_NK = rows_NK[~of_first_N]
    assert ((of_second_NK >= 4) & (of_second_NK <= 9)).all()
    assert (of_second_NK == 9).any(1).all()


def test_traces_of_another_shape_and_broken_files_are_refused(trace: Path, tmp_path: Path) -> None:
    ids = np.load(trace)["topk_ids"]
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "counts.npz", counts=np.zeros(3))
    twice, high = ids.copy(), ids.copy()
    twice[7, 1, 2] = twice[7, 1, 0]
    high[0, 0, 0] = 32
    cases = {
        "does not exist": tmp_path / "none.npz",
        r"is not an \.npz file": tmp_path / "text.npz",
        "counts has dtype float64": tmp_path / "counts.npz",
        "64 experts and top-4, but the model has 32": write_trace(tmp_path / "a.npz", ids, 64),
        "32 experts and top-3, but": write_trace(tmp_path / "b.npz", ids[..., :3]),
        "uses one expert twice": write_trace(tmp_path / "c.npz", twice),
        "allowed are 0 to 31": write_trace(tmp_path / "d.npz", high),
        "three non-empty axes": write_trace(tmp_path / "e.npz", ids[0]),
    }
    for message, path in cases.items():
        with pytest.raises(ValueError, match=message):
            replay(trace=path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one"),
        ({"zipf": 0.8, "hot": HOT}, "exactly one"),
        ({"zipf": -1}, "greater than or equal to 0"),
        ({"zipf": 0.8, "chnge_every": 4}, "chnge_every"),
        ({"trace": "t.npz", "change_every": 4}, "change_every"),
        ({"hot": {"experts": 3, "fraction": 2}}, "less than or equal to 1"),
        ({"hot": HOT | {"further_fractions": [0.5]}}, "need change_every"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ReplaySettings.model_validate(settings)


@pytest.mark.parametrize("hot", [{"experts": 2, "fraction": 0.9}, {"experts": 30, "fraction": 0.1}])
def test_a_hot_fraction_that_no_token_can_have_is_refused(hot: dict) -> None:
    with pytest.raises(ValueError, match=r"change hot\.experts or hot\.fraction"):
        replay(hot=hot)


def simulate(num_tokens: int, *, num_experts: int = 32, top_k: int = 4):
    return RoutingSimulator.simulate_routing(
        hidden_states=torch.zeros(num_tokens, 8),
        router_logits=torch.zeros(num_tokens, num_experts),
        strategy_name=STRATEGY,
        top_k=top_k,
        indices_type=torch.int32,
    )


@pytest.fixture
def registered():
    """The three layers' tables, registered in vLLM; the registry is restored afterwards."""
    settings = ReplaySettings(zipf=0.8)
    register(settings, **SHAPE)
    yield replay(zipf=0.8)
    RoutingSimulator._routing_strategies.pop(STRATEGY)


def test_vllm_asks_layer_after_layer_and_a_cut_pass_leaves_nothing_behind(registered) -> None:
    config = VllmConfig()
    for num_layers_run in (3, 1, 3, 2, 3):
        with set_forward_context(None, config, num_tokens=5):
            for layer in range(num_layers_run):
                weights, ids = simulate(5)
                assert torch.equal(ids, registered.rows(layer, 5))
                assert weights.dtype == torch.float32
                assert torch.equal(weights.sum(dim=1), torch.ones(5))


def test_a_model_of_another_shape_is_refused_while_routing(registered) -> None:
    refused = pytest.raises(ValueError, match="the router has 64 experts and top-4")
    with set_forward_context(None, VllmConfig(), num_tokens=5), refused:
        simulate(5, num_experts=64)


def test_outside_a_forward_pass_vllm_says_so(registered) -> None:
    with pytest.raises(AssertionError, match="Forward context is not set"):
        simulate(5)


def lines_of(call: Callable[[], object]) -> int:
    """How many lines of Python a call runs."""
    lines = 0

    def trace(frame: object, event: str, argument: object) -> Callable[..., object]:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines


def test_routing_has_no_loop_over_tokens() -> None:
    """Its cost per batch is that of a few tensor operations, however many tokens there are."""
    big = Replay(ReplaySettings(zipf=0.8), num_layers=1, num_experts=128, top_k=8)
    few, many = (lines_of(lambda n=n: big.rows(0, n).to(torch.int64)) for n in (16, 2048))
    assert few == many < 100
