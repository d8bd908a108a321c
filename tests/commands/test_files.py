"""`place`, `trace info` and the parts of `profile` that need no measuring."""

import json
import os
import sys
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_model import CONFIG
from typer.testing import CliRunner

from vllm_balance import commands, documents, maps, profiles, traces
from vllm_balance.commands import expert_probe, profiled_ranks
from vllm_balance.commands.expert_probe import Timing
from vllm_balance.commands.profile import own_cores, ranks_of, sample
from vllm_balance.commands.profile_check import check_profile, deviations, measure_again
from vllm_balance.commands.profile_samples import ON_CORES, ON_GPU, grid
from vllm_balance.commands.rank_curves import curves, fastest, slowness
from vllm_balance.cost import CostModel
from vllm_balance.errors import BalancerError
from vllm_balance.model_shape import ModelShape
from vllm_balance.placement import Cluster, score_L
from vllm_balance.placement.batches import Batches
from vllm_balance.recording import Phase, RecordingFile
from vllm_balance.seams.device import served_dtype
from vllm_balance.trace_summary import kinds

SHAPE = ModelShape(
    name="m",
    architecture="M",
    num_layers=4,
    num_experts=8,
    top_k=2,
    hidden=64,
    inner=32,
    dtype="bfloat16",
)
CURVES = (
    CostModel(a_us=50, b_us=400, c_us=100, beta_us=20),
    CostModel(a_us=50, b_us=500, c_us=100, beta_us=25),
)


class Instrument:
    """Answers as ranks with known curves would; in each round all are slower by another factor.

    `disturbed` slows one rank of one round.
    """

    def __init__(self, curves=CURVES, disturbed=None):
        self.curves, self.disturbed = curves, disturbed
        self.measured = Counter()
        self.timed_once = set()

    def measure(self, tokens_E, repeats=None):
        self.measured[tuple(tokens_E)] += 1
        if repeats == 1:
            self.timed_once.add(tuple(tokens_E))
        turn = self.measured[tuple(tokens_E)]
        slower = 1.0 if turn == 3 else 1.4
        times = [slower * curve.of_experts(np.array(tokens_E)) for curve in self.curves]
        if self.disturbed is not None and turn == self.disturbed[0]:
            times[self.disturbed[1]] *= 1.3
        return [Timing(time_us=time_us, repeats=3) for time_us in times]


def test_every_batch_is_measured_in_every_round_and_the_fastest_counts():
    instrument = Instrument()
    points_RSN = sample(instrument, local=8)
    assert set(instrument.measured.values()) == {len(points_RSN)} == {6}
    for curve, points in zip(CURVES, fastest(points_RSN), strict=True):
        assert len(points) == len(instrument.measured)
        for point in points:
            assert point.time_us == pytest.approx(curve.of_experts(np.array(point.tokens_E)))


def test_no_round_is_begun_late_beyond_three(monkeypatch):
    monkeypatch.setattr(sys.modules[sample.__module__], "SECONDS", 0.0)
    assert len(sample(Instrument(), local=8)) == 3


@pytest.mark.parametrize(("slower", "once", "left_out"), [(1, 0, 0), (36, 1, 0), (120, 1, 1)])
def test_large_experts_are_timed_less_often_or_not_at_all(slower, once, left_out, capsys):
    """As the curves are, the longest batch takes 21 and 26 ms, the first time 1.4 times that."""
    instrument, usual = Instrument([curve.slowed(slower) for curve in CURVES]), Instrument()
    points_RSN = sample(instrument, local=8)
    assert len(set(instrument.measured.values())) == 1, "the same batches in every round"
    sample(usual, local=8)
    missing = usual.measured.keys() - instrument.measured.keys()
    assert (bool(instrument.timed_once), bool(missing)) == (once, left_out)
    printed = capsys.readouterr().out
    assert ("a round takes long" in printed, "left out" in printed) == (once, left_out)
    assert all(sum(tokens_E) > 200 for tokens_E in missing)
    assert (1,) not in instrument.timed_once, "it is short"
    assert curves(points_RSN)[0].median_relative_error < 0.08


