"""The shares and the table of skewed prefills, from made-up counters."""

import pytest

from bench import cells, waiting
from bench.run import arm_of, chosen, skews_of, starts_of


def rank(times_LB, fetch_us=0.0, **counted) -> dict:
    layers = [{"recent_experts_us": times_B, "fetch_wait_us": fetch_us} for times_B in times_LB]
    return {"pairs": 1600, "num_layers": 2, "layers": layers, **counted}


def test_ranks_wait_for_the_slowest_in_every_layer_and_batch():
    # The slow rank changes from layer to layer: sums over layers would hide the waiting.
    ranks = [rank([[10.0, 30.0], [30.0, 10.0]]), rank([[30.0, 10.0], [10.0, 30.0]])]
    found = waiting.shares(ranks, seconds=2.0, top_k=8)
    assert found["waiting_share"] == pytest.approx(1 - 20 / 30)
    assert found["fetch_wait_share"] == 0 and found["batch_time_spread"] == 0
    assert found["model_tokens_per_s"] == 1600 / 2 / 8 / 2
    assert "fetches" not in found


def test_time_for_fetches_is_waiting_and_fetches_of_all_ranks_count():
    ranks = [rank([[20.0], [20.0]], fetches=3), rank([[20.0], [20.0]], fetch_us=5.0, fetches=1)]
    found = waiting.shares(ranks, seconds=1.0, top_k=1)
    assert found["waiting_share"] == pytest.approx(1 - 40 / 50)
    assert found["fetch_wait_share"] == pytest.approx(10 / 50)
    assert found["fetches"] == 4


def row(cell: str, arm: str, speed: float) -> dict:
    return {
        "cell": cell,
        "arm": arm,
        "model_tokens_per_s": speed,
        "ttft_ms": 1e5 / speed,
        "waiting_share": 0.25,
        "fetch_wait_share": 0.0,
        "batch_time_spread": 0.0,
        "decide_share": 0.001,
        "steps": 4,
    }


def test_every_arm_is_compared_with_static_and_the_bound():
    rows = [row("even", "static", 100), row("hot", "static", 50)]
    rows += [row("hot", "harmoeny", speed) | {"fetches": 8} for speed in (80, 90, 97)]
    lines = cells.table(rows).splitlines()
    assert len(lines) == 2 + 3
    assert lines[3].startswith("| hot | static | 50 | 50.0% | +0.0% |")
    assert lines[4].startswith("| hot | harmoeny | 90 | 90.0% | +80.0% | 1111 | -44.4% | 25.0% |")
    assert "| 2.0 |" in lines[4]


def test_cells_and_arms_of_a_run_file():
    settings = {
        "seed": 3,
        "cells": {"even": {"zipf": 0.0}, "hot": {"zipf": 2.0}},
        "arms": {"eplb": {}, "quick": {"balancer": "harmoeny", "dynamic_slots": 2}},
        "eplb": {"window_size": 3},
        "serve": {"flags": [], "tensor_parallel": 2},
    }
    assert skews_of(settings) == settings["cells"]
    assert skews_of({"replay": {"zipf": 1.0}}) == {"": {"zipf": 1.0}}
    assert list(chosen(settings["cells"], "hot")) == ["hot"]
    assert list(chosen(settings["cells"], "")) == ["even", "hot"]
    with pytest.raises(KeyError):
        chosen(settings["cells"], "cold")
    eplb, quick = (arm_of(start, settings) for start in starts_of(settings))
    assert eplb.settings == {"window_size": 3, "replay": {"zipf": 0.0, "seed": 3}}
    assert (quick.name, quick.balancer) == ("quick", "harmoeny")
    assert quick.settings == {"dynamic_slots": 2, "replay": {"zipf": 0.0, "seed": 3}}
