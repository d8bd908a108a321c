"""Weights loaded by a map with redundant experts: every layer its own permutation, same answers.

Without redundant experts: test_online.py.
"""

import pytest
from serving import EAGER, FLOAT32, PROMPTS, REARRANGED, TENSOR_PARALLEL, balanced, serve

from bench.stand_ins import shuffled_map
from vllm_balance import maps
from vllm_balance.model_shape import from_config

pytestmark = pytest.mark.timeout(900)

NUM_REDUNDANT = 16
NEVER = {"window_size": 1000, "step_interval": 100_000, "redundancy": None}
"""vLLM's EPLB does not move experts while this test runs, so that they stay where the map put
them; the redundancy is the map's."""


def test_weights_are_loaded_by_the_map(model, dense, tmp_path):
    found = shuffled_map(from_config(model), NUM_REDUNDANT)
    maps.save(tmp_path / "map.json", found)
    flags = balanced("metro", map=str(tmp_path / "map.json"), **NEVER)
    arguments = (*TENSOR_PARALLEL, *flags, *FLOAT32, *EAGER)
    environ = {"VLLM_PLUGINS": "moe_balancer"}
    with serve(model, *arguments, log=tmp_path / "log", num_ranks=2, **environ) as server:
        assert server.all_tokens(PROMPTS) == dense.tokens
        ranks = server.status()
        assert server.count_in_log(REARRANGED) == 0
    for rank in ranks:
        assert rank["placement"] == f"gem map {found.checksum[:12]} verified"
        assert rank["num_physical_experts"] == 32 + NUM_REDUNDANT
        assert rank["pairs"] > 0
    assert ranks[0]["tokens_per_rank"] == ranks[1]["tokens_per_rank"]