def test_a_profile_that_does_not_fit_into_memory_is_refused_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(profiled_ranks, "available_bytes", lambda: 2**30)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    refused = run("profile", tmp_path, "--ranks", 2, "-o", tmp_path / "p.json").exception
    assert isinstance(refused, BalancerError) and "1.0 GiB are free" in str(refused)


def test_a_rank_is_slow_if_the_rounds_agree_and_not_if_one_was_disturbed():
    alike = CURVES[:1] * 2
    slow = (CURVES[0], CURVES[0].slowed(1.08))
    assert slowness(sample(Instrument(slow), local=8)) == pytest.approx([1 / 1.04, 1.08 / 1.04])
    assert slowness(sample(Instrument(alike, disturbed=(2, 1)), local=8)).tolist() == [1, 1]
    first, second = (found.model for found in curves(sample(Instrument(slow), local=8)))
    assert second.b_us / first.b_us == pytest.approx(1.08)
    assert (second.tile_tokens, second.free_tokens) == (first.tile_tokens, first.free_tokens)


def test_another_kind_of_device_has_a_curve_of_its_own():
    other = CostModel(a_us=300, b_us=40, c_us=900, beta_us=1)
    kinds = (CURVES[0], other)
    points_RSN = sample(Instrument(kinds), local=8)
    for found, true, points in zip(curves(points_RSN), kinds, fastest(points_RSN), strict=True):
        assert found.median_relative_error < 0.02
        for point in points:
            tokens_E = np.array(point.tokens_E)
            assert found.model.of_experts(tokens_E) == pytest.approx(
                true.of_experts(tokens_E), rel=0.1
            )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A profile and a trace of one model."""
    path = tmp_path_factory.mktemp("files")
    measured = profiles.Profile(
        units=profiles.Units(),
        created=datetime.now(UTC),
        device="d",
        versions={},
        shape=SHAPE,
        ranks=ranks_of(sample(Instrument(), local=8), ["core 0", "core 1"]),
    )
    documents.write(path / "p.json", measured)
    noise = np.random.default_rng(0).gumbel(size=(600, 3, 8)) - np.log(np.arange(1, 9))
    trace = traces.Trace(
        name="t",
        num_experts=8,
        top_k=2,
        layer_index_L=np.array([0, 1, 3]),
        topk_ids_TLK=np.argsort(-noise, axis=2)[..., :2].astype(np.uint8),
        request_id_T=np.arange(600) // 20,
    )
    traces.save(path / "t.npz", trace)
    return path


def run(*arguments):
    runner = CliRunner(env={"COLUMNS": "200"})
    return runner.invoke(commands.app, [str(argument) for argument in arguments])


def test_samples_of_known_ranks_give_their_curves(folder):
    for rank, true in zip(profiles.load(folder / "p.json").ranks, CURVES, strict=True):
        assert rank.curve.knee_tokens == pytest.approx(20, rel=0.02)
        assert rank.curve.median_relative_error < 0.01
        points = [np.array(point.tokens_E) for point in rank.points]
        assert [rank.curve.model.of_experts(p) for p in points] == pytest.approx(
            [true.of_experts(p) for p in points], rel=0.02
        )


@pytest.mark.parametrize("local", [1, 2, 8, 64, 256])
@pytest.mark.parametrize("knee", [1.0, 4.0, 30.0, 128.0])
def test_the_grid_has_batches_of_every_kind_and_none_too_big(local, knee):
    for extent in (ON_CORES, ON_GPU):
        batches = grid(local, knee, extent)
        assert len(batches) <= 44
        assert all(0 < len(b) <= local and min(b) >= 1 for b in batches)
        assert all(sum(b) <= extent.most_tokens for b in batches)


@pytest.mark.parametrize("local", [1, 8, 64, 256])
def test_the_grid_has_both_sides_of_where_a_grouped_kernel_begins_a_tile(local):
    """Evenly loaded, with equally many experts, so that nothing but the tile differs."""
    batches = [[n] * local for n in ON_CORES.coarse] + grid(local, 4.0)
    even = {(len(batch), batch[0]) for batch in batches if len(set(batch)) == 1}
    for tile in (16, 32, 64, 128):
        assert {(min(local, 16), tile), (min(local, 16), tile + 1)} <= even


def test_the_tile_of_a_grouped_kernel_is_found_again_by_its_samples():
    """An expert that streams its weights again for every further 32 tokens."""
    tiled = CostModel(a_us=50, b_us=400, c_us=50, beta_us=2, tile_us=300, tile_tokens=32)
    points_RSN = sample(Instrument([tiled]), local=64)
    found = curves(points_RSN)[0].model
    assert (found.tile_tokens, found.free_tokens) == (32, 32)
    assert found.tile_us == pytest.approx(300, rel=0.02)


def test_deviations_are_medians_per_rank(folder):
    stored = profiles.load(folder / "p.json")
    again = [[rank.points[i].time_us for rank in stored.ranks] for i in (0, 1, 2)]
    assert deviations(stored, [0, 1, 2], again) == [1.0, 1.0]
    slower = [[first, 1.5 * second] for first, second in again]
    assert deviations(stored, [0, 1, 2], slower) == pytest.approx([1.0, 1.5])


def test_a_check_takes_the_fastest_of_three_rounds_as_a_profile_does(folder):
    """The instrument is slower by 40 % in the first two rounds, as a disturbed machine is."""
    stored = profiles.load(folder / "p.json")
    batches = [stored.ranks[0].points[i].tokens_E for i in (0, 5, 9)]
    instrument = Instrument()
    again = measure_again(instrument, batches)
    assert [instrument.measured[tuple(batch)] for batch in batches] == [3, 3, 3]
    assert again == [
        [pytest.approx(curve.of_experts(np.array(batch))) for curve in CURVES] for batch in batches
    ]
    assert deviations(stored, [0, 5, 9], again) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("policy", ["linear", "round_robin", "gem", "gem_r", "exflow"])
def test_place_writes_a_map_that_fits_the_model(folder, policy):
    output = folder / f"{policy}.json"
    extra = ("--redundant", 2) if policy == "gem_r" else ()
    done = run("place", "--policy", policy, "--profile", folder / "p.json", "--trace",
               folder / "t.npz", "--ranks", 2, "-o", output, "--steps", 8, *extra)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "lower bound" in done.output and "3 of the model's 4 layers" in done.output
    found = maps.load(output)
    found.require(shape=SHAPE, num_ranks=2, layers=[0, 1, 3])
    with pytest.raises(BalancerError, match="no entry for layer 2"):
        found.require(shape=SHAPE, num_ranks=2, layers=[2])


def test_ranks_are_the_profiles_and_kinds_of_experts_are_reported(folder):
    files = ("--profile", folder / "p.json", "--trace", folder / "t.npz", "-o", folder / "m.json")
    done = run("place", "--policy", "gem+r", *files, "--redundant", 2, "--steps", 8)
    assert done.exit_code == 0, done.output
    found = maps.load(folder / "m.json")
    assert (found.num_ranks, found.policy) == (2, "gem_r")
    drawn = Batches(batch=256, steps=8, phase=None, prefill_batch=None, seed=0)
    consistent_LE, temporal_LE = kinds(drawn.of(traces.load(folder / "t.npz").split(0)[0]))
    said = " ".join(done.output.split())
    assert f"{consistent_LE.sum(1).mean():.1f} consistent" in said
    assert f"{temporal_LE.sum(1).mean():.1f} temporal" in said


def test_experts_are_placed_without_a_profile_by_the_speeds_that_are_given(folder, tmp_path):
    """A device that cannot be profiled: the slow rank gets less of the load."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 4}))
    trace = traces.load(folder / "t.npz")
    counts = trace.steps(256, 40, 9)
    shares = []
    for speeds in ("1,1", "1,0.5"):
        done = run("place", "--model", tmp_path, "--speeds", speeds, "--trace", folder / "t.npz",
                   "-o", tmp_path / "m.json", "--batch", 4096, "--force")  # fmt: skip
        assert done.exit_code == 0, done.output
        assert "times of a token" in done.output
        found = maps.load(tmp_path / "m.json")
        assert found.sources["speeds"] == speeds and found.num_ranks == 2
        slow_LP = found.placement_LP([0, 1, 3])[:, 4:]
        load_LE = counts.sum(0)
        shares.append(np.take_along_axis(load_LE, slow_LP, axis=1).sum() / load_LE.sum())
    assert shares[1] < shares[0] - 0.05
    assert "knee_tokens" not in found.sources
    done = run("place", "--model", tmp_path, "--ranks", 2, "--knee-tokens", 20,
               "--trace", folder / "t.npz", "-o", tmp_path / "k.json")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert maps.load(tmp_path / "k.json").sources["knee_tokens"] == "20"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ((), "neither was given"),
        (("--profile", "p.json", "--model", "."), "both were given"),
        (("--model", "."), "add --ranks N, or --speeds"),
        (("--model", ".", "--speeds", "1,x"), "a positive number for each rank"),
        (("--model", ".", "--speeds", "1,0"), "a positive number for each rank"),
        (("--model", ".", "--ranks", 2, "--knee-tokens", 0), "it is a positive number that goes"),
        (("--profile", "p.json", "--knee-tokens", 9), "goes with --model, as a profile has"),
        (
            ("--model", ".", "--speeds", "1,1", "--ranks", 3),
            "names 2 ranks, and --ranks asks for 3",
        ),
        (("--profile", "p.json", "--speeds", "1,1,1"), "3 ranks were asked for"),
    ],
)
def test_place_says_what_it_needs_to_know_of_the_ranks(folder, monkeypatch, given, reason):
    monkeypatch.chdir(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 4}))
    done = run("place", *given, "--trace", folder / "t.npz", "-o", folder / "no.json")
    assert isinstance(done.exception, BalancerError) and reason in str(done.exception)
    assert not (folder / "no.json").exists()


