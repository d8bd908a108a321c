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
from vllm_balance.replay_rows import Hot, ReplaySettings
from vllm_balance.simulate import Arm, Layout, Load, hardware, models, simulate, skewed
from vllm_balance.simulate.dense_times import DenseTimes
from vllm_balance.simulate.links import Network
from vllm_balance.simulate.machine_speed import MachineSpeed
from vllm_balance.simulate.memory import most_requests, weight_bytes
from vllm_balance.simulate.outcome import STAGES
from vllm_balance.simulate.run import decider_of, expert_times
from vllm_balance.simulate.serving import schedule
from vllm_balance.simulate.steps import COLUMNS, Steps
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


def with_numbers(machine, **numbers):
    """The machine with other quantities; names as a__b."""
    changed = machine.model_dump()
    for name, number in numbers.items():
        _part(changed, name)["value"] = number
    return type(machine).model_validate(changed)


def faster(machine, **factors):
    """The machine with quantities multiplied; names as a__b."""
    dumped = machine.model_dump()
    return with_numbers(
        machine, **{name: _part(dumped, name)["value"] * by for name, by in factors.items()}
    )


def _part(tables, name):
    for key in name.split("__"):
        tables = tables[key]
    return tables


def test_every_step_is_the_sum_of_its_stages():
    made = run()
    assert set(made.stage_us) == set(STAGES)
    assert np.allclose(made.step_us_N, sum(made.stage_us.values()))
    assert all((stage >= 0).all() for stage in made.stage_us.values())


def test_times_of_requests_add_up():
    load = Load(concurrency=4, prompt_tokens=8, output_tokens=5, token_budget=64, max_steps=99,
                steady=False)  # fmt: skip
    made = run(replace(ARM, load=load))
    total = made.step_us_N.sum()
    assert len(made.step_us_N) == 6
    assert made.tokens_per_s == pytest.approx(1e6 * 20 / total)
    both_us = made.step_us_N[:2].sum()
    assert made.ttft_us_at(0.5) == pytest.approx(both_us + H100.fixed.request.value)
    weights = [1, 4, 4, 4, 3]
    assert made.tpot_us == pytest.approx(np.average(made.step_us_N[1:], weights=weights))


def test_every_request_of_a_burst_waits_until_all_are_handled():
    load = Load(concurrency=4, prompt_tokens=7, output_tokens=2, token_budget=16, max_steps=99,
                steady=False)  # fmt: skip
    machine = with_numbers(H100, fixed__request=100.0, fixed__request_beside=7.0)
    made = run(replace(ARM, load=load, hardware=machine))
    first, second, third = np.cumsum(made.step_us_N)[:3]
    times = [first + 121, second + 121, second + 121, third + 121]
    assert [made.ttft_us_at(i / 3) for i in range(4)] == pytest.approx(times)
    alone = replace(load, concurrency=1)
    made = run(replace(ARM, load=alone, hardware=machine))
    assert made.ttft_us_at(0.99) == pytest.approx(made.step_us_N[0] + 100)


def test_prompts_that_alternate_between_engines_take_two_steps_but_for_the_first():
    load = Load(concurrency=2, requests=6, prompt_tokens=9, output_tokens=1, token_budget=64,
                max_steps=99, steady=False, engines=2)  # fmt: skip
    machine = with_numbers(H100, fixed__request=100.0, fixed__request_beside=7.0)
    made = run(replace(ARM, load=load, hardware=machine, layout=Layout(data=2)))
    step_us = made.step_us_N
    # The first two came together.
    times = [step_us[0] + 107, step_us[:2].sum() + 107, *(step_us[1:-1] + step_us[2:] + 100)]
    assert [made.ttft_us_at(i / 5) for i in range(6)] == pytest.approx(sorted(times))


