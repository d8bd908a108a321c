"""What a recording costs is told from the bursts without one around it."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from bench import recorder, run_files

ORDER = ("off", "counts", "ids", "ids", "counts", "off")


def test_a_drift_of_the_machine_is_no_cost():
    """TPOT rises by 1 ms with every burst, and counts take 5 % more."""
    rows = [
        {"position": at, "arm": arm, "tpot_ms": (100 + at) * (1.05 if arm == "counts" else 1)}
        for at, arm in enumerate(ORDER * 2)
    ]
    found = recorder.against_off(rows)
    for row in rows[1:-1]:
        expected = 1.05 if row["arm"] == "counts" else 1.0
        assert found[row["position"]] == pytest.approx(expected, abs=1e-9)
    # After an end in the middle: another server, twice as slow.
    two = [row | {"server": row["position"] // 6} for row in rows]
    slower = [row | {"tpot_ms": row["tpot_ms"] * (1 + row["server"])} for row in two]
    assert recorder.against_off(slower) == pytest.approx(recorder.against_off(two))
    alone = [row | {"server": 9} for row in rows[:1]]
    assert recorder.against_off(alone) == {}
    assert recorder._spread([0.99, 1.0, 1.01, 1.02]) == ("+0.50%", "-0.8% to +1.8%")


def test_the_server_is_that_of_the_run_file():
    arm = recorder.static_arm(run_files.read(recorder.RUN))
    assert arm.name == "static" and arm.num_ranks == 2


class Killed(BaseException):
    """Stands for a signal: nobody catches it."""


def test_an_ended_run_continues_with_the_next_burst(monkeypatch, tmp_path):
    asked: list[str] = []

    def burst(server, model, prompts, max_tokens, what, file):
        if len(asked) == 5:
            raise Killed
        asked.append(what)
        return {"tpot_ms": 100.0, "seconds": 1.0, "steps": 1, "bytes": 9, "serving_us": 1.0,
                "writing_us": 1.0}  # fmt: skip

    origin = {"versions": {}, "commit": "abc1234", "machine": "A machine"}
    monkeypatch.setattr(recorder.real_size_model, "ensure", lambda **shape: tmp_path)
    monkeypatch.setattr(recorder, "Server", lambda *_: nullcontext(SimpleNamespace(url="")))
    monkeypatch.setattr(recorder.client, "send", lambda *_, **__: None)
    monkeypatch.setattr(recorder, "_burst", burst)
    monkeypatch.setattr(recorder, "provenance", lambda: origin)
    monkeypatch.setattr(recorder, "RESULTS", tmp_path / "recorder.jsonl")
    with pytest.raises(Killed):
        recorder.recorder()
    first = recorder.RESULTS.read_text()
    recorder.RESULTS.write_text(first + '{"position": 5, "ar')
    asked.insert(0, "so that none of the others is the fifth")
    recorder.recorder()
    text = recorder.RESULTS.read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert text.startswith(first) and first.count("\n") == 5
    settings = run_files.read(recorder.RUN)["recordings"]
    assert [row["position"] for row in rows] == list(
        range(len(settings["order"]) * settings["rounds"])
    )
    assert len({row["started"] for row in rows}) == 1