def test_what_a_server_recorded_is_described_and_placed_by(folder, tmp_path):
    """Also without the directory that a killed server has not written."""
    header = {"num_experts": 8, "top_k": 2, "rank": 0, "num_ranks": 1, "layer_index": [0, 1, 3]}
    file = RecordingFile(tmp_path / "r.npz", "counts", 2**20, header)
    counts_NLE = traces.load(folder / "t.npz").chunks(10)
    phase_N = np.arange(60) % 3
    file.append({"step": np.arange(60), "phase": phase_N.astype(np.uint8), "counts": counts_NLE})
    described = run("trace", "info", tmp_path / "r.npz", "--plot", tmp_path / "r.png")
    assert described.exit_code == 0, described.output
    assert "600 tokens, 60 recorded steps; 20 prefill, 20 decode, 20 mixed." in described.output
    assert (tmp_path / "r.png").stat().st_size > 1000
    done = run("place", "--profile", folder / "p.json", "--trace", tmp_path / "r.npz",
               "--ranks", 2, "-o", tmp_path / "m.json", "--steps", 8)  # fmt: skip
    assert done.exit_code == 0, done.output
    maps.load(tmp_path / "m.json").require(shape=SHAPE, num_ranks=2, layers=[0, 1, 3])
    file.close()


