"""Experts are fetched and tokens moved while requests overlap: same tokens as one dense rank."""

import json
import os
import re
from pathlib import Path

import pytest
import requests
from serving import (
    DATA_PARALLEL,
    EAGER,
    FLOAT32,
    GENTLY,
    LONG_PROMPT,
    PROMPTS,
    TENSOR_PARALLEL,
    WORKERS_END_GENTLY,
    serve,
)

pytestmark = pytest.mark.timeout(1800)

LAYERS, TOP_K, EXPERTS = 4, 4, 32
THRASH = {"dynamic_slots": 2, "threshold_tokens": 2, "knee_tokens": 1.0}
"""Two slots, and nearly every batch counts as compute-bound and pays for a fetch."""
ONE_TOKEN_EACH = [[token] * 60 for token in range(40, 48)]
"""Prompts of a single token each: it has its own experts, which one rank of two cannot keep."""
OTHER_TOKENS = range(48, 148)
BROKEN_STORE = Path(__file__).with_name("broken_store")
ONE_API_SERVER = (*DATA_PARALLEL, "--api-server-count", "1")
SERVERS = {
    "tensor": (TENSOR_PARALLEL, THRASH | {"look_ahead": "router"}),
    "data": (ONE_API_SERVER, THRASH | {"name": "harmoeny_paper", "prefetch": "sync"}),
    "data-all_reduce": (
        ONE_API_SERVER,
        THRASH | {"exchange": "all_reduce", "look_ahead": "router"},
    ),
}


@pytest.fixture(scope="module", params=SERVERS)
def layout(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def server(layout, model, tmp_path_factory):
    parallel, settings = SERVERS[layout]
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ("--moe-balancer-config", json.dumps({"name": "harmoeny"} | settings))
    chunked = ("--max-num-batched-tokens", "64", "--enable-prefix-caching")
    arguments = (*parallel, *flags, *chunked, *FLOAT32, *EAGER)
    breakable = ("--worker-extension-cls", "broken_store.BreaksStore")
    environ = {"VLLM_PLUGINS": "moe_balancer", "VLLM_SERVER_DEV_MODE": "1"}
    paths = [str(BROKEN_STORE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ["PYTHONPATH"] = os.pathsep.join(paths)
    with serve(model, *arguments, *breakable, log=log, num_ranks=2, **environ) as running:
        yield running


def test_one_request_while_the_other_rank_is_idle(server, dense):
    assert server.tokens(PROMPTS[0]) == dense.tokens[0]


def test_overlapping_requests_in_chunks_with_cached_prefixes(server, layout, dense):
    server.reset()
    for prompt in ONE_TOKEN_EACH:
        server.tokens(prompt, max_tokens=1)
    for _ in range(2):
        answers = server.all_tokens([*PROMPTS[:5], LONG_PROMPT, *PROMPTS[5:]])
        assert answers.pop(5) == dense.long_tokens
        assert answers == dense.tokens
    if layout == "tensor":
        assert server.metric("vllm:prefix_cache_hits_total") > 0
    ranks = server.status()
    # How many depends on which requests meet in a batch.
    assert sum(rank["fetches"] + rank["early_fetches"] for rank in ranks) > 0
    assert sum(rank["evictions"] for rank in ranks) > 0, "the slots did not thrash"
    came_true = sum(rank["early_hits"] for rank in ranks)
    assert (came_true > 0) == (layout != "data")
    for rank in ranks:
        assert rank["balancer"] == SERVERS[layout][1].get("name", "harmoeny")
        assert rank["num_layers"] == LAYERS
        assert rank["num_physical_experts"] == EXPERTS + 2 * THRASH["dynamic_slots"]
        assert sum(rank["tokens_per_rank"]) == rank["pairs"]
        assert (rank["look_ahead_us"] > 0) == (layout != "data")
    shared = ["pairs", "activated_per_rank", "tokens_per_rank", "max_tokens_sum"]
    # Idle ranks of data parallelism go on for some steps, without tokens.
    kinds = [name for name in ranks[0] if name.endswith("_schedules")]
    shared += [name for name in kinds if name != "empty_schedules"]
    for name in shared:
        assert ranks[0][name] == ranks[1][name], f"the ranks decided differently: {name}"


def test_the_way_of_exchange(server, layout):
    """Every decision sums a row of counts per rank or nothing, and every guess one row."""
    way = {"tensor": "replicated", "data": "after_gather"}.get(layout, "all_reduce")
    for rank in server.status():
        assert rank["exchange"] == way
        assert rank["counts_are_global"]
        row = 4 * EXPERTS
        decided = 2 * row * rank["decisions"] if way == "all_reduce" else 0
        guessed = rank["exchanged_bytes"] - decided
        assert guessed % row == 0
        assert (guessed > 0) == (layout != "data")


def test_prometheus_scrapes_both_ranks(server):
    server.tokens(PROMPTS[0])
    answer = requests.get(f"{server.url}/moe_balancer/metrics", timeout=60)
    assert answer.headers["content-type"].startswith("text/plain")
    name = "vllm_moe_balancer_decisions_total{"
    values = [line.split()[-1] for line in answer.text.splitlines() if line.startswith(name)]
    assert len(values) == 2 and min(map(float, values)) > 0


def test_the_start_says_what_the_store_takes(server):
    assert server.count_in_log("host store of all experts takes about") >= 1


@pytest.mark.parametrize("layout", ["tensor", "data-all_reduce"], indirect=True)
def test_a_rank_that_cannot_get_an_expert(server, layout, tmp_path):
    """Requests fail and the server ends, without a hang and without a process left behind.

    The last test of its server: it breaks the host store of one rank while requests run. That
    rank has fetched more than the other, and is asked for experts until it has to fetch again:
    prompts of another token each, one after the other, as together they may need no copies.
    """
    fetches = [rank["fetches"] for rank in server.status()]
    broken = tmp_path / "broken"

    def break_store() -> None:
        answer = requests.post(
            f"{server.url}/collective_rpc",
            json={"method": "break_store", "args": [fetches.index(max(fetches)), str(broken)]},
            timeout=60,
        )
        answer.raise_for_status()
        broken.touch()
        statuses = (server.outcome_of([token] * 60, max_tokens=1) for token in OTHER_TOKENS)
        assert any(status != 200 for status in statuses), "no prompt needed a copy"

    server.assert_dies_of(break_store)
    assert server.count_in_log("page is gone") > 0
    assert server.count_in_log("This worker ends. Expert") == 1
    if layout == "tensor":
        assert server.count_in_log("shutdown triggered") == 0, "signalled by its worker"


def test_a_balancer_that_fetches_derives_its_threshold(model, dense, tmp_path):
    """Default settings and torch.compile: q from measured speeds, decode on one replica each."""
    flags = (*TENSOR_PARALLEL, "--moe-balancer", "harmoeny", *FLOAT32, *GENTLY)
    log = tmp_path / "log"
    environ = {"VLLM_PLUGINS": "moe_balancer", **WORKERS_END_GENTLY}
    with serve(model, *flags, log=log, num_ranks=2, **environ) as server:
        assert server.all_tokens(PROMPTS) == dense.tokens
        (found,) = set(re.findall(r"threshold q = ([\d.]+) tokens", server.log.read_text()))
        assert float(found) >= 1
        for rank in server.status():
            assert rank["stepped_aside"]["memory_bound"] > 0
        assert server.end() == 0, server.tail()