def test_what_warms_up_moves_the_traffic_on():
    """A changing skew of one hot expert: under static the load is that of the batches behind it."""
    load = Load(concurrency=1, prompt_tokens=64, output_tokens=1, token_budget=64, max_steps=99,
                steady=False)  # fmt: skip
    arm = replace(ARM, balancer="static", load=replace(load, requests=9))
    hot = ReplaySettings(hot=Hot(experts=8, fraction=1.0, further_fractions=(0.0, 0.5)),
                         change_every=1, seed=1, rows=1024)  # fmt: skip

    def pairs(arm):
        return simulate(arm, skewed(hot, MODEL, 2), skewed(hot, MODEL, 2)).pairs_N

    whole, behind = (
        pairs(each)
        for each in (arm, replace(arm, load=load, warm=(replace(load, requests=4),) * 2))
    )
    assert behind.tolist() == whole[8:].tolist()
    assert len(set(whole.tolist())) > 3


def test_requests_that_arrive_in_turn_do_not_wait_for_each_other():
    load = Load(concurrency=4, prompt_tokens=3, output_tokens=4, token_budget=16, max_steps=40)
    late, free = (with_numbers(H100, fixed__request_beside=us) for us in (1e6, 0.0))
    arrived = run(replace(ARM, load=load)).steps.arrived_R
    together = np.unique(arrived, return_counts=True)[1].max()
    waits = [run(replace(ARM, load=load, hardware=machine)).ttft_us_at(1) for machine in
             (late, free)]  # fmt: skip
    assert waits[0] - waits[1] <= 1e6 * (together - 1) + 1e-3


@pytest.mark.parametrize("balancer", ["static", "eplb", "harmoeny"])
@pytest.mark.parametrize(("prompt", "output", "budget"), [(64, 96, 512), (256, 24, 96)])
def test_a_few_steps_stand_for_a_cycle(balancer, prompt, output, budget):
    """With room for all, and with most requests waiting."""
    load = Load(concurrency=40, prompt_tokens=prompt, output_tokens=output, token_budget=budget,
                max_steps=10**4)  # fmt: skip
    whole, few = (
        run(replace(ARM, balancer=balancer, load=replace(load, max_steps=most)), zipf=0.5)
        for most in (10**4, 16)
    )
    assert len(few.step_us_N) <= 16 < len(whole.step_us_N)
    assert few.tpot_us == pytest.approx(whole.tpot_us, rel=0.01)
    assert few.tokens_per_s == pytest.approx(whole.tokens_per_s, rel=0.01)
    assert few.ttft_us_at(0.5) == pytest.approx(whole.ttft_us_at(0.5), rel=0.02)
    assert few.mean(few.activated_N) == pytest.approx(whole.mean(whole.activated_N), rel=0.02)
    assert few.waiting_share == pytest.approx(whole.waiting_share, abs=0.02)


def test_a_request_that_waits_as_long_as_others_take_gets_its_first_token_that_late():
    """Little's law: 40 requests are in flight, and one is answered every so many microseconds."""
    load = Load(concurrency=40, prompt_tokens=256, output_tokens=24, token_budget=96, max_steps=16)
    made = run(replace(ARM, load=load))
    answered_us = 24 * 1e6 / made.tokens_per_s
    in_flight_us = made.ttft_us_at(0.5) - H100.fixed.request.value + 23 * made.tpot_us
    assert in_flight_us == pytest.approx(40 * answered_us, rel=0.03)


def test_a_warm_server_fetches_less_and_fetches_take_a_cores_own_time():
    """Ten hot experts on one of two ranks: five move, once."""
    machine, profile = hardware.load("cpu-avx512")
    hot = ReplaySettings(hot=Hot(experts=10, fraction=0.9, ranks=2), seed=1, rows=4096)
    load = Load(concurrency=1, prompt_tokens=1000, output_tokens=1, token_budget=4096,
                max_steps=9, steady=False)  # fmt: skip
    arm = Arm(model=MODEL.with_counts(num_layers=2), hardware=machine, profile=profile,
              layout=Layout(tensor=2), load=load, balancer="harmoeny",
              redundancy=1.125)  # fmt: skip

    def experts_us(arm):
        made = simulate(arm, skewed(hot, arm.model, 2), skewed(hot, arm.model, 2))
        return made.stage_us["experts"].sum()

    static, cold, warm = (
        experts_us(replace(arm, **changes))
        for changes in ({"balancer": "static"}, {}, {"warm": (load, load)})
    )
    # Five experts in each of two layers; the schedule counts them and evens the ranks out.
    copies_us = 2 * 5 * MODEL.expert_bytes / machine.host.bandwidth.per_us
    assert copies_us / 4 < cold - warm < copies_us
    assert warm == pytest.approx(0.53 * static, rel=0.03)


