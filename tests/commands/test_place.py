"""`place` by what was recorded: the policy sees steps of the file, and what it found is told."""

import json

import numpy as np
import pytest
from tiny_model import CONFIG
from typer.testing import CliRunner

from vllm_balance import commands, maps, traces
from vllm_balance.cost import CostModel
from vllm_balance.errors import BalancerError
from vllm_balance.placement import Cluster, score_L
from vllm_balance.placement.eplb import EplbPlacement
from vllm_balance.placement.gem import GemPlacement
from vllm_balance.placement.gem_r import GemReplicaPlacement
from vllm_balance.placement.linear import LinearPlacement
from vllm_balance.traces import Trace

LAYERS, EXPERTS, TOP_K = 2, 8, 2
"""Of CONFIG."""
PHASES = np.tile([1, 1, 1, 2, 0], 40)
"""Of five steps three decode, one is mixed and one prefill."""


def recorded(seed: int = 0) -> Trace:
    """200 steps, each with another number of tokens: 10 to 209."""
    weight_LE = np.random.default_rng(seed).dirichlet(np.full(EXPERTS, 1.0), LAYERS)
    random = np.random.default_rng(seed)
    counts = [random.multinomial(TOP_K * (10 + step), weight_LE) for step in range(200)]
    return Trace(
        name="c",
        num_experts=EXPERTS,
        top_k=TOP_K,
        layer_index_L=np.arange(LAYERS),
        counts_NLE=np.array(counts, np.int32),
        phase_N=PHASES.copy(),
    )


