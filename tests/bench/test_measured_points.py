"""Points of the validation: rows of each machine against that machine's file, and no other's."""

import json
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
from measured import latency, row
from tiny_model import CONFIG
from vllm.benchmarks.datasets.utils import get_sampling_params

from bench import measured_points, predictions, real_size_model, run_files, validation_tables
from bench.load import Load
from bench.placed import Slowed
from bench.predictions import Recorded
from bench.provenance import ROOT, config_hash
from bench.validation import RESULTS
from vllm_balance import traces
from vllm_balance.measurement import KernelTime, newest_by_machine, read_measurements
from vllm_balance.simulate import Layout, Outcome, hardware
from vllm_balance.simulate.machine_speed import MachineSpeed
from vllm_balance.simulate.outcome import STAGES
from vllm_balance.simulate.serving import schedule
from vllm_balance.simulate.steps import Steps
from vllm_balance.simulate.sweep import read
from vllm_balance.traces import Trace

HERE, OTHER, UNKNOWN = "Machine of a file", "Another machine of a file", "Machine of no file"
NAMES = {HERE: "here", OTHER: "other"}
FILES = {(machine, "bfloat16"): name for machine, name in NAMES.items()}


def settings(name):
    return run_files.read(run_files.FOLDER / f"{name}.toml")


def cell(arm, machine, run="decode", **changes):
    return row(arm, run=run, machine=machine, config_hash=config_hash(settings(run)), **changes)


def outcome(tpot_us, decode_N=(0, 1), prefill_N=(4, 0)):
    """Steps that take as long as a token, the first one five times; one request from it on."""
    step_us_N = np.full(len(decode_N), tpot_us)
    step_us_N[0] *= 5
    zeros_N = np.zeros(len(decode_N))
    steps = Steps(
        decode_N=np.array(decode_N),
        prefill_N=np.array(prefill_N),
        like_M=np.arange(len(decode_N)),
        arrived_R=np.array([0]),
        first_R=np.array([0]),
        last_R=np.array([len(decode_N) - 1]),
        **dict.fromkeys(NOT_READ, zeros_N),
    )
    return Outcome(
        steps=steps,
        stage_us=dict.fromkeys(STAGES, zeros_N) | {"experts": step_us_N},
        busy_us_N=step_us_N,
        activated_N=np.array([4.0, 6.0]),
        pairs_N=np.array([9.0, 9.0]),
        request_us=0.0,
        request_beside_us=0.0,
        redundant_bytes=0.0,
    )


NOT_READ = ("sampled_N", "engine_prefill_N", "attended_N", "prompt_attended_N", "reads_N")
NOT_READ += ("window_attended_N", "window_reads_N")


@pytest.fixture
def asked(monkeypatch):
    """What was predicted, (arm, hardware file): static 100 ms, others 90, on `other` 10 times."""
    seen = []

    def predict(settings, load, arm, machine, recorded=None, slow=None, speed=None):
        seen.append((arm, machine))
        return outcome((100e3 if arm == "static" else 90e3) * (10 if machine == "other" else 1))

    monkeypatch.setattr(measured_points, "predict", predict)
    monkeypatch.setattr(measured_points, "is_profiled", lambda settings, machine: True)
    monkeypatch.setattr(measured_points, "hardware_names", lambda: FILES)
    return seen


def points(tmp_path, rows, old=(), folder=None):
    for name in {each.run for each in rows}:
        text = "".join(each.model_dump_json() + "\n" for each in rows if each.run == name)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return list(measured_points.points(tmp_path, list(old), folder))


