"""Traces: read back as written, drawn as documented, damaged files refused."""

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_balance import traces
from vllm_balance.errors import BalancerError
from vllm_balance.recording import Phase
from vllm_balance.trace_summary import drift_of_tenths, groups, main_phase, summarise
from vllm_balance.traces import Trace


def token_trace(num_tokens=400, num_layers=3, num_experts=8, top_k=2, seed=0, **changes) -> Trace:
    random = np.random.default_rng(seed)
    noise = random.random((num_tokens, num_layers, num_experts))
    fields = {
        "name": "t",
        "num_experts": num_experts,
        "top_k": top_k,
        "layer_index_L": np.arange(num_layers) + 1,
        "topk_ids_TLK": np.argsort(noise, axis=2)[..., :top_k].astype(np.uint8),
        "request_id_T": np.repeat(np.arange(num_tokens // 20), 20),
        "phase_T": np.tile(np.repeat([0, 1], 10), num_tokens // 20),
    }
    return Trace(**fields | changes)


def count_trace() -> Trace:
    counts = np.random.default_rng(1).integers(0, 50, (6, 3, 8))
    return Trace(name="c", num_experts=8, top_k=2, layer_index_L=np.arange(3), counts_NLE=counts)


def equal(left: Trace, right: Trace) -> bool:
    fields = ("topk_ids_TLK", "counts_NLE", "request_id_T", "phase_T", "phase_N", "layer_index_L")
    return all(
        np.array_equal(getattr(left, f), getattr(right, f))
        if getattr(left, f) is not None
        else getattr(right, f) is None
        for f in fields
    ) and (left.num_experts, left.top_k) == (right.num_experts, right.top_k)


@pytest.mark.parametrize(
    "trace", [token_trace(), count_trace(), replace(count_trace(), phase_N=np.arange(6) % 3)]
)
def test_what_is_written_comes_back(tmp_path, trace):
    traces.save(tmp_path / "t.npz", trace)
    assert equal(traces.load(tmp_path / "t.npz"), trace)


def test_steps_have_the_batch_s_pairs_and_depend_on_the_seed_only():
    trace = token_trace()
    steps_NLE = trace.steps(batch=16, num_steps=5, seed=3)
    assert steps_NLE.shape == (5, 3, 8) and (steps_NLE.sum(2) == 32).all()
    assert np.array_equal(steps_NLE, trace.steps(16, 5, 3))
    assert not np.array_equal(steps_NLE, trace.steps(16, 5, 4))


def test_steps_take_decode_tokens_of_different_requests():
    """Expert e of layer 0 marks the request, expert of layer 1 the phase."""
    ids = np.zeros((80, 2, 1), np.uint8)
    request, phase = np.repeat(np.arange(8), 10), np.tile(np.arange(10) >= 5, 8)
    ids[:, 0, 0], ids[:, 1, 0] = request, phase
    trace = Trace(
        name="t",
        num_experts=8,
        top_k=1,
        layer_index_L=np.arange(2),
        topk_ids_TLK=ids,
        request_id_T=request,
        phase_T=phase.astype(np.uint8),
    )
    steps_NLE = trace.steps(batch=8, num_steps=20, seed=0)
    assert (steps_NLE[:, 0] == 1).all()
    assert (steps_NLE[:, 1, 1] == 8).all()
    assert (trace.steps(12, 20, 0)[:, 0] <= 2).all()


def test_prefill_steps_take_prompt_tokens_where_a_trace_knows_them():
    """Expert 0 is of prompts, expert 1 of generated tokens; without prompts all are taken."""
    phase = np.tile([0, 1, 1, 0], 20).astype(np.uint8)
    trace = Trace(
        name="t",
        num_experts=2,
        top_k=1,
        layer_index_L=np.arange(1),
        topk_ids_TLK=phase[:, None, None],
        request_id_T=np.repeat(np.arange(4), 20),
        phase_T=phase,
    )
    assert trace.prefill_steps(10, 6, 0)[:, 0].tolist() == [[10, 0]] * 6
    assert trace.prefill_steps(10_000, 1, 0)[0, 0].tolist() == [40, 0]
    decoded = replace(trace, phase_T=np.ones(80, np.uint8))
    assert decoded.prefill_steps(80, 1, 0)[0, 0].tolist() == [40, 40]


def test_counts_are_thinned_to_the_batch_and_kept_where_they_were_zero():
    trace = count_trace()
    trace.counts_NLE[:, 1, 4] = 0
    steps_NLE = trace.steps(batch=10, num_steps=7, seed=0)
    assert (steps_NLE.sum(2) == 20).all() and (steps_NLE[:, 1, 4] == 0).all()
    assert np.array_equal(trace.chunks(5), trace.counts_NLE)


def test_counts_are_thinned_from_steps_of_the_phase_that_is_asked_for():
    counts = np.zeros((6, 3, 8), np.int64)
    counts[[0, 3], :, 0], counts[[1, 4], :, 1], counts[[2, 5], :, 2] = 10, 10, 10
    phases = np.array([0, 1, 2] * 2)
    trace = replace(count_trace(), counts_NLE=counts, phase_N=phases)
    assert (trace.steps(5, 4, 0)[..., 1] == 10).all()
    assert (trace.prefill_steps(5, 4, 0)[..., 0] == 10).all()
    only_mixed = replace(trace, phase_N=np.full(6, 2))
    assert only_mixed.steps(5, 40, 0)[..., :3].any((0, 1)).all()
    assert trace.split()[1].phase_N.tolist() == [0, 1, 2]


def test_recorded_steps_are_rows_of_the_file_in_their_order():
    counts = np.arange(40)[:, None, None] + np.zeros((40, 3, 8), np.int64)
    trace = replace(count_trace(), counts_NLE=counts, phase_N=np.arange(40) % 4 // 3)
    drawn = trace.recorded_steps(10, seed=3)
    assert drawn.shape == (10, 3, 8) and drawn.dtype == np.int32
    assert (np.diff(drawn[:, 0, 0]) > 0).all() and (drawn == drawn[:, :1, :1]).all()
    assert np.array_equal(drawn, trace.recorded_steps(10, 3))
    assert not np.array_equal(drawn, trace.recorded_steps(10, 4))
    assert np.array_equal(trace.recorded_steps(99, 0), counts)
    decode = trace.of_phase(Phase.DECODE)
    assert decode.recorded_steps(99, 0)[:, 0, 0].tolist() == list(range(3, 40, 4))


def test_a_phase_that_was_not_recorded_is_refused_with_those_that_were():
    trace = replace(count_trace(), phase_N=np.array([0, 0, 0, 1, 2, 2]))
    assert trace.phases() == {Phase.PREFILL: 3, Phase.DECODE: 1, Phase.MIXED: 2}
    assert main_phase(trace) == Phase.PREFILL and main_phase(count_trace()) is None
    with pytest.raises(BalancerError, match="has 3 prefill among its steps"):
        trace.of_phase(Phase.PREFILL).of_phase(Phase.MIXED)
    with pytest.raises(BalancerError, match="has no phases among its steps"):
        count_trace().of_phase(Phase.DECODE)
    with pytest.raises(BalancerError, match="has 200 prefill, 200 decode among its tokens"):
        token_trace().of_phase(Phase.MIXED)
    assert len(token_trace().of_phase(Phase.DECODE).topk_ids_TLK) == 200


def test_tokens_of_counts_follow_from_their_pairs():
    tokens = token_trace()
    counts = replace(count_trace(), counts_NLE=tokens.chunks(25))
    assert tokens.num_tokens == counts.num_tokens == 400


def test_prefill_steps_are_whole_requests_in_another_order():
    """Expert of layer 0 marks the request of ten tokens: a batch of 20 touches two or three."""
    request = np.repeat(np.arange(8), 10)
    ids = request.astype(np.uint8)[:, None, None]
    trace = Trace(
        name="t",
        num_experts=8,
        top_k=1,
        layer_index_L=np.arange(1),
        topk_ids_TLK=ids,
        request_id_T=request,
    )
    steps_NE = trace.prefill_steps(batch=20, num_steps=9, seed=1)[:, 0]
    assert steps_NE.shape == (9, 8) and (steps_NE.sum(1) == 20).all()
    assert set((steps_NE > 0).sum(1).tolist()) <= {2, 3}
    assert (steps_NE[:4].sum(0) == 10).all() and (steps_NE[4:8].sum(0) == 10).all()
    assert not np.array_equal(steps_NE[:4], steps_NE[4:8])
    assert (token_trace().prefill_steps(10_000, 2, 0).sum(2) == 400).all(), "half are prompts"
    assert (count_trace().prefill_steps(10, 2, 0).sum(2) == 20).all()


def test_chunks_are_consecutive_tokens():
    trace = token_trace()
    chunks_NLE = trace.chunks(150)
    assert chunks_NLE.shape == (2, 3, 8)
    first_TK = trace.topk_ids_TLK[:150, 2]
    assert np.array_equal(chunks_NLE[0, 2], np.bincount(first_TK.ravel(), minlength=8))
    assert len(trace.chunks(10_000)) == 1


def test_halves_share_no_request_and_lose_nothing():
    first, second = token_trace().split(seed=5)
    assert not set(first.request_id_T) & set(second.request_id_T)
    assert len(first.topk_ids_TLK) + len(second.topk_ids_TLK) == 400
    early, late = count_trace().split()
    assert (len(early.counts_NLE), len(late.counts_NLE)) == (3, 3)
    with pytest.raises(BalancerError, match="at least two"):
        token_trace(num_tokens=20).split()[0]._only(np.arange(10) == 0).split()


def archive(**arrays) -> bytes:
    file = io.BytesIO()
    good = {"topk_ids": token_trace().topk_ids_TLK, "num_experts": 8, "top_k": 2}
    np.savez(file, **{k: v for k, v in (good | arrays).items() if v is not None})
    return file.getvalue()


GOOD = archive()


@pytest.mark.parametrize(
    "arrays",
    [
        {"topk_ids": None},
        {"counts": np.zeros((2, 3, 8), int)},
        {"num_experts": None},
        {"num_experts": 4},
        {"num_experts": np.array([8])},
        {"num_experts": 8.0},
        {"num_experts": -8},
        {"top_k": 3},
        {"top_k": 0},
        {"topk_ids": np.full((4, 3, 2), np.nan)},
        {"topk_ids": np.zeros((0, 3, 2), int)},
        {"topk_ids": np.zeros((4, 6), int)},
        {"topk_ids": np.zeros((4, 3, 2), int)},
        {"topk_ids": np.tile([-1, 2], (4, 3, 1))},
        {"topk_ids": np.array([["a"]])},
        {"topk_ids": np.array([object()])},
        {"layer_index": np.array([0, 2, 1])},
        {"layer_index": np.array([0, 1])},
        {"layer_index": np.array([0, 2, 1], np.uint8)},
        {"layer_index": np.array([0, 1, 2**63], np.uint64)},
        {"layer_index": np.array([1, 2, -(2**63)])},
        {"phase": np.zeros(3, int)},
        {"topk_ids": None, "counts": np.full((2, 3, 8), -1)},
        {"topk_ids": None, "counts": np.ones((2, 3, 8), int), "phase": np.zeros(3, int)},
    ],
)
def test_a_wrong_array_is_refused(tmp_path, arrays):
    (tmp_path / "t.npz").write_bytes(archive(**arrays))
    with pytest.raises(BalancerError, match=r"t\.npz"):
        traces.load(tmp_path / "t.npz")


@given(st.integers(0, len(GOOD) - 1))
def test_a_truncated_file_is_refused(tmp_path_factory, length):
    file = tmp_path_factory.getbasetemp() / "truncated.npz"
    file.write_bytes(GOOD[:length])
    with pytest.raises(BalancerError):
        traces.load(file)


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_harmless(tmp_path_factory, place, flip):
    file = tmp_path_factory.getbasetemp() / "flipped.npz"
    file.write_bytes(GOOD[:place] + bytes([GOOD[place] ^ flip]) + GOOD[place + 1 :])
    try:
        found = traces.load(file)
    except BalancerError:
        return
    assert found.topk_ids_TLK.max() < found.num_experts
    assert found.topk_ids_TLK.shape[1:] == (found.num_layers, found.top_k)


def test_too_little_memory_is_not_damage(tmp_path, monkeypatch):
    def full(path):
        raise MemoryError("Unable to allocate 9 GiB")

    traces.save(tmp_path / "t.npz", token_trace())
    monkeypatch.setattr(traces.recorded, "read", full)
    with pytest.raises(BalancerError, match=r"needs more memory than there is \(Unable to all"):
        traces.load(tmp_path / "t.npz")


def test_a_missing_trace_says_how_to_record_one(tmp_path):
    with pytest.raises(BalancerError, match="Record one on a server with `--moe-record FILE`"):
        traces.load(tmp_path / "t.npz")


def test_files_of_other_kinds_are_refused(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name in ("one.npy", "missing.npz", "."):
        with pytest.raises(BalancerError):
            traces.load(tmp_path / name)


def test_the_summary_finds_consistent_temporal_and_joint_experts():
    """Expert 0 in every step; 1 and 2 together in every fifth, heavily; 3 often and lightly."""
    counts = np.zeros((50, 1, 6), np.int64)
    counts[:, 0, 0] = 10
    counts[::5, 0, 1:3] = np.random.default_rng(0).integers(40, 80, 10)[:, None]
    counts[::2, 0, 3] = 1
    trace = Trace(name="c", num_experts=6, top_k=2, layer_index_L=np.arange(1), counts_NLE=counts)
    summary = summarise(trace, batch=1)
    assert np.flatnonzero(summary.consistent_LE[0]).tolist() == [0]
    assert np.flatnonzero(summary.temporal_LE[0]).tolist() == [1, 2]
    assert summary.groups_L == (((1, 2),),)
    assert summary.num_steps == 50
    assert summary.skew_L[0] == pytest.approx(counts.sum(0).max() / counts.sum(0).mean())


def test_drift_is_the_share_of_load_that_moved():
    counts = np.zeros((20, 1, 4), np.int64)
    counts[:10, 0, 0], counts[10:, 0, 0], counts[10:, 0, 1] = 8, 6, 2
    assert drift_of_tenths(counts)[0].tolist() == pytest.approx([0] * 5 + [0.25] * 5)
    assert groups(counts[:2, 0]) == ()
