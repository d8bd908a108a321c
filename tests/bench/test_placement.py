"""Which rows a trace gives: placements are fitted on one half of it and scored on the other."""

import numpy as np

from bench import placement
from vllm_balance.traces import Trace


def test_a_trace_of_one_batch_is_scored_in_batches_of_half_of_it(monkeypatch):
    """64 tokens of 128 experts, which divide over 64 ranks too."""
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
    assert {row["ranks"] for row in rows} == {4, 8, 16, 64}
    assert {(row["batch"], row["tokens"]) for row in rows} == {("decode", 32), ("prefill", 32)}
    assert all((fit.sum(2) == 32 * 8).all() for fit in drawn)


def test_counts_are_thinned_to_whole_batches(monkeypatch):
    monkeypatch.setattr(placement, "SLOWER", (1.0,))
    monkeypatch.setattr(placement, "_scores", lambda *_: {})
    counts_NLE = np.ones((4, 1, 32), np.int32)
    trace = Trace(
        name="t", num_experts=32, top_k=4, layer_index_L=np.arange(1), counts_NLE=counts_NLE
    )
    rows = list(placement.score_trace(trace))
    assert {(row["batch"], row["tokens"]) for row in rows} == {("decode", 256)}
