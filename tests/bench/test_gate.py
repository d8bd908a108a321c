"""The gate: what an arm is changed to for it, what it refuses, and when a proof is made anew."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import gate, provenance, real_size_model
from bench.server import Arm
from vllm_balance import maps, profiles

ARM = Arm(
    name="metro 1.5",
    balancer="metro",
    settings={"redundancy": 1.5, "window_size": 64, "step_interval": 320, "replay": {"zipf": 1}},
    tensor_parallel=2,
    flags=("--load-format", "dummy"),
)
TOKENS = [[1, 2], [3, 4]]


def ranks(decisions=4 * gate.MAX_TOKENS, experts=(0, 1), **counted):
    """Two ranks that see the same: four layers, and what is in the slots of each."""
    layers = [{"physical_to_logical": [*experts]}] * 4
    counted = {"memory_bound_batches": 1} | counted
    return [{"decisions": decisions, "num_layers": 4, "layers": layers, **counted}] * 2


def test_the_arm_serves_real_weights_by_its_real_router_while_experts_move():
    asked = gate.gated(ARM, {"knee_tokens": 16})
    assert asked.settings == {"redundancy": 1.5, **gate.MOVING, "knee_tokens": 16}
    assert (asked.balancer, asked.tensor_parallel) == ("metro", 2)
    assert "dummy" not in asked.flags
    assert asked.flags[:2] == ("--dtype", "float32")
    assert ARM.settings["step_interval"] == 320


def test_metro_gets_a_knee_that_no_decode_step_is_above():
    """On a device with a low knee it would step aside in every batch."""
    assert gate.gated(ARM, {}).settings["knee_tokens"] == len(gate.PROMPTS)
    assert "knee_tokens" not in gate.gated(replace(ARM, balancer="eplb"), {}).settings


def test_files_of_one_model_are_replaced_by_such_of_the_demo_model(tmp_path):
    """The name of a proof must not depend on where the files of a run lie."""
    settings = {"map": "/tmp/1/map.json", "profile": "p.json", "online": {"interval": 16}}
    asked = gate.gated(replace(ARM, balancer="gem", settings=settings), {})
    assert asked.settings == {
        "map": "stand-in map",
        "profile": "stand-in profile",
        "online": gate.EAGER_TO_MOVE,
    }
    model = real_size_model.ensure(num_layers=1, num_experts=8, top_k=2)
    served = gate.with_stand_ins(asked, model, tmp_path)
    (layer,) = maps.load(Path(served.settings["map"])).layers
    assert sorted(layer.physical_to_logical) == list(range(8))
    assert layer.physical_to_logical != list(range(8))
    assert profiles.load(Path(served.settings["profile"])).shape.num_experts == 8
    with_copies = {"map": "m.json", "num_redundant_experts": 2}
    served = gate.with_stand_ins(replace(ARM, settings=with_copies), model, tmp_path)
    (layer,) = maps.load(Path(served.settings["map"])).layers
    assert len(layer.physical_to_logical) == 10 and set(layer.physical_to_logical) == {*range(8)}


def test_equal_tokens_pass():
    gate.require_equal("metro", TOKENS, TOKENS, ranks())


def test_other_tokens_are_refused_with_the_first_difference():
    with pytest.raises(RuntimeError, match=r"1 of 2 answers .* \[3, 4\] became \[3, 5\]"):
        gate.require_equal("metro", TOKENS, [[1, 2], [3, 5]], ranks())


def test_equal_tokens_without_decisions_prove_nothing():
    with pytest.raises(RuntimeError, match="equal tokens prove nothing"):
        gate.require_equal("metro", TOKENS, TOKENS, ranks(4 * gate.MAX_TOKENS - 1))


ONLINE = Arm(name="online", balancer="gem", settings={"online": gate.EAGER_TO_MOVE})
FETCHING = [
    ranks(fetches=2, early_fetches=0)[0],
    ranks(fetches=0, early_fetches=1)[0],
]


@pytest.mark.parametrize(
    ("arm", "after", "did"),
    [
        (ARM, ranks(experts=(1, 0)), {"memory_bound_batches": 1, "layers_placed_anew": 4}),
        (replace(ARM, balancer="eplb"), ranks(experts=(1, 0)), {"layers_placed_anew": 4}),
        (replace(ARM, balancer="first_copy"), ranks(experts=(1, 0)), {"layers_placed_anew": 4}),
        (Arm(name="harmoeny", balancer="harmoeny"), FETCHING, {"fetches": 3}),
        (Arm(name="even_split", balancer="even_split"), FETCHING, {"fetches": 3}),
        (ONLINE, ranks(online={"moves": 2}), {"moves": 2}),
        (Arm(name="gem", balancer="gem", settings={"map": "m.json"}), ranks(), {}),
        (Arm(name="static", balancer="static"), ranks(), {}),
    ],
)
def test_what_an_arm_did_is_counted_by_what_its_name_says(arm, after, did):
    assert gate.deeds(arm, ranks(), after) == did
    gate.require_done(arm.name, did)


@pytest.mark.parametrize(
    ("arm", "after", "missing"),
    [
        (ARM, ranks(experts=(1, 0), memory_bound_batches=0), "memory_bound_batches"),
        (ARM, ranks(), "layers_placed_anew"),
        (replace(ARM, balancer="eplb"), ranks(), "layers_placed_anew"),
        (Arm(name="shadow", balancer="shadow"), ranks(fetches=0, early_fetches=0), "fetches"),
        (ONLINE, ranks(online={"moves": 0}), "moves"),
    ],
)
def test_equal_tokens_of_an_arm_that_did_nothing_prove_nothing(arm, after, missing):
    did = gate.deeds(arm, ranks(), after)
    with pytest.raises(RuntimeError, match=rf"{arm.name} .* 0 {missing} in \d+ steps"):
        gate.require_done(arm.name, did)


@pytest.fixture
def servers(monkeypatch, tmp_path):
    """Counts the servers that proofs start; they answer like the dense rank."""
    started = []

    class Server:
        def __init__(self, arm, model):
            self.arm = arm
            self.experts = iter([(0, 1), (1, 0)])

        def __enter__(self):
            started.append(self.arm.name)
            return self

        def __exit__(self, *exception):
            pass

        def status(self, *, per_layer):
            assert per_layer
            return ranks(experts=next(self.experts))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gate.demo_model, "ensure", lambda: Path("demo-model-1"))
    monkeypatch.setattr(gate, "Server", Server)
    monkeypatch.setattr(gate, "_tokens", lambda server, model: TOKENS)
    return started


def test_a_proof_is_made_once_and_kept(servers, tmp_path):
    first = gate.prove(ARM, {}, lambda what: None)
    assert servers == ["dense", "gate-metro 1.5"]
    assert gate.prove(ARM, {}, lambda what: None) == first
    assert len(servers) == 2
    (kept,) = tmp_path.glob("*/gate-*.json")
    proof = json.loads(kept.read_text())
    assert proof["arm"] == "metro"
    assert proof["did"] == {"memory_bound_batches": 1, "layers_placed_anew": 4}
    assert kept.stem.removeprefix("gate-") in first


def test_a_proof_that_does_not_say_what_the_arm_did_is_made_anew(servers, tmp_path):
    first = gate.prove(ARM, {}, lambda what: None)
    (kept,) = tmp_path.glob("*/gate-*.json")
    kept.write_text(json.dumps({"arm": "metro", "settings": {}, "decisions": 132}))
    assert gate.prove(ARM, {}, lambda what: None) == first
    assert servers == ["dense", "gate-metro 1.5", "gate-metro 1.5"]
    assert "did" in json.loads(kept.read_text())


def test_another_arm_other_code_or_another_model_needs_another_proof(servers, monkeypatch):
    first = gate.prove(ARM, {}, lambda what: None)
    assert gate.prove(ARM, {"knee_tokens": 3}, lambda what: None) != first
    monkeypatch.setattr(gate, "sources", lambda: "other code")
    assert gate.prove(ARM, {}, lambda what: None) != first
    assert servers.count("dense") == 1
    monkeypatch.setattr(gate.demo_model, "ensure", lambda: Path("demo-model-2"))
    gate.prove(ARM, {}, lambda what: None)
    assert servers.count("dense") == 2


def test_a_refused_arm_leaves_no_proof(servers, monkeypatch, tmp_path):
    answers = iter([TOKENS, [[0, 0], [0, 0]]])
    monkeypatch.setattr(gate, "_tokens", lambda server, model: next(answers))
    with pytest.raises(RuntimeError, match="changes tokens"):
        gate.prove(ARM, {}, lambda what: None)
    assert not list(tmp_path.glob("*/gate-*"))


SERVED = ("vllm_balance/balancer.py", "kernels/a/b.py", *sorted(provenance.MAKERS))
ALONE = tuple(
    f"vllm_balance/{name}"
    for name in ("commands/report.py", "own_benchmarks/rows.py", "simulate/run.py")
)


@pytest.fixture
def tree(monkeypatch, tmp_path):
    for name in (*SERVED, *ALONE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    (tmp_path / "vllm_balance" / "kernels").symlink_to("../kernels")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", SERVED)
def test_the_code_of_servers_and_of_their_files_counts(tree, name):
    before = provenance.sources()
    (tree / name).write_text("2")
    assert provenance.sources() != before


@pytest.mark.parametrize("name", ALONE)
def test_the_code_of_reports_and_of_predictions_does_not_count(tree, name):
    before = provenance.sources()
    (tree / name).write_text("2")
    assert provenance.sources() == before


def test_commands_that_make_files_of_servers_are_there():
    assert all((provenance.ROOT / name).is_file() for name in provenance.MAKERS)


def test_files_are_found_by_folder_and_by_name_and_linked_ones_once(tree):
    found = provenance.code("vllm_balance", "kernels")
    assert [path for path in found if path.name == "b.py"] == [tree / "kernels/a/b.py"]
    assert provenance.code("vllm_balance/balancer.py") == [tree / "vllm_balance/balancer.py"]
