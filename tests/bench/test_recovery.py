"""Recovery from a change: rows of a run that was ended or made again."""

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from measured import recovery_bursts

from bench import recovery, run_files, turn
from bench.starts import plan
from vllm_balance import own_benchmarks


class Killed(BaseException):
    """Stands for a signal: nobody catches it."""


@pytest.fixture
def living(monkeypatch, tmp_path):
    """`recovery` with servers that answer at once; `living(n)` is killed in the n-th round's
    fifth burst. Returns all rows; `living.lived` are the positions that were started, by round."""
    lived: list[list[int]] = []

    def call(killed_in=None):
        def live_through(together, *_):
            lived.append([start.position for start in together])
            for start in together:
                bursts = recovery_bursts(start.arm, start.position, [1000.0] * 4)
                for burst, row in enumerate(bursts):
                    if len(lived) == killed_in and start is together[1]:
                        raise Killed
                    yield row | {"burst": burst, "group": start.group}

        lived.clear()
        monkeypatch.setattr(recovery, "_live_through", live_through)
        if killed_in is None:
            recovery.recovery(Path("traces"))
        else:
            with pytest.raises(Killed):
                recovery.recovery(Path("traces"))
        return [json.loads(line) for line in recovery.RESULTS.read_text().splitlines()]

    origin = {"versions": {}, "commit": "abc1234", "machine": "A machine"}
    monkeypatch.setattr(recovery.real_size_model, "ensure", lambda **shape: tmp_path)
    monkeypatch.setattr(recovery, "prepared", lambda *_: SimpleNamespace(shown_slowdown={}))
    monkeypatch.setattr(recovery, "_expert_bytes", lambda model: 2**20)
    monkeypatch.setattr(recovery, "traffic", lambda settings, *_: settings["replay"]["trace"])
    monkeypatch.setattr(recovery, "provenance", lambda: origin)
    monkeypatch.setattr(recovery, "RESULTS", tmp_path / "recovery.jsonl")
    call.lived = lived
    return call


def test_the_rows_of_a_run_have_a_start_in_common_that_no_other_run_has(living):
    living()
    rows = living()
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert [row["position"] for row in first] == [row["position"] for row in second]
    starts = [{row["started"] for row in of} for of in (first, second)]
    assert [len(of) for of in starts] == [1, 1] and starts[0] != starts[1]


def test_an_ended_run_continues_with_the_next_round(living):
    assert {row["position"] for row in living(killed_in=2)} == {0, 1, 2}
    rows = living()
    assert living.lived == [[3, 4, 5], [6, 7, 8]]
    assert sorted((row["position"], row["burst"]) for row in rows) == [
        (position, burst) for position in range(9) for burst in range(4)
    ]
    assert len({row["started"] for row in rows}) == 1


def test_an_ended_run_of_other_code_is_left_alone(living, monkeypatch):
    living(killed_in=2)
    monkeypatch.setattr(recovery, "sources", lambda: "other code")
    rows = living()
    assert living.lived == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert len({row["started"] for row in rows}) == 2
    newest = own_benchmarks.newest_run(own_benchmarks.read(recovery.RESULTS, "recovery"))
    assert len(rows) == 48 and len(newest) == 36
    assert {row.started for row in newest} == {rows[-1]["started"]}


class Told:
    """A server that notes what it is told, and answers at once."""

    url = "http://127.0.0.1:0"

    def __init__(self, name, said):
        self._say = lambda what: said.append((name, what))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._say("end")

    def worker(self, rank):
        return rank

    def status(self):
        return [{"online": {"swaps": 3}}]

    def reset(self):
        pass

    def replay(self, settings):
        self._say(Path(settings["trace"]).name)

    def suspend(self):
        self._say("suspend")

    def resume(self):
        self._say("resume")


def test_servers_take_turns_burst_by_burst(monkeypatch):
    """One of them runs at a time, forth and back, and is slowed in its own turns."""
    said = []
    settings = run_files.read(recovery.RUN) | {
        "phases": {"one": {"bursts": 1}, "two": {"trace": "other.npz", "slow": 1.28, "bursts": 2}}
    }
    start_a, start_b, _ = plan(settings, rounds=1)

    @contextmanager
    def slowed(pid, factor):
        said.append(("slow", factor))
        yield

    monkeypatch.setattr(recovery, "arm_of", lambda start, _: start.arm)
    monkeypatch.setattr(recovery.gate, "prove", lambda *_: "proof")
    monkeypatch.setattr(recovery, "Server", lambda arm, _: Told(arm, said))
    monkeypatch.setattr(turn, "slowed", slowed)
    monkeypatch.setattr(recovery, "send", lambda *_: said.append("burst"))
    client = {key: {"p50": 1.0} for key in ("e2e_ms", "ttft_ms", "tpot_ms")}
    client["tokens_per_s"] = 1.0
    monkeypatch.setattr(recovery, "timed", lambda *_: client)
    monkeypatch.setattr(recovery.counters, "require_trustworthy", lambda *_, **__: None)
    monkeypatch.setattr(recovery.counters, "counted", lambda _: {"tokens_worst_rank": 1})
    rows = [*recovery._live_through([start_a, start_b], Path("model"), None, Path("traces"))]

    warm = ["burst", "burst", "suspend"]
    usual_turn = ["resume", "burst", "suspend"]
    slow_turn = ["resume", 1.28, "burst", "suspend"]
    change = ["resume", "suspend"]
    slow_change = ["resume", 1.28, "other.npz", "suspend"]
    two = [slow_change, slow_change, slow_turn, slow_turn, slow_turn, slow_turn]
    expected = [warm, warm, change, change, usual_turn, usual_turn, *two, ["end", "end"]]
    told = [what if what == "burst" else what[1] for what in said]
    assert told == [what for step in expected for what in step]
    turns = [(row["phase"], row["burst"], row["arm"]) for row in rows]
    assert turns == [
        *(("one", 0, "static"), ("one", 0, "gem")),
        *(("two", 0, "static"), ("two", 0, "gem"), ("two", 1, "gem"), ("two", 1, "static")),
    ]
    assert {(row["group"], row["swaps"]) for row in rows} == {(0, 0)}
    own = [row["at_s"] for row in rows if row["arm"] == "gem" and row["phase"] == "two"]
    assert own[0] == 0 < own[1]
