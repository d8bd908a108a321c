"""The shares and the table of skewed prefills, from made-up counters."""

import pytest
from measured import latency, row

from bench import waiting
from bench.load import Load
from bench.starts import arm_of, plan
from vllm_balance import skew_table
from vllm_balance.measurement import parse


def rank(times_LB, fetch_us=0.0, **counted) -> dict:
    layers = [
        {
            **{"recent_experts_us": times_B, "fetch_wait_us": fetch_us},
            **{"experts_us": 0.75 * sum(times_B), "experts_wrapping_us": 0.25 * sum(times_B)},
        }
        for times_B in times_LB
    ]
    return {"layers": layers, **counted}


FETCHED = dict.fromkeys(waiting.FETCHED, 0)


def test_ranks_wait_for_the_slowest_in_every_layer_and_batch():
    # The slow rank changes from layer to layer: sums over layers would hide the waiting.
    ranks = [rank([[10.0, 30.0], [30.0, 10.0]]), rank([[30.0, 10.0], [10.0, 30.0]])]
    found = waiting.shares(ranks)
    assert found["waiting_share"] == pytest.approx(1 - 20 / 30)
    assert found["fetch_wait_share"] == 0 and found["batch_time_spread"] == 0
    assert "fetching" not in found


def test_time_for_fetches_is_waiting_and_fetches_of_all_ranks_count():
    ranks = [rank([[20.0], [20.0]], **FETCHED | {"fetches": 3})]
    ranks.append(rank([[20.0], [20.0]], fetch_us=5.0, **FETCHED | {"fetches": 1}))
    found = waiting.shares(ranks)
    assert found["waiting_share"] == pytest.approx(1 - 40 / 50)
    assert found["fetch_wait_share"] == pytest.approx(10 / 50)
    assert found["fetching"] == FETCHED | {"fetches": 4}


def test_of_a_load_longer_than_the_last_batches_these_stand_for_all():
    whole = [rank([[20.0] * 8], fetch_us=40.0), rank([[10.0] * 8])]
    last = [rank([[20.0] * 2], fetch_us=40.0), rank([[10.0] * 2])]
    for cut, full in zip(last, whole, strict=True):
        times_us = {key: full["layers"][0][key] for key in ("experts_us", "experts_wrapping_us")}
        cut["layers"][0].update(times_us)
    assert waiting.shares(last) == pytest.approx(waiting.shares(whole))
    assert waiting.shares(whole)["fetch_wait_share"] == pytest.approx(40 / (8 * 20 + 40))


def test_experts_that_cannot_be_timed_have_no_share():
    assert waiting.shares([rank([[], []]), rank([[], []])]) == {}


def test_every_arm_is_compared_with_static_and_the_bound():
    def cell(load: str, arm: str, speed: float, **changes):
        times = {"total_tokens_per_s": speed, "ttft_ms": latency(1e5 / speed)}
        return row(arm, load=load, steps=4.0, waiting_share=0.25, **times, **changes)

    rows = [cell("even", "static", 100), cell("hot", "static", 50)]
    schedules = {"memory_bound": 4, "unpaid": 2, "held": 3, "fetched": 1, "empty": 9}
    fetching = FETCHED | {"fetches": 6, "early_fetches": 2}
    fetching |= {f"{name}_schedules": number for name, number in schedules.items()}
    rows += [cell("hot", "harmoeny", speed, fetching=fetching) for speed in (80, 90, 97)]
    body = skew_table.table(rows).body
    assert [line[:5] for line in body] == [
        ["even", "static", "100", "100.0%", "+0.0%"],
        ["hot", "static", "50", "50.0%", "+0.0%"],
        ["hot", "harmoeny", "90", "90.0%", "+80.0%"],
    ]
    assert body[2][5:8] == ["1111", "-44.4%", "25.0%"] and body[2][10:12] == ["40%", "2.0"]
    assert body[1][10] == "-"


