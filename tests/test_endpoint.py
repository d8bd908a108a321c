"""The HTTP endpoint: the ranks' answers in order, and a 404 that says why there are none."""

import asyncio
from inspect import signature
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import AsyncMPClient

from vllm_balance import endpoint
from vllm_balance.endpoint import MoEBalancerEndpoint


class Engine:
    """A client of two engines with two ranks each; they answer out of order. Remembers calls."""

    def __init__(self, additional_config) -> None:
        self.vllm_config = SimpleNamespace(additional_config=additional_config)
        self.engine_core = self
        self.asked = []
        self.refuses = False
        self.counters = {}
        self.replay_error = None

    async def call_utility_all_async(self, utility, method, timeout, args, kwargs):
        assert (utility, timeout, args) == ("collective_rpc", None, ())
        self.asked.append((method, kwargs))
        if method.startswith("moe_record"):
            state = {"error": "File exists."} if self.refuses else {"state": method}
            return [[{"state": method}, None], [state, None]]
        if method == "moe_balancer_replay":
            return [[None, None], [None, self.replay_error]]
        return [[{"rank": rank} | self.counters for rank in ranks] for ranks in ((2, 3), (1, 0))]


def client(engine) -> TestClient:
    app, plugin = FastAPI(), MoEBalancerEndpoint()
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(engine, app.state, args=None))
    return TestClient(app)


def test_vllm_has_the_call_that_asks_every_engine():
    expected = ["self", "method", "args"]
    assert list(signature(AsyncMPClient.call_utility_all_async).parameters) == expected
    rpc = ["self", "method", "timeout", "args", "kwargs"]
    assert list(signature(EngineCore.collective_rpc).parameters) == rpc


def test_status_and_reset_ask_every_rank():
    engine = Engine({"moe_balancer": {"name": "metro"}})
    http = client(engine)
    ranks = [{"rank": rank} for rank in range(4)]
    assert http.get("/moe_balancer").json() == {"ranks": ranks}
    assert http.get("/moe_balancer", params={"per_layer": "true"}).status_code == 200
    assert http.post("/moe_balancer/reset").json() == {"status": "reset"}
    assert engine.asked == [
        ("moe_balancer_status", {"per_layer": False}),
        ("moe_balancer_status", {"per_layer": True}),
        ("moe_balancer_reset", {}),
    ]