def test_each_machine_is_checked_against_its_own_file(tmp_path, asked):
    rows = [cell(arm, machine, tpot_ms=tpot_ms)
            for machine, scale in ((HERE, 1), (OTHER, 10))
            for arm, tpot_ms in (("static", 100.0 * scale), ("metro", 80.0 * scale))]  # fmt: skip
    made = points(tmp_path, rows)
    assert sorted(asked) == [(arm, name) for arm in ("metro", "static") for name in NAMES.values()]
    tpot = {(p["machine"], p["arm"]): p for p in made if p["what"] == "tpot_ms"
            and p["kind"] == "measured"}  # fmt: skip
    assert tpot[HERE, "metro"]["error"] == pytest.approx(90 / 80 - 1)
    assert tpot[OTHER, "static"]["predicted"] == pytest.approx(1000)
    pairs = [p for p in made if p["kind"] == "pair"]
    assert [(p["machine"], p["reference"]) for p in pairs] == [
        (OTHER, pytest.approx(-0.2)),
        (HERE, pytest.approx(-0.2)),
    ]
    assert all(p["ranked"] and p["far_apart"] for p in pairs)


def test_a_prediction_is_of_a_machine_as_slow_as_it_was_beside_each_arm(
    tmp_path, asked, monkeypatch
):
    def predict(settings, load, arm, machine, recorded, slow, speed):
        return outcome(100e3 * speed.longer_K[0])

    def against(looks, profile):
        assert profile == "a profile"
        longer = [times[0].time_us[0] for times in looks]
        return MachineSpeed((1, 64), (sum(longer) / len(longer), 1.0))

    monkeypatch.setattr(measured_points, "predict", predict)
    monkeypatch.setattr(measured_points.hardware, "load", lambda name: (None, "a profile"))
    monkeypatch.setattr(measured_points.speed, "against", against)
    rows = [
        cell(arm, HERE, tpot_ms=100.0, position=position,
             machine_speed=[KernelTime(activated=16, tokens_each=1, time_us=[factor])])
        for position, (arm, factor) in enumerate((("static", 1.1), ("metro", 1.2), ("metro", 1.4)))
    ]  # fmt: skip
    rows.append(cell("eplb", HERE, tpot_ms=100.0, position=3))
    made = points(tmp_path, rows)
    found = {(p["arm"], p["what"]): p for p in made if p["kind"] == "measured"}
    assert found["static", "tpot_ms"]["predicted"] == pytest.approx(110)
    assert found["metro", "tpot_ms"]["predicted"] == pytest.approx(130)
    assert found["eplb", "tpot_ms"]["predicted"] == pytest.approx(100)
    pair = next(p for p in made if p["kind"] == "pair" and "metro against static" in p["arm"])
    assert pair["predicted"] == pytest.approx(1.3 / 1.1 - 1)
    lines = validation_tables.table("measured", made).splitlines()
    assert [line.split(" | ")[3] for line in lines[2:]] == ["+10%, +0%", "+30%, +0%", "-"]


def test_a_point_says_how_well_its_measured_time_is_known(tmp_path, asked):
    rows = [cell("static", HERE, tpot_ms=ms, position=n) for n, ms in enumerate((90, 100, 95, 160))]
    rows.append(cell("metro", HERE, tpot_ms=100.0))
    found = {p["arm"]: p for p in points(tmp_path, rows) if p["what"] == "tpot_ms" and "apart" in p}
    assert found["static"]["reference"] == 97.5
    assert found["static"]["apart"] == pytest.approx((127.5 - 95) / (127.5 + 95))
    assert found["metro"]["apart"] is None


def test_only_the_newest_rows_of_a_machine_count(tmp_path, asked):
    old = cell("static", HERE, tpot_ms=500.0, sources="old")
    made = points(tmp_path, [old, cell("static", HERE, tpot_ms=100.0), cell("metro", OTHER)])
    errors = [p["error"] for p in made if (p["machine"], p["what"]) == (HERE, "tpot_ms")]
    assert errors == [pytest.approx(0)]


def test_a_machine_without_a_file_is_left_out_and_said(tmp_path, asked, capsys):
    assert points(tmp_path, [cell("static", UNKNOWN)]) == []
    said = " ".join(capsys.readouterr().out.split())
    assert UNKNOWN in said and "bench.machine --write NAME" in said


def test_points_without_rows_are_kept_and_others_replaced(tmp_path, asked, capsys):
    def old(run, machine):
        return {"kind": "measured", "run": run, "machine": machine, "what": "old"}

    before = [old("decode", HERE), old("decode", OTHER), old("prefill", HERE)]
    made = points(
        tmp_path, [cell("static", HERE)], [*before, {"kind": "published", "machine": "m"}]
    )
    kept = [p for p in made if p["what"] == "old"]
    assert kept == [old("decode", OTHER) | {"kept": True}, old("prefill", HERE) | {"kept": True}]
    assert not any("kept" in p for p in made if p["what"] != "old")
    assert capsys.readouterr().out.count("points are") == 2