def test_even_load_waits_for_nobody_and_static_counts_are_exact():
    made = run(replace(ARM, balancer="static"), zipf=0.0)
    assert made.redundant_bytes == 0
    assert made.waiting_share < 0.1
    assert made.activated_N.max() <= MODEL.num_moe_layers * 128 / 8


def test_redundant_memory():
    assert run().redundant_bytes == 4 * 48 * MODEL.expert_bytes


def test_one_request_that_waits_for_the_others_prompts_does_not_move_the_median():
    """Of three requests the first has its prompt computed alone: a step of two prompts is in its
    answer and in no other's."""
    load = Load(concurrency=3, prompt_tokens=100, output_tokens=5, token_budget=512, max_steps=99,
                steady=False)  # fmt: skip
    made = run(replace(ARM, load=load))
    steps, step_us = made.steps, made.step_us_N
    assert (steps.first_R.tolist(), steps.last_R.tolist()) == ([0, 1, 1], [4, 5, 5])
    first, others = step_us[1:5].mean(), step_us[2:6].mean()
    assert first > 1.05 * others
    assert made.tpot_us_at(0.5) == pytest.approx(others)
    assert made.tpot_us_at(1.0) == pytest.approx(first)
    assert made.tpot_us == pytest.approx(
        (step_us[1] + 3 * step_us[2:5].sum() + 2 * step_us[5]) / 12
    )
    once = run(replace(ARM, load=replace(load, output_tokens=1)))
    assert np.isnan(once.tpot_us_at(0.5))
    cut = run(replace(ARM, load=replace(load, max_steps=5)))
    assert cut.tpot_us_at(0.5) == pytest.approx(first), "only the first one ended"


def test_all_requests_of_a_steady_load_have_its_tpot():
    """As good as all: their answers end behind the first steps and before the last ones."""
    made = run(replace(ARM, load=replace(ARM.load, max_steps=400)))
    assert made.tpot_us_at(0.5) == pytest.approx(made.tpot_us, rel=0.02)


def test_attention_of_one_token_streams_its_weights():
    """On the engine that has it, however many there are."""
    steps = schedule(Load(concurrency=1, prompt_tokens=1, output_tokens=2, token_budget=16,
                          max_steps=2, steady=False, engines=8))  # fmt: skip
    per_us = 3.35e6 * 0.8
    moved = MODEL.attention_weights * 2 + np.array([1, 2]) * MODEL.cache_width * 2
    assert dense(MODEL, data=8).attention_us(steps) == pytest.approx(48 * moved / per_us)


def dense(model, machine=H100, **layout):
    return DenseTimes(model=model, hardware=machine, layout=Layout(**layout),
                      network=Network.of(machine))  # fmt: skip


def one_step(**tokens):
    """A step of so many tokens of each kind; 0 of the others."""
    return Steps(**{name: np.array([tokens.get(name, 0.0)]) for name in COLUMNS},
                 like_M=np.zeros(1, int), **dict.fromkeys(("arrived_R", "first_R", "last_R"),
                 np.zeros(0)))  # fmt: skip


def test_every_engine_answers_its_own_tokens():
    """1,024 tokens that come out of 8 engines take the time of 128, not of all one by one."""

    def rest(tokens):
        step = one_step(decode_N=1024.0, sampled_N=tokens)
        both = dense(MODEL, data=8)
        return both.rest_us(step)[0] + both.served_us(step)[0]

    fixed = H100.fixed.token.value
    assert rest(1024.0) - rest(8.0) == pytest.approx(127 * fixed, abs=30)
    assert rest(1024.0) == rest(1017.0)


