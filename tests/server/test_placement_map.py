"""Weights loaded by a placement map: every layer its own permutation, answers as from one rank."""

import pytest
from serving import EAGER, FLOAT32, PROMPTS, REARRANGED, TENSOR_PARALLEL, balanced, serve

from bench.stand_ins import shuffled_map
from vllm_balance import maps
from vllm_balance.model_shape import from_config

pytestmark = pytest.mark.timeout(900)

NEVER = {"window_size": 1000, "step_interval": 100_000, "redundancy": None}
"""vLLM's EPLB does not move experts while these tests run, so that they stay where the map put
them; the redundancy is the map's."""
SERVERS = {"gem": (0, {}), "metro": (16, NEVER)}


@pytest.mark.parametrize("name", SERVERS)
def test_weights_are_loaded_by_the_map(name, model, dense, tmp_path):
    num_redundant, settings = SERVERS[name]
    found = shuffled_map(from_config(model), num_redundant)
    maps.save(tmp_path / "map.json", found)
    flags = balanced(name, map=str(tmp_path / "map.json"), **settings)
    arguments = (*TENSOR_PARALLEL, *flags, *FLOAT32, *EAGER)
    environ = {"VLLM_PLUGINS": "moe_balancer"}
    with serve(model, *arguments, log=tmp_path / "log", num_ranks=2, **environ) as server:
        assert server.all_tokens(PROMPTS) == dense.tokens
        ranks = server.status()
        assert server.count_in_log(REARRANGED) == 0
    for rank in ranks:
        assert rank["placement"] == f"gem map {found.checksum[:12]} verified"
        assert rank["num_physical_experts"] == 32 + num_redundant
        assert rank["pairs"] > 0
    assert ranks[0]["tokens_per_rank"] == ranks[1]["tokens_per_rank"]