def test_a_gem_map_beats_a_linear_one_on_the_trace(folder):
    counts = traces.load(folder / "t.npz").steps(64, 40, 9)
    ranks = Cluster(costs=profiles.load(folder / "p.json").costs)
    score = {}
    for name in ("linear", "gem"):
        out = folder / f"{name} of all.json"
        done = run("place", "--policy", name, "--profile", folder / "p.json", "--trace",
                   folder / "t.npz", "--ranks", 2, "-o", out)  # fmt: skip
        assert done.exit_code == 0, done.output
        score[name] = score_L(counts, maps.load(out).placement_LP([0, 1, 3]), ranks)
    assert score["gem"].sum() < score["linear"].sum()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (("--policy", "best"), "--policy asks for 'best'. Unknown placement 'best'. Allowed: lin"),
        (("--policy", "gemm"), "Did you mean 'gem'?"),
        (("--ranks", 3), "3 ranks were asked for"),
        (("--redundant", 1), "keeps one copy"),
        (("--routing", "odd"), "allowed are even and one"),
        (("--trace", "missing.npz"), "does not exist"),
    ],
)
def test_place_refuses_with_the_reason(folder, changed, reason):
    asked = {"--profile": folder / "p.json", "--trace": folder / "t.npz", "--ranks": 2}
    asked |= {"-o": folder / "no.json", changed[0]: changed[1]}
    done = run("place", *(part for pair in asked.items() for part in pair))
    assert isinstance(done.exception, BalancerError) and reason in str(done.exception)
    assert not (folder / "no.json").exists()


