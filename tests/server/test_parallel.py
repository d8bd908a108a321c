"""Two ranks answer as one dense rank does, while requests overlap and experts move."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from serving import (
    DATA_PARALLEL,
    EAGER,
    FLOAT32,
    LONG_PROMPT,
    MAX_TOKENS,
    PROMPTS,
    REARRANGED,
    TENSOR_PARALLEL,
    balanced,
    serve,
)

from bench import gate
from bench.server import Arm
from bench.stand_ins import shuffled_map
from vllm_balance import maps, traces
from vllm_balance.model_shape import from_config
from vllm_balance.recording import Phase

pytestmark = pytest.mark.timeout(1800)

LAYERS, TOP_K, NUM_REDUNDANT = 4, 4, 16
ONE_API_SERVER = ("--api-server-count", "1")
"""data-metro has two, data parallelism's default."""
SPAWNED = ["tensor", "metro"]
"""As a user starts it; the others are forked (bench/starter.py)."""
MAP = "map.json"
"""In the folder that a server runs in."""
SERVERS = {
    "tensor-static": (*TENSOR_PARALLEL, *balanced("static")),
    "tensor-eplb": (*TENSOR_PARALLEL, *balanced("eplb")),
    "tensor-first_copy": (*TENSOR_PARALLEL, *balanced("first_copy")),
    "tensor-metro": (*TENSOR_PARALLEL, *balanced("metro", map=MAP, redundancy=None)),
    "data-static": (*DATA_PARALLEL, *ONE_API_SERVER, *balanced("static")),
    "data-eplb": (*DATA_PARALLEL, *ONE_API_SERVER, *balanced("eplb")),
    "data-first_copy": (*DATA_PARALLEL, *ONE_API_SERVER, *balanced("first_copy")),
    "data-metro": (*DATA_PARALLEL, *balanced("metro")),
}
"""The redundancy of tensor-metro is its map's. Counts are all-reduced in test_harmoeny.py."""
in_tensor_metro = pytest.mark.parametrize("layout", ["tensor-metro"], indirect=True)
in_data_parallel = pytest.mark.parametrize(
    "layout", [name for name in SERVERS if name.startswith("data")], indirect=True
)


@pytest.fixture(scope="module", params=SERVERS)
def layout(request) -> list[str]:
    return request.param.split("-")


