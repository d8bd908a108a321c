"""What HarMoEny is measured against, on real servers: same tokens as one dense rank.

Each server has something of its own besides: a key, several cores per rank, replicas in a map.
"""

import json
import os
from pathlib import Path

import pytest
import requests
from serving import (
    DATA_PARALLEL,
    EAGER,
    FLOAT32,
    LONG_PROMPT,
    PROMPTS,
    REARRANGED,
    TENSOR_PARALLEL,
    serve,
)

from bench.stand_ins import shuffled_map
from vllm_balance import maps
from vllm_balance.model_shape import from_config

pytestmark = pytest.mark.timeout(1800)

LAYERS, EXPERTS, NUM_REDUNDANT = 4, 32, 8
ALLOWED = {"VLLM_PLUGINS": "moe_balancer"}
FETCHING = {"dynamic_slots": 2, "threshold_tokens": 2, "knee_tokens": 1.0}
"""Nearly every batch counts as compute-bound and pays for a fetch."""
ONE_API_SERVER = (*DATA_PARALLEL, "--api-server-count", "1")


def balancer(name: str, **settings: object) -> tuple[str, ...]:
    return ("--moe-balancer", name, "--moe-balancer-config", json.dumps(settings))


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "log"


def assert_same_decisions(server, name: str) -> list[dict]:
    """The counters of both ranks, which decided alike."""
    ranks = server.status()
    assert [rank["rank"] for rank in ranks] == [0, 1]
    for rank in ranks:
        assert rank["balancer"] == name
        assert rank["num_layers"] == LAYERS and rank["decisions"] % LAYERS == 0
        assert rank["pairs"] > 0 and sum(rank["tokens_per_rank"]) == rank["pairs"]
    for counter in ("pairs", "activated_per_rank", "tokens_per_rank", "max_tokens_sum"):
        assert ranks[0][counter] == ranks[1][counter], f"the ranks decided differently: {counter}"
    return ranks


def assert_fetched(ranks: list[dict]) -> None:
    assert sum(rank["fetches"] for rank in ranks) > 0
    for rank in ranks:
        assert rank["fetched_schedules"] > 0
        assert rank["num_physical_experts"] == EXPERTS + 2 * FETCHING["dynamic_slots"]


def test_shadow_on_a_server_with_a_key(model, dense, log):
    """The key guards vLLM's own paths; ours is guarded by who may reach the port, as docs say."""
    flags = (*TENSOR_PARALLEL, *balancer("shadow", **FETCHING), *FLOAT32, *EAGER)
    with serve(model, *flags, "--api-key", "secret", log=log, num_ranks=2, **ALLOWED) as server:
        asked = {"prompt": PROMPTS[0], "max_tokens": 1}
        unasked = requests.post(f"{server.url}/v1/completions", json=asked, timeout=60)
        assert unasked.status_code == 401
        server.key = "secret"
        answers = server.all_tokens([LONG_PROMPT, *PROMPTS])
        assert answers == [dense.long_tokens, *dense.tokens]
        assert_fetched(assert_same_decisions(server, "shadow"))


def test_even_split_with_data_parallelism(model, dense, log):
    flags = (*ONE_API_SERVER, *balancer("even_split", **FETCHING), *FLOAT32, *EAGER)
    with serve(model, *flags, log=log, num_ranks=2, **ALLOWED) as server:
        answers = server.all_tokens([LONG_PROMPT, *PROMPTS])
        assert answers == [dense.long_tokens, *dense.tokens]
        assert_fetched(assert_same_decisions(server, "even_split"))


@pytest.mark.parametrize("name", ["gem", "exflow"])
def test_a_map_with_replicas(model, dense, log, name):
    """With gem both ranks run a thread on each core of this machine; only spawned ones do."""
    saved = shuffled_map(from_config(model), NUM_REDUNDANT)
    maps.save(log.with_name("map.json"), saved)
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    # These would place experts anew many times, if anything but the map placed them.
    often = {"window_size": 5, "step_interval": 10}
    flags = (*TENSOR_PARALLEL, *balancer(name, map="map.json", **often), *FLOAT32, *EAGER)
    spawned = name == "gem"
    environ = ALLOWED | ({"VLLM_CPU_OMP_THREADS_BIND": f"{cores}|{cores}"} if spawned else {})
    with serve(model, *flags, log=log, num_ranks=2, spawned=spawned, **environ) as server:
        assert server.all_tokens(PROMPTS) == dense.tokens
        for rank in assert_same_decisions(server, name):
            assert rank["placement"] == f"gem map {saved.checksum[:12]} verified"
            assert rank["num_physical_experts"] == EXPERTS + NUM_REDUNDANT
        assert server.count_in_log(REARRANGED) == 0