def test_rows_of_another_number_format_are_left_out(tmp_path, asked, capsys):
    assert points(tmp_path, [cell("static", HERE, "harmoeny-moe-heavy")]) == [] and not asked
    said = " ".join(capsys.readouterr().out.split())
    assert f"No hardware file describes {HERE} in float32; its rows of harmoeny-moe-heavy" in said
    assert predictions.profiled_dtype("cpu-avx512") == "bfloat16"


def recorded(folder, *, used, seed=0, num_experts=64, top_k=6, layers=4):
    """A trace of slow_rank.toml's name and, by default, shape whose tokens use some experts
    alone."""
    noise = np.random.default_rng(seed).random((640, layers, len(used)))
    found = Trace(
        name="t",
        num_experts=num_experts,
        top_k=top_k,
        layer_index_L=np.arange(layers),
        topk_ids_TLK=np.array(used, np.uint8)[np.argsort(noise, axis=2)[..., :top_k]],
        request_id_T=np.repeat(np.arange(64), 10),
    )
    folder.mkdir(exist_ok=True)
    traces.save(folder / "dsv2lite_esft-intent.npz", found)
    return folder


def test_runs_that_replay_a_trace_are_predicted_where_it_is_there(
    tmp_path, asked, capsys, monkeypatch
):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr(real_size_model, "ensure", lambda **shape: tmp_path)
    rows = [cell("static", HERE, "slow_rank", load="decode")]
    rows += [cell("gem", HERE, "slow_rank", load="decode", slow=1.28, slow_shown=1.3)]
    assert points(tmp_path, rows) == [] and not asked
    assert "slow_rank replayed a trace that is not there (--traces)" in capsys.readouterr().out
    folder = recorded(tmp_path / "traces", used=range(8))
    made = points(tmp_path, rows, folder=folder)
    assert {p["arm"] for p in made} == {"decode static", "decode one rank +28% gem"}
    other = [row.model_copy(update={"traffic": "of another"}) for row in rows]
    assert points(tmp_path, other, folder=folder) == []


def test_a_recorded_load_is_predicted_by_what_servers_replay_and_maps_know(tmp_path):
    settings = run_files.read(run_files.FOLDER / "slow_rank.toml")
    load = Load(requests=8, prompt_tokens=2, max_tokens=8)
    trace = recorded(tmp_path, used=range(16)) / "dsv2lite_esft-intent.npz"
    worst = {}
    for arm in ("static", "gem", "eplb"):
        made = predictions.predict(settings, load, arm, "cpu-amx", Recorded(trace, trace))
        worst[arm] = made.pairs_N
    # Two layers, eight tokens, six experts of each: all of rank 0 but by the maps.
    assert set(worst["static"][2:-1]) == {2 * 8 * 6}
    assert worst["gem"].sum() < 0.7 * worst["static"].sum()
    assert worst["eplb"].sum() < 0.7 * worst["static"].sum()


def test_an_arm_is_predicted_on_the_map_that_its_server_has(tmp_path, monkeypatch):
    """Of slow_rank.toml: EPLB's placement under the balancer gem, and GEM's, from the batches that
    `vllm-balance place` is given; the arm without a map is vLLM's own."""
    made = {}
    settings = run_files.read(run_files.FOLDER / "slow_rank.toml")
    trace = recorded(tmp_path, used=range(16)) / "dsv2lite_esft-intent.npz"
    files, slow = Recorded(trace, trace), Slowed(1, 1.28)
    load = Load(requests=1, prompt_tokens=2, max_tokens=2)
    for name in ("static", "gem", "eplb"):
        monkeypatch.setattr(
            predictions, "simulate", lambda arm, *_, name=name: made.update({name: arm})
        )
        predictions.predict(settings, load, name, "cpu-amx", files, slow)
    batches = ((256, 0),) * 128 + ((0, 1000),) * 128
    found = {name: (arm.balancer, arm.placed_by, arm.known_batches) for name, arm in made.items()}
    assert found == {
        "static": ("static", None, ()),
        "gem": ("gem", None, batches),
        "eplb": ("gem", "eplb", batches),
    }
    assert all(arm.slowness == (1.0, 1.28) for arm in made.values())