@pytest.fixture(scope="module")
def server(layout, model, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    maps.save(log.with_name(MAP), shuffled_map(from_config(model), NUM_REDUNDANT))
    arguments = (*SERVERS["-".join(layout)], *FLOAT32, *EAGER)
    starting = {"num_ranks": 2, "spawned": layout == SPAWNED}
    with serve(model, *arguments, log=log, **starting, VLLM_PLUGINS="moe_balancer") as running:
        yield running


@in_tensor_metro
def test_weights_are_loaded_by_the_map(server):
    """Every layer has its own permutation, so tokens are right below only if they were.

    Without redundant experts: test_online.py.
    """
    found = maps.load(server.log.with_name(MAP))
    for rank in server.status():
        assert rank["placement"] == f"gem map {found.checksum[:12]} verified"
        assert rank["num_physical_experts"] == 32 + NUM_REDUNDANT


@in_tensor_metro
def test_the_gate_of_benchmarks_proves_this_arm(server, dense, tmp_path, monkeypatch):
    """On this server, not on one of its own, and with its first requests: EPLB changes the map."""
    with monkeypatch.context() as patch:
        patch.setattr(gate, "PROMPTS", PROMPTS)
        patch.setattr(gate, "MAX_TOKENS", MAX_TOKENS)
        patch.setattr(gate, "cache", lambda: tmp_path)
        patch.setattr(gate, "_dense", lambda model, announce: dense.tokens)
        patch.setattr(gate, "Server", lambda arm, model: nullcontext(server))
        arm = Arm(name="metro", balancer="metro", settings={"redundancy": 1.5}, tensor_parallel=2)
        said = gate.prove(arm, {}, lambda what: None)
    (proof,) = tmp_path.glob("gate-*.json")
    assert said.endswith(proof.stem.removeprefix("gate-"))
    did = json.loads(proof.read_text())["did"]
    assert did.keys() == {"memory_bound_batches", "layers_placed_anew"} and min(did.values()) > 0


@in_data_parallel
def test_one_request_while_the_other_rank_is_idle(server, dense):
    assert server.tokens(PROMPTS[0]) == dense.tokens[0]


def test_overlapping_requests_while_experts_move(server, layout, dense):
    server.reset()
    moved_before = server.count_in_log(REARRANGED)
    # Eight at once: the last four arrive while others run.
    assert server.all_tokens(PROMPTS, at_once=8) == dense.tokens
    moved = server.count_in_log(REARRANGED) - moved_before
    ranks = server.status()
    if layout[1] == "static":
        assert moved == 0
    else:
        assert moved >= 1, "the experts did not move while the requests ran"
    assert [rank["rank"] for rank in ranks] == [0, 1]
    for rank in ranks:
        assert rank["balancer"] == layout[1]
        assert rank["decisions"] > 0 and rank["decide_us"] > 0
        assert rank["num_layers"] == LAYERS and rank["decisions"] % LAYERS == 0
        assert rank["pairs"] == dense.num_computed_tokens * LAYERS * TOP_K
        assert sum(rank["tokens_per_rank"]) == rank["pairs"]
        assert rank["num_physical_experts"] == (32 if layout[1] == "static" else 48)
    for name in ("pairs", "activated_per_rank", "tokens_per_rank", "max_activated_sum"):
        assert ranks[0][name] == ranks[1][name], f"the ranks decided differently: {name}"


def test_the_regimes_of_the_policy(server, layout):
    """What ran is what was asked for: metro chooses, the others have one way only."""
    server.tokens(PROMPTS[0])
    for rank in server.status():
        assert rank["decisions"] > 0
        regimes = (rank["memory_bound_batches"] > 0, rank["compute_bound_batches"] > 0)
        if layout[1] == "metro":
            assert regimes[0], "metro never chose"
            evenly = rank["stepped_aside"]["compute_bound"]
            assert evenly == rank["compute_bound_batches"]
        else:
            assert regimes == ((False, True) if layout[1] == "eplb" else (True, False))
            assert rank["stepped_aside"] == {}
        assert rank["decisions"] == sum(
            rank[f"{kind}_batches"] for kind in ("memory_bound", "compute_bound", "empty")
        )


def test_the_way_of_exchange(server, layout):
    server.tokens(PROMPTS[0], max_tokens=2)
    for rank in server.status():
        assert rank["decisions"] > 0
        assert rank["exchange"] == ("replicated" if layout[0] == "tensor" else "after_gather")
        assert rank["counts_are_global"]
        assert rank["exchanged_bytes"] == 0


@pytest.mark.parametrize("layout", ["tensor-eplb", "data-static", "data-metro"], indirect=True)
def test_a_recording_of_counts(server, tmp_path):
    trace = recorded(server, "counts", tmp_path / "trace.npz")
    assert (trace.phase_N == Phase.DECODE).sum() >= MAX_TOKENS - 1


@pytest.mark.parametrize("layout", ["tensor-metro", "data-metro"], indirect=True)
def test_a_recording_of_ids(server, tmp_path):
    trace = recorded(server, "ids", tmp_path / "trace.npz")
    requests_seen, sizes = np.unique(trace.request_id_T, return_counts=True)
    assert len(requests_seen) == 6
    for request, size in zip(requests_seen, sizes, strict=True):
        own = trace.request_id_T == request
        assert trace.position_T[own].tolist() == list(range(size))
        assert (trace.phase_T[own] == Phase.DECODE).sum() == MAX_TOKENS - 1


def recorded(server, what: str, file: Path) -> traces.Trace:
    """The trace of six requests, which holds what the counters counted."""
    server.reset()
    server.record("start", file=str(file), what=what)
    server.all_tokens(PROMPTS[:6])
    ranks = server.record("stop")
    trace = traces.load(file)
    pairs_L = [layer["pairs"] for layer in server.status(per_layer="true")[0]["layers"]]
    assert trace.layer_index_L.tolist() == list(range(LAYERS))
    assert trace.chunks(1).sum((0, 2)).tolist() == pairs_L
    assert sum(rank["tokens"] for rank in ranks) * TOP_K == pairs_L[0]
    assert all(rank["dropped_steps"] == 0 for rank in ranks)
    return trace


@pytest.mark.parametrize("layout", ["tensor-metro", "data-static", "data-metro"], indirect=True)
def test_a_long_prompt_between_short_ones(server, dense):
    answers = server.all_tokens([*PROMPTS[:5], LONG_PROMPT, *PROMPTS[5:]])
    assert answers.pop(5) == dense.long_tokens
    assert answers == dense.tokens


def test_per_layer_counters_and_reset(server):
    for rank in server.status(per_layer="true"):
        assert len(rank["layers"]) == LAYERS
        for name in ("decisions", "pairs", "max_tokens_sum"):
            assert sum(layer[name] for layer in rank["layers"]) == rank[name]
        assert len({layer["layer"] for layer in rank["layers"]}) == LAYERS
    server.reset()
    for rank in server.status():
        assert rank["pairs"] == 0


@pytest.mark.parametrize("layout", ["tensor-metro", "data-static", "data-metro"], indirect=True)
def test_a_worker_that_dies(server):
    """Requests fail and the server ends, without a hang and without a process left behind.

    The last test of its server, because it kills one rank of it while requests run.
    """
    workers = server.workers()
    assert len(workers) == 2
    server.assert_dies_of(workers[0].kill)