def test_place_looks_at_the_folder_of_the_map_before_anything_else(folder):
    done = run("place", "--profile", "lost.json", "--trace", "lost.npz", "--ranks", 2,
               "-o", folder / "lost" / "m.json")  # fmt: skip
    assert isinstance(done.exception, BalancerError)
    assert f"the folder {folder / 'lost'} does not exist" in str(done.exception)


def test_place_knows_the_policy_before_it_reads_the_files(folder):
    refused = run("place", "--profile", "lost.json", "--trace", "lost.npz", "--ranks", 2,
                  "--policy", "ex_flow", "-o", folder / "new.json").exception  # fmt: skip
    assert isinstance(refused, BalancerError) and "Did you mean 'exflow'?" in str(refused)


def test_a_missing_profile_says_how_to_make_one(folder):
    refused = run("place", "--profile", "lost.json", "--trace", folder / "t.npz", "--ranks", 2,
                  "-o", folder / "new.json").exception  # fmt: skip
    assert isinstance(refused, BalancerError)
    assert "lost.json cannot be read: No such file" in str(refused)
    assert "made by `vllm-balance profile`" in str(refused)


@pytest.mark.parametrize(
    ("asked", "of_model", "served"),
    [
        ("auto", "bfloat16", "bfloat16"),
        ("auto", "float16", "float16"),
        ("auto", "float32", "bfloat16"),
        ("half", "bfloat16", "float16"),
        ("float", "bfloat16", "float32"),
        ("float32", "float32", "float32"),
    ],
)
def test_experts_are_profiled_in_the_dtype_that_vllm_serves(asked, of_model, served):
    assert served_dtype(asked, of_model) == served