@pytest.fixture
def folder(tmp_path):
    """A model, and a recording of counts."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    traces.save(tmp_path / "c.npz", recorded())
    return tmp_path


@pytest.fixture
def place(folder):
    def run(*arguments, trace="c.npz"):
        asked = ("place", "--model", folder, "--ranks", 2, "--trace", folder / trace)
        runner = CliRunner(env={"COLUMNS": "100"})
        done = runner.invoke(
            commands.app,
            [str(part) for part in (*asked, "--force", "-o", folder / "m.json", *arguments)],
        )
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return " ".join(done.output.split())

    return run


@pytest.fixture
def seen(monkeypatch):
    """What the policy was given."""
    histories = []
    place = GemPlacement.place

    def noted(self, history_NLE, *arguments):
        histories.append(history_NLE)
        return place(self, history_NLE, *arguments)

    monkeypatch.setattr(GemPlacement, "place", noted)
    return histories


def steps_of(history_NLE) -> list[int]:
    """Which steps of the recording the rows are; fails if one is none."""
    counts_NLE = recorded().counts_NLE
    found = [np.flatnonzero((counts_NLE == row_LE).all((1, 2))) for row_LE in history_NLE]
    assert all(len(steps) == 1 for steps in found), "a row is not one of the file"
    return [int(steps[0]) for steps in found]


def test_the_policy_is_given_recorded_steps_of_all_phases_in_their_share(place, seen, folder):
    said = place("--steps", 60)
    steps = steps_of(seen[0])
    assert len(steps) == 60 and steps == sorted(set(steps)) and max(steps) < 100
    share = np.bincount(PHASES[steps], minlength=3) / 60
    assert share == pytest.approx([0.2, 0.6, 0.2], abs=0.12)
    batches = "60 of 100 recorded steps (20 prefill, 60 decode, 20 mixed)"
    assert f"Placed by {batches}." in said
    assert maps.load(folder / "m.json").sources["batches"] == batches
    place("--steps", 60, "--seed", 1)
    assert steps_of(seen[1]) != steps
    place()
    assert steps_of(seen[2]) == list(range(100))


@pytest.mark.parametrize(("name", "phase"), [("prefill", 0), ("decode", 1)])
def test_steps_of_one_phase_are_asked_for(place, seen, name, phase):
    place("--phase", name)
    assert steps_of(seen[0]) == np.flatnonzero(PHASES[:100] == phase).tolist()


def test_batches_are_drawn_only_if_their_size_is_given(place, seen):
    said = place("--batch", 16, "--prefill-batch", 40, "--steps", 7)
    assert (seen[0].sum(2) == np.repeat([32, 80], 7)[:, None]).all()
    assert "by 7 batches of 16 tokens of decode and 7 batches of 40 tokens of prefill." in said


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (("--prefill-batch", 40), "given without --batch, and trace c holds counts"),
        (("--phase", "prefill", "--batch", 9, "--prefill-batch", 40), "given with --phase prefill"),
        (("--phase", "decoding"), "Unknown phase 'decoding'. Did you mean 'decode'"),
        (("--routing", "one"), "--routing was given with --policy gem, and only gem_r has a use"),
        (("--routing", "even", "--policy", "eplb", "--redundant", 2), "only gem_r has a use"),
        (("--time-limit", 9), "--time-limit was given with --policy gem, and only exflow has"),
    ],
)
def test_what_says_nothing_or_two_things_is_refused(place, folder, asked, reason):
    with pytest.raises(BalancerError, match=reason):
        place(*asked)
    assert not (folder / "m.json").exists()


def test_a_phase_that_was_not_recorded_is_refused(place, folder):
    trace = recorded()
    trace.phase_N[:] = 1
    traces.save(folder / "d.npz", trace)
    with pytest.raises(BalancerError, match=r"Phase prefill .* has 100 decode among its steps"):
        place("--phase", "prefill", trace="d.npz")


def test_a_map_is_replaced_only_if_that_is_asked_for(folder, place):
    (folder / "m.json").write_text("served by this")
    asked = ("place", "--model", folder, "--ranks", 2, "--trace", folder / "c.npz")
    done = CliRunner().invoke(commands.app, [*map(str, asked), "-o", str(folder / "m.json")])
    assert isinstance(done.exception, BalancerError)
    assert "there is a file: servers and other files may refer to it" in str(done.exception)
    assert (folder / "m.json").read_text() == "served by this"
    place("--policy", "linear")
    assert maps.load(folder / "m.json").policy == "linear"


def test_the_routing_that_replicas_were_placed_for_is_in_the_map(place, folder):
    place("--policy", "gem_r", "--redundant", 2, "--routing", "one", "--steps", 4)
    assert maps.load(folder / "m.json").sources["routing"] == "one"
    place("--policy", "gem_r", "--redundant", 2, "--steps", 4)
    assert maps.load(folder / "m.json").sources["routing"] == "even"


@pytest.mark.parametrize("policy", [GemPlacement, GemReplicaPlacement])
def test_layers_are_eplbs_where_the_other_half_says_so(place, folder, monkeypatch, policy):
    """A search that found nothing: the map is EPLB's in the layers where that is better."""
    monkeypatch.setattr(policy, "place", LinearPlacement().place)
    redundant = 2 * (policy is GemReplicaPlacement)
    said = place("--policy", policy.name, "--redundant", redundant)
    cluster = Cluster(costs=(CostModel(a_us=0, b_us=160, c_us=0, beta_us=1),) * 2,
                      num_redundant=redundant)  # fmt: skip
    fit, held_out = (half.counts_NLE for half in recorded().split())
    eplb_LP = EplbPlacement().place(fit, cluster)
    linear_LP = LinearPlacement().place(fit, cluster)
    better_L = score_L(held_out, eplb_LP, cluster) < score_L(held_out, linear_LP, cluster)
    found = maps.load(folder / "m.json")
    expected_LP = np.where(better_L[:, None], eplb_LP, linear_LP)
    assert np.array_equal(found.placement_LP(range(LAYERS)), expected_LP)
    assert better_L.any() and found.sources["layers_of_eplb"] == f"{better_L.sum()} of 2"
    assert f"better on the other half, and was taken: {better_L.sum()} of 2." in said


def test_consistent_and_temporal_experts_are_listed_with_their_ranks(place, folder):
    """Of decode alone: expert 6 in every tenth step, heavily; 7 only in steps of other phases."""
    trace = recorded()
    counts = np.full((200, LAYERS, EXPERTS), 5, np.int32)
    counts[:, :, 6:] = 0
    counts[::10, :, 6] = 60
    counts[PHASES != 1, :, 7] = 60
    traces.save(folder / "t.npz", Trace(**{**fields(trace), "counts_NLE": counts}))
    said = place("--experts", trace="t.npz")
    assert "Experts per layer in 60 recorded steps of decode: 6.0 consistent" in said
    assert "1.0 temporal" in said and "--experts" not in said
    for layer, slots_P in enumerate(maps.load(folder / "m.json").placement_LP(range(LAYERS))):
        rank = int(np.flatnonzero(slots_P == 6)[0]) // 4
        assert f"│ {layer} │ 0-5 │ 6: {rank} │" in said
    assert "--experts lists them" in place(trace="t.npz")


def fields(trace: Trace) -> dict:
    return {name: getattr(trace, name) for name in Trace.__dataclass_fields__}


def test_a_path_with_brackets_is_printed_as_it_is(place, folder):
    (folder / "[bold]").mkdir()
    path = folder / "[bold]" / ("long" * 20 + "[x].json")
    assert f"Wrote {path}: 2 of" in place("-o", path, "--steps", 4)