def test_a_slower_machine_is_slower_in_all_that_it_computes_and_decides_the_same():
    """All alike, or products and experts by their tokens and what is fixed as memory is."""
    cpu, profile = hardware.load("cpu-avx512-zen5")
    load = replace(ARM.load, concurrency=8)
    arm = replace(ARM, hardware=cpu, profile=profile, layout=Layout(tensor=2), load=load)
    before = run(arm)
    evenly = run(replace(arm, speed=MachineSpeed((1, 64), (1.3, 1.3))))
    assert evenly.step_us_N == pytest.approx(1.3 * before.step_us_N)
    assert (evenly.stage_us["combine"] > before.stage_us["combine"]).all()
    assert evenly.request_us == pytest.approx(1.3 * before.request_us)
    crowded = run(replace(arm, speed=MachineSpeed((1, 64), (1.3, 1.0))))
    assert (crowded.activated_N == before.activated_N).all()
    assert crowded.stage_us["decide"] == pytest.approx(1.3 * before.stage_us["decide"])
    longer_N = crowded.stage_us["experts"] / before.stage_us["experts"]
    assert (longer_N > 1.05).all() and (longer_N < 1.3).all()


def test_norms_and_rotary_embedding_of_prompts_grow_with_the_prompt():
    """Hidden states twice, queries and keys of the rank: 48 layers of 4,096 + (32 + 4) * 128 / 2
    values a token on each of two ranks, of the engine with most prompt tokens."""
    cpu, _ = hardware.load("cpu-amx")
    step = one_step(prefill_N=150.0, engine_prefill_N=100.0)
    value_us = cpu.fixed.prompt_value.value
    bare = cpu.model_copy(update={"fixed": cpu.fixed.model_copy(update={"prompt_value": None})})
    more, without = (dense(MODEL, each, tensor=2).rest_us(step)[0] for each in (cpu, bare))
    assert more - without == pytest.approx(100 * 48 * (4096 + 36 * 128 / 2) * value_us)


def test_prompts_of_latent_attention_are_unpacked_and_decoding_is_not():
    """DeepSeek: 128 + 64 + 128 multiplications for a prompt's pair, 512 + 64 + 512 to decode."""
    model = models.load("deepseek-v3")
    decoding = dict(decode_N=1.0, attended_N=1e9)
    prompt = dict(prefill_N=1.0, engine_prefill_N=1.0, attended_N=1e9, prompt_attended_N=1e9)
    bare = dense(model, data=8).attention_us(one_step(decode_N=1.0))
    times = [dense(model, data=8).attention_us(one_step(**each)) - bare
             for each in (decoding, prompt)]  # fmt: skip
    assert times[1] / times[0] == pytest.approx(320 / 1088, rel=1e-6)


def test_tensor_ranks_inside_data_parallelism_share_one_engine():
    """TP2 x DP4: half of the heads and weights, whole what latent attention shrinks tokens with,
    and an all-reduce behind attention and dense layers."""
    model, tokens = models.load("deepseek-v3"), 8.0
    step = one_step(decode_N=4 * tokens, sampled_N=4 * tokens)
    whole, split = dense(model, data=4), dense(model, tensor=2, data=4)
    per_us = H100.memory_bandwidth.per_us * H100.efficiency.dense_streaming.value
    shrink = 7168 * (1536 + 512 + 64)
    assert model.replicated_weights == shrink
    saved = (model.attention_weights - shrink) / 2 * model.dense_weight.value / per_us
    reduced = split.network.all_reduce_us(tokens * 7168 * 2, 2)
    expected = whole.attention_us(step) + 61 * (reduced - saved)
    assert split.attention_us(step) == pytest.approx(expected)
    rest = [part.rest_us(step)[0] for part in (whole, split)]
    halves = (58 * model.shared_width + 3 * model.dense_width) * model.dense_weight.value
    halves += model.vocabulary.value * model.head_weight.value
    expected = rest[0] - 7168 * halves / 2 / per_us + 3 * reduced
    assert rest[1] == pytest.approx(expected)


def test_values_that_travel_have_the_format_of_the_model():
    widths = {name: models.load(name).activation_bytes for name in ("switch-128", "deepseek-v3")}
    assert widths == {"switch-128": 4, "deepseek-v3": 2}
    v100 = hardware.load("v100-dgx1")[0]
    switch = models.load("switch-128")
    asked = one_step(prefill_N=1.0, engine_prefill_N=1.0, attended_N=1e9, prompt_attended_N=1e9)
    flop = 2 * switch.num_heads.value * switch.attention_width * 1e9 * switch.num_layers.value
    per_us = v100.compute["float32"].per_us * v100.efficiency.attention_compute.value
    assert dense(switch, v100, data=8).attention_us(asked)[0] == pytest.approx(
        flop / per_us, rel=1e-3
    )