def test_gem_and_eplb_on_a_slow_rank_are_predicted_apart(tmp_path):
    """GEM's map gives the slow rank less; EPLB's does not know that it is slow."""
    settings = run_files.read(run_files.FOLDER / "slow_rank.toml")
    load = Load(requests=2, prompt_tokens=1000, max_tokens=2)
    trace = recorded(tmp_path, used=range(48)) / "dsv2lite_esft-intent.npz"
    files = Recorded(trace, trace)
    ttft = {
        (name, factor): predictions.predict(
            settings, load, name, "cpu-amx", files, Slowed(1, factor)
        ).ttft_us_at(0.5)
        for name in ("gem", "eplb")
        for factor in (1.0, 1.6)
    }
    assert ttft["gem", 1.6] < 0.95 * ttft["eplb", 1.6]
    assert ttft["eplb", 1.6] > 1.4 * ttft["eplb", 1.0]


def test_steps_are_as_large_as_the_servers(monkeypatch):
    """Four prompts of 1,000 tokens by 2,048 a step take two steps; vLLM's own limit is larger."""
    asked = []
    monkeypatch.setattr(
        predictions, "simulate", lambda arm, *_: asked.append(arm.load.token_budget)
    )
    settings = run_files.read(run_files.FOLDER / "decode.toml")
    flags = ["--enforce-eager", "--max-num-batched-tokens", "2048"]
    for serve in (settings["serve"], settings["serve"] | {"flags": flags}):
        predictions.predict(settings | {"serve": serve}, Load(requests=4, max_tokens=2,
                            prompt_tokens=1000), "static", "cpu-amx")  # fmt: skip
    assert asked == [8192, 2048]


def test_placements_that_move_in_mid_load_are_left_out(tmp_path, asked):
    """Where popular experts change, EPLB follows; what stays or is fetched is predicted."""
    loads = ("even", "0.9 onto 10", "0.9 onto 10, changing")
    rows = [cell(arm, HERE, "harmoeny-short", load=load, output_tokens=1)
            for load in loads for arm in ("static", "eplb", "harmoeny")]  # fmt: skip
    made = points(tmp_path, rows)
    arms = [{p["arm"] for p in made if p["load"] == load and p["kind"] == "measured"}
            for load in loads]  # fmt: skip
    stays = [{f"{load} static", f"{load} harmoeny"} for load in loads]
    assert arms == [stays[0] | {"even eplb"}, stays[1] | {"0.9 onto 10 eplb"}, stays[2]]
    assert {p["what"] for p in made if p["kind"] == "pair" and p["load"] == loads[2]} == {"ttft_ms"}
    assert {p["what"] for p in made} == {"ttft_ms", "activated_worst_rank", "tokens_worst_rank"}


def test_a_load_with_a_skew_of_its_own_is_predicted_under_it(tmp_path, monkeypatch, asked):
    seen = {}

    def predict(tables, load, arm, machine, recorded=None, slow=None, speed=None):
        seen[arm] = predictions.predict(tables, load, arm, "cpu-avx512")
        return outcome(100e3)

    monkeypatch.setattr(measured_points, "predict", predict)
    monkeypatch.setattr(predictions, "simulate", lambda arm, served, placed_by: served.name)
    for load, name in (("even", "zipf 0"), ("Zipf 1.2", "zipf 1.2"), ("8 hot experts", "hot 0.5")):
        points(tmp_path, [cell("metro", HERE, "skew-bfloat16", load=load)])
        assert seen.pop("metro") == name
    points(tmp_path, [cell("static", HERE, "skew-bfloat16", load="Zipf 0.8, changing")])
    assert seen.pop("static") == "zipf 0.8"