def test_ours_are_compared_with_the_baseline_that_is_best_at_each():
    def cell(arm: str, speed: float, ttft: float):
        times = {"total_tokens_per_s": speed, "ttft_ms": latency(ttft)}
        return row(arm, load="hot", steps=4.0, **times)

    arms = {"static": (99, 1), "eplb": (80, 500), "shadow": (50, 400), "harmoeny": (100, 300)}
    rows = [cell(arm, *numbers) for arm, numbers in arms.items()]
    table = skew_table.table(rows)
    assert table.headings[-1] == skew_table.BEST
    assert [line[-1] for line in table.body] == ["-"] * 3 + ["+25.0% `eplb`, -25.0% `shadow`"]
    assert skew_table.BEST not in skew_table.table([rows[0], rows[-1]]).headings


def test_rows_from_before_schedules_were_counted_are_shown_as_they_are():
    older = {"fetches": 6, "early_fetches": 2, "hits": 0}
    old = row("harmoeny", load="hot", steps=4.0, fetching=older)
    new = row("shadow", load="hot", fetching=FETCHED | {"held_schedules": 3})
    table = skew_table.table([old, new])
    assert [line[10:12] for line in table.body] == [["-", "2.0"], ["100%", "0.0"]]
    assert skew_table.MOVED in table.headings
    table = skew_table.table([old])
    assert table.body[0][10] == "2.0" and skew_table.MOVED not in table.headings
    assert len(table.body[0]) == len(table.headings) == len(skew_table.HEADINGS) - 2
    assert parse(row("harmoeny", fetching=older).model_dump_json()).moved_share is None


def test_a_load_of_first_tokens_on_hot_experts_is_a_skewed_prefill():
    hot, even = {"hot": {"experts": 1, "fraction": 0.9}}, {"zipf": 0.0}
    load = Load(requests=1, prompt_tokens=8, max_tokens=1)
    assert load.is_skewed_prefill(hot) and not load.is_skewed_prefill(even)
    assert not load.model_copy(update={"max_tokens": 2}).is_skewed_prefill(hot)
    assert not load.model_copy(update={"replay": even}).is_skewed_prefill(hot)
    assert load.model_copy(update={"replay": hot}).is_skewed_prefill(even)


def test_an_interrupted_run_has_no_bound_and_no_base():
    rows = [row("harmoeny", load="hot", total_tokens_per_s=80.0)]
    (line,) = skew_table.table(rows).body
    assert line[:5] == ["hot", "harmoeny", "80", "-", "-"] and line[6] == "-"
    rows.append(row("static", load="hot", total_tokens_per_s=50.0))
    lines = skew_table.table(rows).body
    assert [line[3:5] for line in lines] == [["-", "+60.0%"], ["-", "+0.0%"]]


def test_slots_take_no_settings_of_eplb_and_loads_their_own_replay():
    settings = {
        "seed": 3,
        "model": {"dtype": "float32"},
        "replay": {"zipf": 0.0},
        "load": {"requests": 1, "prompt_tokens": 8, "max_tokens": 1},
        "loads": {"even": {}, "hot": {"replay": {"zipf": 2.0}}},
        "arms": {"eplb": {}, "quick": {"balancer": "harmoeny", "dynamic_slots": 2}},
        "eplb": {"window_size": 3},
        "serve": {"flags": [], "tensor_parallel": 2},
    }
    starts = plan(settings, rounds=1)
    assert starts[0].loads["hot"].replay == {"zipf": 2.0} and starts[0].loads["even"].replay is None
    eplb, quick = arm_of(starts[0]), arm_of(starts[1])
    assert eplb.settings == {"window_size": 3, "replay": {"zipf": 0.0, "seed": 3}}
    assert quick.settings == {"dynamic_slots": 2, "replay": {"zipf": 0.0, "seed": 3}}
    assert quick.flags == ["--dtype", "float32"] and settings["serve"]["flags"] == []
