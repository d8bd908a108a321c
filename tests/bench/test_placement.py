"""Which rows a trace gives: placements are fitted on one half of it and scored on the other."""

import numpy as np
import pytest

from bench import placement
from bench.provenance import ROOT
from vllm_balance import profiles
from vllm_balance.cost import fit
from vllm_balance.traces import Trace


def trace_of_counts() -> Trace:
    """Four batches of one layer, without the experts of single tokens."""
    counts_NLE = np.ones((4, 1, 32), np.int32)
    return Trace(
        name="t", num_experts=32, top_k=4, layer_index_L=np.arange(1), counts_NLE=counts_NLE
    )


def test_a_trace_of_one_batch_is_scored_in_batches_of_half_of_it(monkeypatch):
    """64 tokens of 128 experts, which divide over 64 ranks too. Batches of prefill are half as
    large: of 32 tokens all would be the same one."""
    drawn = []

    def scores(fit, held_out, cluster):
        drawn.append(fit)
        return {}

    monkeypatch.setattr(placement, "SLOWER", (1.0,))
    monkeypatch.setattr(placement, "_scores", scores)
    random = np.random.default_rng(0)
    ids_TLK = np.argsort(random.random((64, 1, 128)), axis=2)[..., :8]
    trace = Trace(
        name="t", num_experts=128, top_k=8, layer_index_L=np.array([12]), topk_ids_TLK=ids_TLK
    )
    rows = list(placement.score_trace(trace))
    assert {row["ranks"] for row in rows} == {2, 4, 8, 16, 64}
    assert {(row["batch"], row["tokens"]) for row in rows} == {("decode", 32), ("prefill", 16)}
    assert {int(pairs) for fit in drawn for pairs in np.unique(fit.sum(2))} == {32 * 8, 16 * 8}


def test_batches_of_prefill_hold_prompts_alone_on_both_halves(monkeypatch):
    """A trace without requests, prompts first: its second half has none. Experts 0 to 3 are of
    prompts, 4 to 7 of generated tokens."""
    drawn = {"decode": [], "prefill": []}

    def batches(part, kind, batch, seed):
        drawn[kind].append(part.topk_ids_TLK)
        return np.ones((2, 1, 8), int)

    monkeypatch.setattr(placement, "_batches", batches)
    monkeypatch.setattr(placement, "_scores", lambda *_: {})
    phase_T = np.repeat([0, 1], [40, 60])
    ids_TLK = (4 * phase_T + np.arange(100) % 4)[:, None, None]
    trace = Trace(name="t", num_experts=8, top_k=1, layer_index_L=np.arange(1),
                  topk_ids_TLK=ids_TLK, phase_T=phase_T)  # fmt: skip
    rows = list(placement.score_trace(trace))
    assert {(row["batch"], row["tokens"]) for row in rows} == {("decode", 30), ("prefill", 10)}
    assert [len(ids) for ids in drawn["prefill"]] == [20, 20]
    assert all((ids < 4).all() for ids in drawn["prefill"])
    assert all((ids >= 4).all() for ids in drawn["decode"])


def test_the_cpu_is_the_one_of_the_profile():
    """Its curve is what the points of the committed file give."""
    profile = profiles.load(ROOT / "configs" / "hardware" / "cpu-amx.profile.json")
    points = [point for rank in profile.ranks for point in rank.points]
    tokens_NE = [np.array(point.tokens_E) for point in points]
    found = fit(tokens_NE, np.array([point.time_us for point in points])).model
    cost = placement.COSTS["cpu-amx"]
    assert (cost.in_turn, cost.tile_tokens, cost.free_tokens) == (True, 32, 32)
    for name in ("a_us", "b_us", "beta_us", "tile_us"):
        assert getattr(cost, name) == pytest.approx(getattr(found, name), rel=0.01, abs=0.1)


def test_counts_are_thinned_to_whole_batches(monkeypatch):
    monkeypatch.setattr(placement, "SLOWER", (1.0,))
    monkeypatch.setattr(placement, "_scores", lambda *_: {})
    rows = list(placement.score_trace(trace_of_counts()))
    assert {(row["batch"], row["tokens"]) for row in rows} == {("decode", 256)}


def test_of_two_ranks_either_is_slowed(monkeypatch):
    costs = []
    monkeypatch.setattr(placement, "RANKS", (2, 4))
    monkeypatch.setattr(placement, "_scores", lambda fit, held, c: costs.append(c.costs) or {})
    rows = [r for r in placement.score_trace(trace_of_counts()) if r["cost"] == "tempo"]
    slower = [(r["ranks"], r["slower"], r["slow_rank"]) for r in rows]
    assert slower[:3] == [(2, 1.0, 0), (2, 1.08, 0), (2, 1.08, 1)]
    assert slower[7:] == [(4, s, 0) for s in placement.SLOWER]
    for (_, factor, rank), of_case in zip(slower, costs, strict=False):
        found = [cost.b_us / placement.COSTS["tempo"].b_us for cost in of_case]
        assert found[rank] == pytest.approx(factor) and found.count(1.0) >= len(found) - 1


def test_the_table_of_two_ranks_says_what_the_bound_leaves():
    def row(gem: float, bound: float, **changes) -> dict:
        case = {"batch": "decode", "cost": "tempo", "ranks": 2, "slower": 1.16}
        return case | {"held_out_us": {"linear": 100.0, "gem": gem, "bound": bound}} | changes

    rows = [
        row(95.0, 90.0, slow_rank=0),
        row(93.0, 92.0, slow_rank=1),
        row(80.0, 70.0, slower=1.28),
        row(50.0, 50.0, ranks=4),
        row(50.0, 50.0, slower=1.0),
    ]
    _, body = placement.TABLES["two_ranks"](rows)
    assert body == [
        ["decode", "tempo", "16%", "-6.0%", "-7.0%", "-9.0%", "-10.0%", "2"],
        ["decode", "tempo", "28%", "-20.0%", "-20.0%", "-30.0%", "-30.0%", "1"],
        ["all", "", "", "-10.7%", "-20.0%", "-16.0%", "-30.0%", "3"],
    ]