def test_a_prediction_has_the_slots_and_the_warmth_of_the_benchmark(monkeypatch):
    made = []
    monkeypatch.setattr(predictions, "simulate", lambda arm, *_: made.append(arm))
    run = settings("harmoeny-short")
    load = Load(**run["load"] | run["loads"]["0.9 onto 10"])
    predictions.predict(run, load, "harmoeny", "cpu-avx512")
    predictions.predict(run, load.model_copy(update={"warm_tokens": None}), "eplb", "cpu-avx512")
    assert [arm.num_redundant for arm in made] == [16, 16]
    assert [[warm.requests for warm in arm.warm] for arm in made] == [[3, 3], []]
    assert made[0].load.concurrency == 1 and not made[0].load.steady


@pytest.mark.parametrize("run", measured_points.RUNS)
def test_every_load_is_predicted_to_its_last_token(run):
    tables = settings(run)
    for own in tables.get("loads", {"": {}}).values():
        asked = Load(**tables.get("load", {}) | own)
        sent = predictions.loop(asked)
        steps = schedule(sent, seed=tables["seed"])
        assert len(steps.first_R) == asked.requests and len(steps.like_M) < predictions.MAX_STEPS
        _, output_R = sent.lengths(np.random.default_rng(tables["seed"]))
        assert steps.sampled_N.sum() == output_R.sum()


def test_lengths_are_those_that_the_client_draws():
    asked = Load(requests=32, concurrency=16, prompt_tokens=129, max_tokens=33, length_spread=0.5)
    plain = SimpleNamespace(num_special_tokens_to_add=lambda: 0, vocab_size=512)
    drawn = get_sampling_params(np.random.default_rng(7), 32, 0.5, 129, 33, plain)
    found = predictions.loop(asked).lengths(np.random.default_rng(7))
    for own_R, clients_R in zip(found, drawn[:2], strict=True):
        assert own_R.tolist() == clients_R.tolist()


def test_exflow_is_predicted_on_the_map_that_its_server_has(tmp_path, monkeypatch):
    """`vllm-balance place` is given the half that placements know, and halves it again."""
    made = []
    monkeypatch.setattr(predictions, "simulate", lambda arm, *_: made.append(arm))
    run = settings("harmoeny-recorded")
    trace = recorded(tmp_path, used=range(32), num_experts=32, top_k=4, layers=2)
    file = trace / "dsv2lite_esft-intent.npz"
    for own in run["loads"].values():
        load = Load(**run["load"] | own)
        predictions.predict(run, load, "exflow", "cpu-amx-float32", Recorded(file, file))
    half, _ = traces.load(file).split(run["seed"])
    assert [(arm.balancer, arm.placed_by) for arm in made] == [("exflow", "exflow")] * 2
    assert all((arm.known_trace.topk_ids_TLK == half.topk_ids_TLK).all() for arm in made)


def test_a_prediction_is_of_the_layout_of_its_case(monkeypatch):
    made = []
    monkeypatch.setattr(predictions, "simulate", lambda arm, *_: made.append(arm))
    run = settings("layout")
    for case in run["cases"].values():
        predictions.predict(run | case, Load(**run["load"]), "metro", "cpu-avx2")
    assert [arm.layout for arm in made] == [Layout(tensor=2), Layout(data=2)]
    assert [arm.num_redundant for arm in made] == [64, 64]


def test_a_machine_has_one_file_of_each_format(monkeypatch):
    found = measured_points.hardware_names()
    assert found["AMD EPYC, AVX-512 BF16, 2 cores, 24 GiB", "bfloat16"] == "cpu-avx512"
    loaded = hardware.load("cpu-avx512")
    monkeypatch.setattr(measured_points.hardware, "load", lambda name: loaded)
    with pytest.raises(ValueError, match=r"a100-40\.toml and a100-80\.toml both .* in bfloat16"):
        measured_points.hardware_names()


