"""Hardware files of CPU machines from rows and a profile: formulas found again, gaps refused."""

import itertools
import json
from functools import cache

import pytest

from bench import machine, machine_cores, machine_file, machine_numbers, machine_servers
from bench.predictions import NUMBERS, benchmark_model
from bench.provenance import ROOT
from vllm_balance.errors import BalancerError
from vllm_balance.replay_rows import ReplaySettings
from vllm_balance.simulate import Arm, Layout, hardware, simulate, skewed
from vllm_balance.simulate.expert_times import measured
from vllm_balance.simulate.hardware import Hardware

RESULTS = ROOT / "bench" / "results" / "machine.jsonl"
CPU, PROFILE = hardware.load("cpu-avx512")
COPY_US = 1049.0
FIXED = ("step", "layer", "token", "request", "request_beside")
PROMPT_VALUE_US, SCORES = 0.006, 3.0
"""Of the machine that `rows_of` makes up: attention takes four times what it would at the peak."""


def committed_rows():
    """The rows that cpu-avx512 is from, and a copy at the rate of its file: there was no such
    part then."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    own = [row for row in rows if row["machine"] == CPU.machine]
    copied = {"run": "machine", "part": "copy", "bytes": 9437184, "time_us": [COPY_US] * 2}
    return [*own, {**own[-1], **copied}]


def bare():
    """cpu-avx512 without fixed times of steps and requests."""
    changed = CPU.model_dump()
    for name in FIXED:
        changed["fixed"][name]["value"] = 0.0
    return Hardware.model_validate(changed)


@pytest.fixture(scope="module")
def tables():
    """With experts as fast as in the profile: the committed file is older than that share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine_servers, "served_experts", lambda *_: 1.0)
        return machine_file.document("cpu-avx512", committed_rows(), PROFILE)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("compute", "float16", 2.15e11),
        ("efficiency", "expert_streaming", 1.0),
        ("efficiency", "expert_compute", 0.415),
        ("efficiency", "expert_exposed", 0.384),
        ("efficiency", "dense_streaming", 0.414),
        ("efficiency", "dense_compute", 1.0),
        ("efficiency", "dense_exposed", 0.797),
        # What is left of these prompts grows with their length and not faster.
        ("efficiency", "attention_compute", 1.0),
        ("fixed", "prompt_value", 0.0192),
        ("scale_up", "bandwidth", 9.0e9),
        ("host", "bandwidth", 9.0e9),
        ("fixed", "experts", 2.65),
        ("fixed", "layer", 839.0),
        ("fixed", "step", 2770.0),
        ("fixed", "token", 420.0),
        ("fixed", "request", 5590.0),
        ("fixed", "request_beside", 8200.0),
        ("decide", "metro", 137.0),
    ],
)
def test_the_committed_rows_give_these_numbers(tables, part, name, value):
    """To the last of three digits, which a file has."""
    assert tables[part][name]["value"] == pytest.approx(value, rel=0.01)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("compute", "float16"),
        ("efficiency", "expert_streaming"),
        ("efficiency", "expert_compute"),
        ("efficiency", "dense_streaming"),
        ("efficiency", "dense_compute"),
        ("efficiency", "dense_exposed"),
        ("scale_up", "bandwidth"),
        ("host", "bandwidth"),
        ("fixed", "step"),
        ("fixed", "request_beside"),
    ],
)
def test_what_the_committed_file_has_from_the_rows_is_there(tables, part, name):
    """The others were set by hand, from servers whose ranks did not yield."""
    expected = CPU.model_dump()[part][name]["value"]
    assert tables[part][name]["value"] == pytest.approx(expected, rel=0.1)


def test_a_file_says_which_machine_and_profile_it_is_of(tables):
    assert tables["machine"] == CPU.machine
    assert tables["profile"] == CPU.profile
    assert tables["memory_bandwidth"]["value"] == pytest.approx(2.31e10, rel=0.01)


def test_the_time_of_a_request_of_the_catalogue_is_from_the_rows():
    loads = machine_servers.served(
        machine_numbers.part(committed_rows(), "server"), bare(), PROFILE
    )
    fixed = CPU.fixed
    found = machine_servers.of_requests(
        [load for load in loads if load.decodes],
        *(getattr(fixed, name).value for name in ("step", "layer", "token")),
    )
    assert found == pytest.approx([fixed.request.value, fixed.request_beside.value], rel=0.02)


