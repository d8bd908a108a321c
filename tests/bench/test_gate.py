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


def ranks(decisions=4 * gate.MAX_TOKENS):
    return [{"decisions": decisions, "num_layers": 4}] * 2


def test_the_arm_serves_real_weights_by_its_real_router_while_experts_move():
    asked = gate.gated(ARM, {"knee_tokens": 16})
    assert asked.settings == {"redundancy": 1.5, **gate.MOVING, "knee_tokens": 16}
    assert (asked.balancer, asked.tensor_parallel) == ("metro", 2)
    assert "dummy" not in asked.flags
    assert asked.flags[:2] == ("--dtype", "float32")
    assert ARM.settings["step_interval"] == 320


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


def test_equal_tokens_pass():
    gate.require_equal("metro", TOKENS, TOKENS, ranks())


def test_other_tokens_are_refused_with_the_first_difference():
    with pytest.raises(RuntimeError, match=r"1 of 2 answers .* \[3, 4\] became \[3, 5\]"):
        gate.require_equal("metro", TOKENS, [[1, 2], [3, 5]], ranks())


def test_equal_tokens_without_decisions_prove_nothing():
    with pytest.raises(RuntimeError, match="equal tokens prove nothing"):
        gate.require_equal("metro", TOKENS, TOKENS, ranks(4 * gate.MAX_TOKENS - 1))


@pytest.fixture
def servers(monkeypatch, tmp_path):
    """Counts the servers that proofs start; they answer like the dense rank."""
    started = []

    class Server:
        def __init__(self, arm, model):
            self.arm = arm

        def __enter__(self):
            started.append(self.arm.name)
            return self

        def __exit__(self, *exception):
            pass

        def status(self):
            return ranks()

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
    assert json.loads(kept.read_text())["arm"] == "metro"
    assert kept.stem.removeprefix("gate-") in first


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


def test_the_code_of_servers_counts_and_the_code_of_reports_does_not(monkeypatch, tmp_path):
    for name in ("vllm_balance/balancer.py", "vllm_balance/commands/report.py", "kernels/a/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    before = provenance.sources()
    (tmp_path / "vllm_balance/commands/report.py").write_text("2")
    assert provenance.sources() == before
    (tmp_path / "kernels/a/b.py").write_text("2")
    assert provenance.sources() != before