def test_tables_name_the_file_of_the_machine(tmp_path, asked):
    rows = [cell(arm, machine, ttft_ms=latency(1000.0)) for machine in NAMES
            for arm in ("static", "metro")]  # fmt: skip
    made = points(tmp_path, rows)
    lines = validation_tables.table("measured", made).splitlines()
    assert lines[0].startswith(
        "| hardware | run | arm | slower than profiled | TPOT ms: measured |"
    )
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| here"] * 2 + ["| other"] * 2
    pairs = validation_tables.table("pairs", made).splitlines()[2:]
    assert [line.split(" | ")[0] for line in pairs] == ["| here", "| other"]


def test_pairs_that_are_ranked_wrong_are_named():
    pair = {"kind": "pair", "run": "r", "load": "batch 8", "hardware": "here", "far_apart": True}
    apart = pair | {"reference": 0.1}
    rows = [
        {**apart, "arm": "batch 8 a against b", "predicted": -0.04, "ranked": False},
        {**apart, "arm": "batch 8 c against b", "predicted": 0.2, "ranked": True},
        {**apart, "arm": "batch 8 c against a", "predicted": -0.2, "ranked": False}
        | {"reference": 0.01, "far_apart": False},
    ]
    (line,) = validation_tables.table("pairs", rows).splitlines()[2:]
    assert line == "| here | r | batch 8 | 3 | 2 | 1 | a against b +10.0%, -4.0% |"


@pytest.mark.parametrize(
    ("run", "load", "file"),
    [
        ("decode", "", "cpu-avx512"),
        ("decode", "", "cpu-amx"),
        ("decode-float32", "", "cpu-avx2"),
        ("batch", "batch 32", "cpu-avx2"),
        ("batch-bfloat16", "batch 32", "cpu-amx"),
    ],
)
def test_measured_tpot_is_predicted_within_a_tenth(tmp_path, run, load, file):
    """Nothing is stubbed: what servers took, against what the simulator of this tree says."""
    rows = newest_by_machine(read_measurements(ROOT / "bench" / "results" / f"{run}.jsonl"))
    own = [each for each in rows[hardware.load(file)[0].machine] if each.load == load]
    every = points(tmp_path, own)
    require_as_published(every)
    made = [p for p in every if p["what"] == "tpot_ms"]
    found = {p["arm"]: p["error"] for p in made if p["kind"] == "measured"}
    assert len(found) == len({each.arm for each in own}) == 4
    assert {arm: error for arm, error in found.items() if abs(error) > 0.1} == {}
    apart = [p for p in made if p["kind"] == "pair" and p["far_apart"]]
    assert len(apart) >= 5 and [p["arm"] for p in apart if not p["ranked"]] == []


def test_first_tokens_of_balancers_that_fetch_are_predicted_as_published(tmp_path):
    rows = newest_by_machine(read_measurements(ROOT / "bench" / "results" / "harmoeny-short.jsonl"))
    own = rows[hardware.load("cpu-avx512")[0].machine]
    every = points(tmp_path, [each for each in own if each.load == "0.9 onto 10"])
    assert len(every) > 10
    require_as_published(every)
    first = [p for p in every if (p["kind"], p["what"]) == ("measured", "ttft_ms")]
    assert len(first) > 2 and all(abs(p["error"]) <= 0.1 for p in first)


@pytest.mark.parametrize(
    ("run", "load"),
    [
        ("layout-bfloat16", ""),
        ("redundancy-bfloat16", ""),
        ("skew-bfloat16", "Zipf 1.2"),
        ("harmoeny-qwen3", "0.9 onto 10"),
    ],
)
def test_predictions_of_a_load_of_other_runs_come_out_again(tmp_path, run, load):
    rows = newest_by_machine(read_measurements(ROOT / "bench" / "results" / f"{run}.jsonl"))
    own = rows[hardware.load("cpu-amx")[0].machine]
    every = points(tmp_path, [each for each in own if each.load == load])
    assert len(every) > 8
    require_as_published(every)


def require_as_published(made):
    """Returns if what this tree predicts is what the committed rows say."""

    def key(point):
        return tuple(point[name] for name in ("kind", "machine", "run", "arm", "what"))

    published = {key(p): p["predicted"] for p in read(RESULTS) if p.get("run")}
    for point in made:
        assert point["predicted"] == pytest.approx(published[key(point)], rel=1e-6), key(point)