def test_an_unknown_dtype_gets_the_nearest(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    refused = run("profile", tmp_path, "--ranks", 1, "-o", tmp_path / "p", "--dtype", "bf16")
    assert isinstance(refused.exception, BalancerError)
    assert "Unknown dtype 'bf16'. Did you mean 'bfloat16'?" in str(refused.exception)


def test_a_profile_is_of_the_dtype_that_is_asked_for(tmp_path, monkeypatch):
    """A check without one takes the profile's."""
    probed = []

    @contextmanager
    def probing(kernels_S):
        shape, _, cores, _ = kernels_S[0].args
        probed.append((shape.dtype, len(cores)))
        yield Instrument(CURVES[:1])

    for function in (sample, check_profile):
        monkeypatch.setattr(sys.modules[function.__module__], "probing_kernels", probing)
    monkeypatch.setattr(sys.modules[sample.__module__], "own_cores", lambda: [0, 1])
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    file = tmp_path / "p.json"
    done = run("profile", tmp_path, "--ranks", 1, "--cores-per-rank", 2, "-o", file,
               "--dtype", "float")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert profiles.load(file).shape.dtype == "float32"
    assert profiles.load(file).cores_per_rank == 2
    assert run("profile", tmp_path, "--check", file).exit_code == 0
    assert probed == [("float32", 2)] * 2
    refused = run("profile", tmp_path, "--check", file, "--dtype", "bfloat16").exception
    assert isinstance(refused, BalancerError) and "with `--dtype bfloat16`" in str(refused)


def test_a_rank_that_does_not_answer_says_what_to_do():
    silent = SimpleNamespace(poll=lambda timeout: False)
    with pytest.raises(BalancerError, match=r"did not answer .* when the machine is quiet, or"):
        expert_probe._receive(0, silent)


def test_place_refuses_batches_of_prefill_that_are_all_the_same(folder):
    """A half of the trace holds 300 tokens."""
    arguments = ("place", "--profile", folder / "p.json", "--trace", folder / "t.npz", "--ranks", 2,
                 "-o", folder / "m", "--steps", 4, "--phase", "prefill", "--batch")  # fmt: skip
    for batch in (300, 5000):
        refused = run(*arguments, batch).exception
        assert isinstance(refused, BalancerError)
        assert f"of {batch} consecutive" in str(refused) and "holds 300" in str(refused)
    beside = run(*arguments[:-3], "--prefill-batch", 300).exception
    assert isinstance(beside, BalancerError) and "of 300 consecutive" in str(beside)
    assert not (folder / "prefill.json").exists()
    assert run(*arguments, 299).exit_code == 0


def test_batches_of_decode_and_of_prefill_are_placed_by_together(folder):
    trace = traces.load(folder / "t.npz")
    asked = {"batch": 16, "steps": 5, "phase": None, "prefill_batch": None, "seed": 3}
    decode = Batches(**asked).of(trace)
    prefill = Batches(**asked | {"batch": 200, "phase": Phase.PREFILL}).of(trace)
    both = Batches(**asked | {"prefill_batch": 200}).of(trace)
    assert np.array_equal(both, np.concatenate([decode, prefill]))
    done = run("place", "--profile", folder / "p.json", "--trace", folder / "t.npz", "--batch", 16,
               "--prefill-batch", 200, "--steps", 5, "-o", folder / "both.json")  # fmt: skip
    assert done.exit_code == 0, done.output
    maps.load(folder / "both.json").require(shape=SHAPE, num_ranks=2, layers=[0, 1, 3])


def test_a_profile_is_not_begun_if_its_results_have_no_place(tmp_path, monkeypatch):
    def begun(*_):
        raise AssertionError("the profile was begun")

    monkeypatch.setattr(sys.modules[sample.__module__], "probing_kernels", begun)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    lost, there = tmp_path / "lost" / "p.png", tmp_path / "p.png"
    for arguments in (("-o", lost), ("-o", there, "--plot", lost), ("-o", tmp_path)):
        refused = run("profile", tmp_path, "--ranks", 1, *arguments).exception
        assert isinstance(refused, BalancerError) and "was to be written to" in str(refused)
    refused = run("profile", tmp_path, "--ranks", 1, "-o", there, "--plot", "p.foo").exception
    assert isinstance(refused, BalancerError) and "allowed are" in str(refused)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused = run("profile", tmp_path, "--ranks", 1, "-o", there, "--plot", there).exception
    assert isinstance(refused, BalancerError) and "--plot needs matplotlib" in str(refused)


def test_the_command_knows_its_version():
    assert run("--version").output == f"vllm-balance {version('vllm-balance')}\n"


def test_the_command_prints_refusals_without_a_traceback(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["vllm-balance", "trace", "info", "missing.npz"])
    with pytest.raises(SystemExit) as end:
        commands.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("vllm-balance: Trace missing.npz does not exist")


def test_trace_info_prints_a_row_per_layer_and_draws(folder):
    picture = folder / "t.png"
    done = run("trace", "info", folder / "t.npz", "--batch", 50, "--plot", picture)
    assert done.exit_code == 0, done.output
    assert "600 tokens, 12 steps of 50" in done.output
    assert "600 tokens, 1 steps of 600" in run("trace", "info", folder / "t.npz", "--batch",
                                               5000).output  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_profile_is_drawn_with_its_points_and_its_fit(folder, monkeypatch):
    from vllm_balance.commands import pictures
    from vllm_balance.commands.pictures import draw_profile

    stored = profiles.load(folder / "p.json")
    draw_profile(stored, folder / "p.png")
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BalancerError, match="cannot be written"):
        draw_profile(profiles.load(folder / "p.json"), folder / "p.nonsense")
    drawn = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: drawn.append(figure))
    draw_profile(stored, folder / "p.png")
    for rank, axis in zip(stored.ranks, drawn[0].axes, strict=True):
        lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
        even = [p for p in rank.points if len(set(p.tokens_E)) == 1]
        for activated in {len(point.tokens_E) for point in even}:
            own = sorted([p.tokens_E[0], p.time_us] for p in even if len(p.tokens_E) == activated)
            assert lines[f"{activated} experts"] == own
        fitted = [line for line in axis.lines if line.get_linestyle() == "-"]
        assert len(fitted) == len({len(point.tokens_E) for point in even})
        tokens, time_us = fitted[0].get_xydata()[-1].tolist()
        first = min(len(point.tokens_E) for point in even)
        assert time_us == rank.curve.model.of_experts(np.full(first, int(tokens)))