QUANTITIES = (
    "memory_bandwidth",
    "compute__float16",
    "scale_up__bandwidth",
    "scale_out__bandwidth",
    "host__bandwidth",
    "efficiency__expert_streaming",
    "efficiency__expert_compute",
    "efficiency__dense_compute",
    "efficiency__dense_streaming",
    "efficiency__attention_compute",
)
SLOWER = {name: 0.7 for name in QUANTITIES if name.startswith("efficiency")}
SLOWER["host__bandwidth"] = 2.0
"""Shares of a peak, so that there is room above; over PCIe no such batch would fetch."""
FETCHED = Load(concurrency=128, prompt_tokens=512, output_tokens=2, token_budget=65536, max_steps=3,
               steady=False)  # fmt: skip
"""Batches that experts are fetched for; a steady load finds them in their slots."""
WAITING = {"prefetch": "sync"}
"""Of an arm that fetches: its experts wait, so that a faster link is seen."""


@settings(max_examples=40)
@given(
    st.sampled_from(QUANTITIES),
    st.floats(1, 1.25),
    st.sampled_from(["static", "eplb", "first_copy", "metro", "harmoeny"]),
    st.sampled_from(["all_gather", "all_to_all"]),
)
def test_a_faster_machine_is_never_slower(name, factor, balancer, dispatch):
    """Two nodes.

    `metro` and `harmoeny` decide by what the machine can do, and another decision may turn out
    worse in one step: both machines get what the slower one's policy decides.
    """
    slow = faster(H100, **SLOWER)
    nodes = Layout(data=8, ranks_per_node=4, dispatch=dispatch)
    load = FETCHED if balancer == "harmoeny" else ARM.load
    arm = replace(ARM, hardware=slow, balancer=balancer, layout=nodes, load=load)
    quick = replace(arm, hardware=faster(slow, **{name: factor}))
    made = [run_as(arm, each) for each in (quick, arm)]
    assert (made[0].step_us_N <= made[1].step_us_N * (1 + 1e-12)).all()


def run_as(decides, arm):
    """A run in which the policy is that of another arm."""
    with pytest.MonkeyPatch.context() as patch:
        own = decider_of
        patch.setattr(
            "vllm_balance.simulate.run.decider_of",
            lambda _, placed_by, steps: own(decides, placed_by),
        )
        return run(arm)


@pytest.mark.parametrize(
    ("name", "balancer", "dispatch"),
    [
        ("scale_out__bandwidth", "static", "all_to_all"),
        ("scale_up__bandwidth", "static", "all_gather"),
        ("host__bandwidth", "harmoeny", "all_gather"),
        ("memory_bandwidth", "metro", "all_gather"),
        ("efficiency__expert_streaming", "eplb", "all_gather"),
    ],
)
def test_a_constant_that_matters_makes_a_difference(name, balancer, dispatch):
    nodes = Layout(data=8, ranks_per_node=4, dispatch=dispatch)
    load = replace(ARM.load, concurrency=256, prompt_tokens=512, token_budget=8192)
    load = FETCHED if balancer == "harmoeny" else load
    slow = faster(H100, **SLOWER)
    arm = replace(ARM, hardware=slow, balancer=balancer, layout=nodes, load=load, **WAITING)
    quick = replace(arm, hardware=faster(arm.hardware, **{name: 1.2}))
    assert run_as(arm, quick).step_us_N.sum() < run_as(arm, arm).step_us_N.sum()


def test_tokens_travel_to_fp8_experts_quantised_and_back_as_they_are():
    """8 bits and a 32-bit scale for 128 values, whatever the dispatch; ids and weights beside."""
    for dispatch in ("all_gather", "all_to_all"):
        arm = replace(ARM, layout=Layout(data=8, dispatch=dispatch), hardware=without_latency(),
                      balancer="static", redundancy=1.0)  # fmt: skip
        fp8 = MODEL.model_copy(update={"expert_number": "float8"})
        wide, quantised = (run(replace(arm, model=model)).stage_us for model in (MODEL, fp8))
        ids = 8 * MODEL.top_k.value if dispatch == "all_gather" else 0
        hidden = MODEL.hidden.value
        expected = (hidden * (1 + 4 / 128) + ids) / (2 * hidden + ids)
        assert quantised["dispatch"].sum() / wide["dispatch"].sum() == pytest.approx(expected)
        assert quantised["combine"].tolist() == wide["combine"].tolist()