def test_prometheus_scrapes_the_counters_of_every_rank():
    engine = Engine({"moe_balancer": {"name": "metro"}})
    engine.counters = {"balancer": "metro", "decisions": 6, "decide_us": 1500.0}
    answer = client(engine).get("/moe_balancer/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = answer.text.splitlines()
    for rank in range(4):
        labels = f'{{balancer="metro",rank="{rank}"}}'
        assert f"vllm_moe_balancer_decisions_total{labels} 6.0" in lines
        assert f"vllm_moe_balancer_decide_seconds_total{labels} 0.0015" in lines
    assert engine.asked == [("moe_balancer_status", {"per_layer": False})]


def test_a_benchmark_may_replay_another_skew():
    engine = Engine({"moe_balancer": {"name": "static", "replay": {"zipf": 0.0}}})
    answer = client(engine).post("/moe_balancer/replay", json={"zipf": 0.8})
    assert answer.json() == {"status": "replaying"}
    assert engine.asked == [("moe_balancer_replay", {"settings": {"zipf": 0.8}})]
    assert client(engine).post("/moe_balancer/replay", content=b"{").status_code == 422
    assert len(engine.asked) == 1


def test_a_replay_that_cannot_be_is_a_conflict_with_the_reason():
    engine = Engine({"moe_balancer": {"name": "static"}})
    engine.replay_error = {"error": "the model's own"}
    answer = client(engine).post("/moe_balancer/replay", json={"zipf": 0.8})
    assert answer.status_code == 409
    said = answer.json()["detail"]
    assert said.startswith("the model's own 3 of 4 ranks replay it all the same")


def test_experts_move_to_a_map():
    engine = Engine({"moe_balancer": {"name": "gem"}})
    answer = client(engine).post("/moe_balancer/map", json={"file": "/srv/map.json"})
    assert answer.json() == {"ranks": [{"rank": rank} for rank in range(4)]}
    assert engine.asked == [("moe_balancer_map", {"file": "/srv/map.json"})]
    for body in ({}, {"file": ""}, {"file": "map.json", "layer": 1}):
        assert client(engine).post("/moe_balancer/map", json=body).status_code == 422
    assert len(engine.asked) == 1


def test_a_map_that_cannot_be_moved_to_is_a_conflict_with_the_reason():
    engine = Engine({"moe_balancer": {"name": "gem"}})
    engine.counters = {"error": "another model"}
    answer = client(engine).post("/moe_balancer/map", json={"file": "map.json"})
    assert (answer.status_code, answer.json()) == (409, {"detail": "another model"})


def test_the_recordings_of_several_api_servers_can_be_one():
    """Each reaches the ranks of its own engines, so the caller says what they have in common."""
    engine = Engine({"moe_balancer": {"name": "metro"}})
    http = client(engine)
    for _ in range(2):
        http.post("/moe_balancer/record/start", json={"file": "t.npz", "run": "both nodes"})
    asked = [kwargs for _, kwargs in engine.asked]
    assert [each["settings"]["run"] for each in asked] == ["both nodes"] * 2
    assert asked[0]["asked_by"] != asked[1]["asked_by"]


def test_the_endpoint_is_there_for_models_of_every_task():
    assert MoEBalancerEndpoint.required_tasks is None


@pytest.mark.parametrize("engine", [None, Engine(None), Engine({}), Engine({"other": 1})])
def test_a_server_without_a_balancer_says_so(engine):
    http = client(engine)
    paths = ("/moe_balancer", "/moe_balancer/metrics")
    for answer in (*map(http.get, paths), http.post("/moe_balancer/reset")):
        assert answer.status_code == 404
        assert "without --moe-balancer" in answer.json()["detail"]
        assert "Start it with `--moe-balancer NAME`" in answer.json()["detail"]
    assert engine is None or engine.asked == []


def test_a_recording_is_started_and_stopped_on_every_rank():
    engine = Engine({"moe_balancer": {"name": "metro"}})
    http = client(engine)
    started = http.post("/moe_balancer/record/start", json={"file": "t.npz", "what": "ids"})
    assert started.json() == {"ranks": [{"state": "moe_record_start"}] * 2}
    stopped = http.post("/moe_balancer/record/stop")
    assert stopped.json() == {"ranks": [{"state": "moe_record_stop"}] * 2}
    settings = {"file": "t.npz", "what": "ids", "max_bytes": 256 * 2**20}
    (start, asked), stop = engine.asked
    assert len(asked["settings"].pop("run")) == 32
    assert (start, asked["settings"]) == ("moe_record_start", settings)
    assert stop == ("moe_record_stop", {})


def test_a_rank_that_refuses_to_record_takes_back_what_this_request_started():
    engine = Engine({"moe_balancer": {"name": "metro"}})
    engine.refuses = True
    answer = client(engine).post("/moe_balancer/record/start", json={"file": "t.npz"})
    assert (answer.status_code, answer.json()["detail"]) == (409, "File exists.")
    (start, asked), cancel = engine.asked
    assert start == "moe_record_start" and len(asked["asked_by"]) == 32
    assert cancel == ("moe_record_cancel", {"asked_by": asked["asked_by"]})


@pytest.mark.parametrize("body", [{}, {"file": "t.npz", "what": "x"}, {"file": "t", "max": 1}])
def test_wrong_recording_settings_reach_no_rank(body):
    engine = Engine({"moe_balancer": {"name": "metro"}})
    assert client(engine).post("/moe_balancer/record/start", json=body).status_code == 422
    assert engine.asked == []


def test_ranks_that_do_not_answer_are_said_to_be_stalled(monkeypatch):
    """And their call is not cancelled, which vLLM's client would trip over."""
    engine, ended = Engine({"moe_balancer": {"name": "metro"}}), []
    answer = engine.call_utility_all_async

    async def late(*asked):
        await asyncio.sleep(0.3)
        ended.append(asked[1])
        return await answer(*asked)

    monkeypatch.setattr(engine, "call_utility_all_async", late)
    monkeypatch.setattr(endpoint, "TIMEOUT_S", 0.05)
    with client(engine) as http:
        refused = http.get("/moe_balancer/metrics")
        assert refused.status_code == 503
        assert "did not answer moe_balancer_status within 0.05 s" in refused.json()["detail"]
        assert http.post("/moe_balancer/record/stop").status_code == 200
    assert ended == ["moe_balancer_status", "moe_record_stop"]