@pytest.mark.timeout(900)
def test_the_kernel_is_measured_on_real_ranks(tmp_path, monkeypatch):
    """One rank of two cores, which may be threads of one, toy experts, three rounds: a file with
    positive times that loads."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    monkeypatch.setattr(sys.modules[sample.__module__], "own_cores", lambda: [first, second])
    monkeypatch.setattr(sys.modules[sample.__module__], "SECONDS", 0.0)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    asked = ("--ranks", 1, "--cores-per-rank", 2)
    done = run("profile", tmp_path, *asked, "-o", tmp_path / "p.json")
    assert done.exit_code == 0, done.output
    measured = profiles.load(tmp_path / "p.json")
    assert len(measured.ranks) == 1 and len(measured.ranks[0].points) > 20
    again = run("profile", tmp_path, "--check", tmp_path / "p.json")
    # Such short samples may well say that the machine has become another.
    assert again.exit_code in (0, 1) and "rank 0: " in again.output, again.output
    assert measured.ranks[0].place == f"cores {first}, {second}" and "Measured in" in done.output
    for point in measured.ranks[0].points:
        assert len(point.rounds_us) == 3 and point.time_us == min(point.rounds_us)
    assert measured.versions.keys() == set(profiles.BOUND_VERSIONS)
    with pytest.raises(BalancerError, match="hidden 128 instead of 64"):
        measured.require(shape=SHAPE)


def test_more_ranks_than_cores_are_refused(tmp_path):
    from vllm_balance.commands.profile import cores_of

    with pytest.raises(BalancerError, match="cores are free"):
        cores_of(10_000)


def test_hardware_threads_of_one_core_count_once(monkeypatch, tmp_path):
    """Threads 0 and 4 share a core, as do 1 and 5; of 6 nothing is known."""
    siblings = {0: "0,4", 4: "0,4", 1: "1,5", 5: "1,5"}
    profile_module = sys.modules[sample.__module__]

    class Files:
        def __init__(self, path):
            self.text = siblings.get(int(path.split("/cpu")[-1].split("/")[0]))

        def exists(self):
            return self.text is not None

        def read_text(self):
            return self.text

    monkeypatch.setattr(profile_module, "Path", Files)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {5, 4, 1, 0, 6})
    assert own_cores() == [0, 1, 6]


def test_ranks_have_neighbouring_cores(monkeypatch):
    from vllm_balance.commands.profile import cores_of

    monkeypatch.setattr(sys.modules[sample.__module__], "own_cores", lambda: [4, 5, 6, 7, 8, 9])
    assert cores_of(2) == [[4], [5]]
    assert cores_of(2, 3) == [[4, 5, 6], [7, 8, 9]]
    with pytest.raises(
        BalancerError, match=r"3 ranks .* with 3 of the cores each, and 6 cores are"
    ):
        cores_of(3, 3)
