"""The bursts that tell what a recording costs: of which server, and after an end."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from bench import recorder, run_files


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
