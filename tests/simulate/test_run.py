"""Whole simulated runs: closed forms, monotony, and the published rows again from their seed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import published
from vllm_balance.errors import BalancerError
from vllm_balance.replay_rows import ReplaySettings
from vllm_balance.simulate import Arm, Layout, Load, hardware, models, simulate, skewed
from vllm_balance.simulate.dense_times import DenseTimes
from vllm_balance.simulate.links import Network
from vllm_balance.simulate.memory import most_requests, weight_bytes
from vllm_balance.simulate.outcome import STAGES
from vllm_balance.simulate.run import expert_times
from vllm_balance.simulate.serving import schedule
from vllm_balance.simulate.sweep import Cell, compute

ROOT = Path(__file__).resolve().parents[2]
MODEL = models.load("qwen3-30b-a3b")
H100, _ = hardware.load("h100")
ARM = Arm(
    model=MODEL,
    hardware=H100,
    layout=Layout(data=8),
    load=Load(concurrency=64, prompt_tokens=32, output_tokens=64, token_budget=256, max_steps=6),
    balancer="metro",
    redundancy=1.25,
)


def run(arm=ARM, zipf=0.8):
    skew = ReplaySettings(zipf=zipf, seed=1, rows=1024)
    return simulate(arm, skewed(skew, arm.model, 2), skewed(skew, arm.model, 2))


def faster(machine, **factors):
    """The machine with quantities multiplied; names as a.b."""
    changed = machine.model_dump()
    for name, factor in factors.items():
        part = changed
        for key in name.split("__"):
            part = part[key]
        part["value"] *= factor
    return type(machine).model_validate(changed)


def test_every_step_is_the_sum_of_its_stages():
    made = run()
    assert set(made.stage_us) == set(STAGES)
    assert np.allclose(made.step_us_N, sum(made.stage_us.values()))
    assert sum(made.shares.values()) == pytest.approx(1)
    assert all((stage >= 0).all() for stage in made.stage_us.values())


def test_times_of_requests_add_up():
    load = Load(concurrency=4, prompt_tokens=8, output_tokens=5, token_budget=64, max_steps=99,
                steady=False)  # fmt: skip
    made = run(replace(ARM, load=load))
    total = made.step_us_N.sum()
    assert len(made.step_us_N) == 5
    assert made.tokens_per_s == pytest.approx(1e6 * 20 / total)
    assert made.ttft_us_at(0.5) == pytest.approx(made.step_us_N[0] + H100.fixed.request.value)
    assert made.tpot_us == pytest.approx(made.step_us_N[1:].mean())


def test_even_load_waits_for_nobody_and_static_counts_are_exact():
    made = run(replace(ARM, balancer="static"), zipf=0.0)
    assert made.redundant_bytes == 0
    assert made.waiting_share < 0.1
    assert made.activated_N.max() <= MODEL.num_moe_layers * 128 / 8


def test_redundant_memory():
    assert run().redundant_bytes == 4 * 48 * MODEL.expert_bytes


def test_attention_of_one_token_streams_its_weights():
    steps = schedule(Load(concurrency=1, prompt_tokens=1, output_tokens=2, token_budget=9,
                          max_steps=2, steady=False))  # fmt: skip
    dense = DenseTimes(model=MODEL, hardware=H100, layout=Layout(data=8), network=Network.of(H100))
    per_us = 3.35e6 * 0.8
    moved = MODEL.attention_weights * 2 + np.array([1, 2]) / 8 * MODEL.cache_width * 2
    assert dense.attention_us(steps) == pytest.approx(48 * moved / per_us)


QUANTITIES = (
    "memory_bandwidth",
    "compute__float16",
    "scale_up__bandwidth",
    "efficiency__dense_compute",
    "efficiency__dense_streaming",
)


@settings(max_examples=12)
@given(st.sampled_from(QUANTITIES), st.floats(1, 1.25), st.sampled_from(["static", "eplb"]))
def test_a_faster_machine_is_never_slower(name, factor, balancer):
    arm = replace(ARM, balancer=balancer)
    quicker = replace(arm, hardware=faster(H100, **{name: factor}))
    assert (run(quicker).step_us_N <= run(arm).step_us_N * (1 + 1e-12)).all()


def test_larger_models_take_longer():
    narrow = MODEL.model_copy(update={"inner": MODEL.inner.model_copy(update={"value": 384})})
    assert run(replace(ARM, model=narrow)).tpot_us < run().tpot_us


def test_a_profile_of_other_experts_does_not_count():
    machine, profile = hardware.load("cpu-avx512")
    arm = replace(ARM, hardware=machine, profile=profile, layout=Layout(tensor=2))
    assert len(expert_times(arm).stream_SN) == 2
    other = replace(arm, model=models.load("mixtral-8x7b"))
    assert len(expert_times(other).stream_SN) == 1


def test_the_layers_simulated_stand_for_all():
    static = replace(ARM, balancer="static")
    skew = ReplaySettings(zipf=0.0, seed=1, rows=1024)
    two, four = (simulate(static, skewed(skew, MODEL, n), skewed(skew, MODEL, n)) for n in (2, 4))
    assert two.tpot_us == pytest.approx(four.tpot_us, rel=0.02)


def test_layouts_that_cannot_be_are_refused():
    with pytest.raises(BalancerError, match="from 2 ranks on"):
        Layout()
    dgx1, _ = hardware.load("v100-dgx1")
    with pytest.raises(BalancerError, match="no scale_out"):
        run(replace(ARM, hardware=dgx1, layout=Layout(data=16)))
    with pytest.raises(BalancerError, match="no float8"):
        run(replace(ARM, hardware=dgx1, model=models.load("deepseek-v3")))


def test_what_fits_in_memory():
    assert weight_bytes(MODEL, Layout(data=8), 0) == pytest.approx(
        MODEL.dense_bytes + 48 * 16 * MODEL.expert_bytes
    )
    room = [most_requests(MODEL, H100, Layout(data=8), extra, 4096) for extra in (0, 64, 4096)]
    assert room[0] > room[1] > room[2] == 0


@pytest.mark.parametrize("name", ["modelled", "slo", "phase"])
def test_published_rows_come_out_again(name):
    """Every 60th row of the tables in docs/simulator.md."""
    lines = (ROOT / "bench" / "results" / f"{name}.jsonl").read_text().splitlines()
    fields = Cell.__dataclass_fields__
    for line in lines[::60]:
        row = json.loads(line)
        cell = Cell(**{field: row[field] for field in fields})
        assert cell.key == row["key"]
        again = compute(cell)
        for key, value in again.items():
            same = pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
            assert row[key] == same, f"{key} of {cell}"


def test_predictions_of_published_points_come_out_again():
    lines = (ROOT / "bench" / "results" / "validation.jsonl").read_text().splitlines()
    committed = {(row.get("paper"), row["what"]): row for row in map(json.loads, lines)}
    for row in (*published.reproduction(1), *published.tempo(1)):
        assert row["predicted"] == pytest.approx(
            committed[row["paper"], row["what"]]["predicted"], abs=1e-9
        )
        assert np.sign(row["predicted"]) == np.sign(row["reference"])