def test_what_was_written_is_read_again(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(machine_servers, "served_experts", lambda *_: 1.0)
    (tmp_path / "mine.profile.json").write_text(PROFILE.model_dump_json())
    path = machine_file.write("mine", committed_rows(), tmp_path)
    read, profile = hardware.load(str(path))
    same = {**tables, "profile": "mine.profile.json"}
    assert read == Hardware.model_validate(same) and profile == PROFILE


@cache
def simulated():
    """(layers, load, outcome) of every load of the benchmark, without fixed times."""
    described, even = bare(), ReplaySettings(zipf=0.0)
    found = []
    for layers, load in itertools.product(machine.LAYERS, machine.LOADS):
        model = machine_servers.benchmark_model("qwen3-30b-a3b", layers)
        arm = Arm(model=model, hardware=described, profile=PROFILE, layout=Layout(tensor=2),
                  load=machine_servers.loop(load), balancer="static")  # fmt: skip
        made = simulate(arm, skewed(even, model, layers), skewed(even, model, layers))
        found.append((layers, load, made))
    return found


def rows_of(fixed):
    """Server rows as a machine with these fixed times would have them, in us."""
    rows = []
    for layers, load, made in simulated():
        more = fixed["step"] + layers * fixed["layer"] + load.requests * fixed["token"]
        # The first of several requests has a step, and a second token with the others' first.
        early, sampled = (1, 1) if load.requests == 1 else (2, load.requests + 1)
        first = early * (fixed["step"] + layers * fixed["layer"]) + sampled * fixed["token"]
        way = fixed["request"] + (load.requests - 1) * fixed["request_beside"]
        steps = len(made.step_us_N)
        if load.max_tokens <= machine_servers.FEW_TOKENS:
            model = machine_servers.benchmark_model("qwen3-30b-a3b", layers)
            peak_us = CPU.peak("float16").per_us
            scores_us = 2 * layers * 16 * 256 * int(made.steps.attended_N[0]) / peak_us
            values = layers * load.prompt_tokens * model.elementwise_width(2)
            first += values * PROMPT_VALUE_US + SCORES * scores_us
        rows.append(
            {
                "part": "server", "commit": "c", "layers": layers, "steps": float(steps),
                **load.model_dump(include={"requests", "prompt_tokens", "max_tokens"}),
                "tpot_ms": (made.tpot_us + more) / 1e3,
                "ttft_ms": (made.ttft_us_at(0.5) + first + way) / 1e3,
                "experts_us_per_layer": made.busy_us_N.sum() / layers / steps,
                "decide_us_per_layer": 55.0,
            }
        )  # fmt: skip
    return rows


def test_fixed_times_of_servers_are_found_again():
    fixed = {"step": 2500.0, "layer": 1200.0, "token": 350.0, "request": 21e3,
             "request_beside": 9e3}  # fmt: skip
    found = machine_servers.of_servers(rows_of(fixed), bare(), PROFILE)
    assert {name: found[name] for name in FIXED} == pytest.approx(fixed, rel=0.03)
    assert found["decide"] == 55.0
    assert found["prompt_value"] == pytest.approx(PROMPT_VALUE_US, rel=0.03)
    assert found["attention_compute"] == pytest.approx(1 / (1 + SCORES), rel=0.03)


def test_how_fast_experts_are_in_a_server_is_found_again():
    rows = rows_of(dict.fromkeys(FIXED, 1000.0))
    assert machine_servers.served_experts(rows, bare(), PROFILE) == pytest.approx(1.0)
    slower = [row | {"experts_us_per_layer": row["experts_us_per_layer"] / 0.8} for row in rows]
    assert machine_servers.served_experts(slower, bare(), PROFILE) == pytest.approx(0.8)


def test_a_slow_repeat_does_not_count():
    fixed = dict.fromkeys(FIXED, 1e3)
    rows = rows_of(fixed)
    late = [{**row, "ttft_ms": 5 * row["ttft_ms"], "tpot_ms": 2 * row["tpot_ms"],
             "steps": 2 * row["steps"]} for row in rows]  # fmt: skip
    found = machine_servers.of_servers([*rows, *late], bare(), PROFILE)
    assert found == machine_servers.of_servers(rows, bare(), PROFILE)


def test_what_slows_the_machine_for_a_while_is_taken_out():
    fixed = dict.fromkeys(FIXED, 1e3)
    rows = rows_of(fixed)
    table, times = measured(PROFILE), ("tpot_ms", "ttft_ms", "experts_us_per_layer")
    slower = [
        {
            **row,
            **{name: 1.3 * row[name] for name in times},
            "machine_speed": [
                {
                    "activated": 16,
                    "tokens_each": tokens,
                    "time_us": list(1.3 * (table.fixed_S2[:, 0] + 16 * table.stream_SN[:, tokens])),
                }
                for tokens in (1, 64)
            ],
        }
        for row in rows
    ]
    assert machine_servers.of_servers(slower, bare(), PROFILE) == pytest.approx(
        machine_servers.of_servers(rows, bare(), PROFILE)
    )


def product_rows(time_us, dtype="bfloat16"):
    return [
        {"part": "product", "dtype": dtype, "commit": "c", "product": name, "tokens": tokens,
         "time_us": [time_us(height * width, tokens)] * 2}
        for name, (height, width) in machine_cores.PRODUCTS.items()
        for tokens in machine_cores.TOKENS
    ]  # fmt: skip


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4)])
def test_a_product_streams_and_then_computes(dtype, width):
    """10 GB/s, 100 GFLOP/s, 60 % of the streaming exposed, all in us."""

    def time_us(weights, tokens):
        stream = width * weights / 1e4
        return max(stream, 0.6 * stream + 2 * weights * tokens / 1e5)

    copied = {"part": "copy", "commit": "c", "bytes": 9437184, "time_us": [1000.0, 1100.0]}
    rows = [*product_rows(time_us, dtype), {**copied, "dtype": dtype}]
    shape = PROFILE.shape.model_copy(update={"dtype": dtype})
    found = machine_numbers.of_cores(rows, PROFILE.model_copy(update={"shape": shape}))
    assert found["memory_bandwidth"] * found["dense_streaming"] == pytest.approx(1e10)
    assert found["peak"] * found["dense_compute"] == pytest.approx(1e11, rel=0.01)
    assert found["dense_exposed"] == pytest.approx(0.6, rel=0.02)
    assert found["copy"] == pytest.approx(9437184 / 2 * (1e6 / 1000 + 1e6 / 1100))
    assert max(found["expert_compute"], found["dense_compute"]) == 1