def without_latency():
    link = H100.scale_up.model_copy(
        update={"latency": H100.scale_up.latency.model_copy(update={"value": 0.0})}
    )
    return H100.model_copy(update={"scale_up": link})


def test_larger_models_take_longer():
    narrow = MODEL.model_copy(update={"inner": MODEL.inner.model_copy(update={"value": 384})})
    assert run(replace(ARM, model=narrow)).tpot_us < run().tpot_us


def test_a_profile_of_other_experts_counts_by_their_size():
    machine, profile = hardware.load("cpu-avx512")
    arm = replace(ARM, hardware=machine, profile=profile, layout=Layout(tensor=2))
    own = expert_times(arm)
    large = expert_times(replace(arm, model=models.load("mixtral-8x7b")))
    assert len(own.stream_SN) == 2
    size = (4096 * 14336) / (2048 * 768)
    assert large.stream_SN == pytest.approx(own.stream_SN * size)
    assert (large.fixed_S2 == own.fixed_S2).all()
    assert large.knee_tokens == pytest.approx(own.knee_tokens)


def test_a_profile_in_another_format_does_not_count():
    _, profile = hardware.load("cpu-avx512")
    arm = replace(ARM, hardware=H100, profile=profile)
    assert len(expert_times(arm).stream_SN) == 2
    quantised = models.load("qwen3-235b-a22b-fp8")
    assert len(expert_times(replace(arm, model=quantised)).stream_SN) == 1


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


def newest(name):
    """Committed rows of the tables in docs/simulator-results.md, the last of each cell."""
    lines = (ROOT / "bench" / "results" / f"{name}.jsonl").read_text().splitlines()
    return list({row["key"]: row for row in map(json.loads, lines)}.values())


def chosen(name):
    """A row of each balancer, model, machine, skew and kind of load, and one that does not fit if
    there is one."""
    found = {}
    for row in newest(name):
        prefill = row["output_tokens"] == 1
        kind = (row["balancer"], row["model"], row["hardware"], row["zipf"], prefill, row["fits"])
        found.setdefault(kind, row)
    refused = [kind for kind in found if not kind[-1]]
    return [row for kind, row in found.items() if kind[-1] or kind == refused[0]]


@pytest.mark.parametrize("name", ["modelled", "slo", "phase"])
def test_every_balancer_has_rows_in_each_table(name):
    fitting = {row["balancer"] for row in chosen(name) if row["fits"]}
    known = {"static", "eplb", "gem", "first_copy", "metro"}
    assert fitting == (known | {"harmoeny"} if name == "phase" else known)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{name}-{row['balancer']}-{row['key']}")
        for name in ("modelled", "slo", "phase")
        for row in chosen(name)
    ],
)
def test_published_rows_come_out_again(row):
    """A row of each balancer of each table of the docs, exactly, on any processor."""
    cell = Cell(**{field: row[field] for field in Cell.__dataclass_fields__})
    assert cell.key == row["key"]
    for key, value in compute(cell).items():
        same = pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
        assert row[key] == same, f"{key} of {cell}"


def test_predictions_of_published_points_come_out_again():
    """All of them, in the order of the committed rows."""
    lines = (ROOT / "bench" / "results" / "validation.jsonl").read_text().splitlines()
    committed = [row for row in map(json.loads, lines) if row["kind"].startswith("published")]
    again = list(published.rows(1))
    assert [row["what"] for row in again] == [row["what"] for row in committed]
    assert len(again) == 40
    for row, before in zip(again, committed, strict=True):
        for key, value in row.items():
            same = pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
            assert before[key] == same, f"{key} of {row['paper']}: {row['what']}"


def test_published_gains_that_are_predicted_with_the_wrong_sign_are_the_known_ones():
    wrong = {row["what"] for row in published.rows(1)
             if np.sign(row["predicted"]) != np.sign(row["reference"])}  # fmt: skip
    assert all("1.125 x" in what for what in wrong)