def test_what_is_published_is_near_the_aim():
    """The aim is 10 % on every line, and every pair that is further apart ranked as measured. The
    rows are at 83 % of TPOT, 51 % on a machine whose memory was up to half as fast for hours, 96 %
    of pairs in drawn decode, and 97 % of prefill with AMX and on Zen 5 (docs/simulator-results.md),
    and must not fall behind."""
    rows = [p for p in read(RESULTS) if p.get("what") == "tpot_ms" and not p.get("kept")]
    for is_zen5, many, least in ((False, 200, 0.8), (True, 70, 0.5)):
        near = [abs(p["error"]) <= 0.1 for p in rows
                if p["kind"] == "measured" and ("zen5" in p["hardware"]) == is_zen5]  # fmt: skip
        assert len(near) > many and statistics.mean(near) >= least
    decoding = ("decode", "decode-float32", "batch", "batch-bfloat16")
    ranked = [p["ranked"] for p in rows
              if p["kind"] == "pair" and p["far_apart"] and p["run"] in decoding]  # fmt: skip
    assert len(ranked) > 80 and statistics.mean(ranked) >= 0.9
    prefill = ("prefill", "harmoeny-short", "harmoeny-qwen3", "harmoeny-moe-heavy")
    prefill += ("harmoeny-top1-short", "harmoeny-recorded", "harmoeny-dp", "harmoeny-varying")
    prefill += ("harmoeny-moe-heavy-bfloat16",)
    first = [p for p in read(RESULTS) if p.get("run") in prefill and not p.get("kept")]
    ttft = [p for p in first if (p["kind"], p["what"]) == ("measured", "ttft_ms")]
    assert len(ttft) > 150 and all(abs(p["error"]) <= 0.21 for p in ttft)
    found = ("cpu-amx", "cpu-amx-float32", "cpu-avx512-zen5")
    near = [abs(p["error"]) <= 0.1 for p in ttft if p["hardware"] in found]
    assert len(near) > 100 and statistics.mean(near) >= 0.95
    ranked = [p["ranked"] for p in first if p["kind"] == "pair" and p["far_apart"]]
    assert len(ranked) > 40 and statistics.mean(ranked) >= 0.75


def test_the_summary_counts_lines_and_pairs_of_present_code():
    def line(what, error, **more):
        made = {"kind": "measured", "hardware": "here", "what": what, "error": error}
        return made | {"apart": abs(error) / 2} | more

    def pair(ranked, far_apart=True):
        where = {"kind": "pair", "hardware": "here", "what": "tpot_ms"}
        return where | {"ranked": ranked, "far_apart": far_apart}

    rows = [line("tpot_ms", error) for error in (0.05, -0.1, 0.11)]
    rows += [
        line("ttft_ms", 0.3),
        line("ttft_ms", 0.3, apart=None),
        line("activated_worst_rank", 0.0),
    ]
    rows += [line("tpot_ms", 0.0, kept=True), line("ttft_ms", 0.0, hardware="other")]
    rows += [pair(True), pair(False), pair(False, far_apart=False)]
    lines = validation_tables.table("summary", rows).splitlines()
    heads = ("TPOT within 10%", "TPOT measured to 10%", "TTFT within 10%", "TTFT measured to 10%")
    assert lines[0] == f"| hardware | {' | '.join(heads)} | pairs in order |"
    assert lines[2:] == [
        "| here | 2 of 3 | 3 of 3 | 0 of 2 | 0 of 1 | 1 of 2 |",
        "| other | 0 of 0 | 0 of 0 | 1 of 1 | 1 of 1 | - |",
    ]
    for number, each in enumerate(rows):
        each["run"] = "first" if number < 1 else "then"
    assert validation_tables.table("runs", rows).splitlines()[2:] == [
        "| here | first | 1 of 1 | +5% (+5% to +5%) | - | - | - |",
        "| here | then | 1 of 2 | +0% (-10% to +11%) | 0 of 2 | +30% (+30% to +30%) | 1 of 2 |",
        "| other | then | - | - | 1 of 1 | +0% (+0% to +0%) | - |",
    ]