def test_experts_that_outrun_products_are_the_peak():
    slow = machine_numbers.of_cores(
        [*product_rows(lambda weights, tokens: 1e-3 * weights * tokens),
         {"part": "copy", "commit": "c", "bytes": 1, "time_us": [1.0]}], PROFILE
    )  # fmt: skip
    assert slow["expert_compute"] == 1 and slow["dense_compute"] < 0.1
    assert slow["expert_streaming"] == 1 and slow["dense_streaming"] < 0.1


def test_newer_rows_replace_those_of_older_code():
    rows = [{"part": "copy", "commit": commit, "n": n} for n, commit in enumerate("aabb")]
    assert [row["n"] for row in machine_numbers.part(rows, "copy")] == [2, 3]


@pytest.mark.parametrize("missing", ["product", "copy", "server"])
def test_missing_rows_are_named(missing):
    rows = [row for row in committed_rows() if row["part"] != missing]
    advice = r"`python -m bench\.machine --dtype bfloat16`"
    with pytest.raises(BalancerError, match=rf"no {missing} rows .* {advice}"):
        machine_file.document("x", rows, PROFILE)


def test_a_profile_of_other_ranks_is_refused():
    one = PROFILE.model_copy(update={"ranks": PROFILE.ranks[:1]})
    with pytest.raises(BalancerError, match="of 1 ranks and the rows of this machine of 2"):
        machine_file.document("x", committed_rows(), one)


def test_without_a_profile_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(machine, "_measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(BalancerError, match=r"no gone\.profile\.json .* `vllm-balance profile"):
        machine.machine(write="gone")


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4)])
def test_cores_are_measured_in_the_units_of_the_rows(dtype, width, monkeypatch):
    monkeypatch.setattr(machine_cores, "EXPERTS", 8)
    monkeypatch.setattr(machine_cores, "SECONDS", 0.0)
    monkeypatch.setattr(machine_cores, "EXPERT", (3, 64, 32))
    monkeypatch.setattr(machine_cores, "PRODUCTS", {"router": (128, 64)})
    monkeypatch.setattr(machine_cores, "TOKENS", (1, 8))
    waits = []
    found = machine_cores._copies(lambda: waits.append(1), dtype)
    assert found["bytes"] == width * 3 * 64 * 32 and found["copy"] > 0
    assert set(machine_cores._products(lambda: waits.append(1), dtype)) == {"router 1", "router 8"}
    assert len(waits) == 3


def test_copies_go_all_over_the_buffers():
    places = {turn * machine_cores.STRIDE % machine_cores.EXPERTS for turn in range(100)}
    assert len(places) == machine_cores.EXPERTS


def test_a_model_is_predicted_in_what_it_is_served_in():
    half, full = (benchmark_model("qwen3-30b-a3b", 2, dtype) for dtype in NUMBERS)
    assert (half.expert_number, full.expert_number) == ("float16", "float32")
    assert full.weight_bytes == 2 * half.weight_bytes
    assert full.cache_bytes(9) == 2 * half.cache_bytes(9)
