"""Gem: weights are loaded by a map, then experts move while requests run; answers stay the same."""

import numpy as np
import pytest
import requests
from serving import DATA_PARALLEL, EAGER, FLOAT32, PROMPTS, TENSOR_PARALLEL, balanced, serve

from bench.stand_ins import made_up_profile, shuffled_map
from vllm_balance import documents, maps
from vllm_balance.model_shape import from_config

pytestmark = pytest.mark.timeout(1800)

LAYOUTS = {"tensor": TENSOR_PARALLEL, "data": (*DATA_PARALLEL, "--api-server-count", "1")}
EAGER_TO_MOVE = {"interval": 10, "window": 8, "horizon": 10**9, "hysteresis": 0.0}


def moves_to_other_maps(server, layout, placed, folder):
    """Or says why not; whatever it does, answers must stay the same."""

    def move_to(asked):
        maps.save(folder / "other.json", asked)
        url = f"{server.url}/moe_balancer/map"
        return requests.post(url, json={"file": str(folder / "other.json")}, timeout=60)

    in_order = placed.model_copy(
        update={
            "policy": "linear",
            "layers": [
                each.model_copy(update={"physical_to_logical": sorted(each.physical_to_logical)})
                for each in placed.layers
            ],
        }
    ).sealed()
    before = server.status(per_layer=True)
    answer = move_to(in_order)
    ranks = server.status(per_layer=True)
    if layout == "data":
        assert answer.status_code == 409 and "Data-parallel engines" in answer.text
        assert slots_of(ranks) == slots_of(before)
        return
    assert answer.status_code == 200, answer.text
    said = f"linear map {in_order.checksum[:12]} moved to while serving"
    assert {rank["placement"] for rank in (*answer.json()["ranks"], *ranks)} == {said}
    assert slots_of(ranks) == [[[*range(32)]] * 4] * 2 != slots_of(before)
    changed = np.array(slots_of(ranks)[0]) != np.array(slots_of(before)[0])
    assert {rank["slots_changed"] for rank in answer.json()["ranks"]} == {changed.sum()}
    before = server.status(per_layer=True)
    answer = move_to(placed.model_copy(update={"num_ranks": 4}).sealed())
    assert answer.status_code == 409
    assert "4 ranks" in answer.text and "No expert was moved." in answer.text
    assert slots_of(server.status(per_layer=True)) == slots_of(before)


def slots_of(ranks):
    """The expert of each slot by rank and layer."""
    return [[layer["physical_to_logical"] for layer in rank["layers"]] for rank in ranks]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_move_while_requests_run(layout, model, dense, tmp_path):
    documents.write(tmp_path / "profile.json", made_up_profile(model))
    placed = shuffled_map(from_config(model), num_redundant=0)
    maps.save(tmp_path / "map.json", placed)
    files = {name: str(tmp_path / f"{name}.json") for name in ("map", "profile")}
    flags = balanced("gem", **files, online=EAGER_TO_MOVE)
    arguments = (*LAYOUTS[layout], *flags, *FLOAT32, *EAGER)
    environ = {"VLLM_PLUGINS": "moe_balancer"}
    with serve(model, *arguments, log=tmp_path / "log", num_ranks=2, **environ) as server:
        assert [rank["placement"] for rank in server.status()] == [
            f"gem map {placed.checksum[:12]} verified"
        ] * 2
        assert server.all_tokens(PROMPTS) == dense.tokens
        ranks = server.status()
        assert server.count_in_log("Online placement, step") == ranks[0]["online"]["moves"]
        moves_to_other_maps(server, layout, placed, tmp_path)
        assert server.all_tokens(PROMPTS) == dense.tokens
    found, other = (rank["online"] for rank in ranks)
    assert found["swaps"] > 0 and found["decisions"] == found["steps"] // 10 >= 4
    assert min(entry["step"] for entry in found["recent"] if entry["swaps"]) <= 30, "moved too late"
    assert found["swap_us"] > 0 and found["moving_us"] > 0
    # The profile is made up, so that no rank is as fast as it says.
    assert all(slowdown > 0 and slowdown != 1 for slowdown in found["slowdown_per_rank"])
    for key in ("steps", "decisions", "moves", "swaps", "slowdown_per_rank", "drift", "recent"):
        assert found[key] == other[key], f"the ranks moved differently: {key}"
    assert ranks[0]["tokens_per_rank"] == ranks[1]["tokens_per_rank"]
    assert ranks[0]["num_physical_experts"] == 32
