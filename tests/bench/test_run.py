"""Run files: the order of starts, and continuing where a run was ended."""

import os
import tomllib
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from measured import row

from bench import run, run_files, turn
from bench.load import Load
from bench.placed import SLOW_RANK, Slowed
from bench.starts import arm_of, plan
from vllm_balance.config import parse
from vllm_balance.errors import BalancerError
from vllm_balance.measurement import KernelTime, newest, read_measurements

SETTINGS = {file.stem: run_files.read(file) for file in run_files.FOLDER.glob("*.toml")}
FILES = sorted(
    name for name, settings in SETTINGS.items() if not {"recordings", "phases"} & settings.keys()
)
"""The others have benchmarks of their own."""
FILE = """
title = "A test"
seed = 3
[model]
num_layers = 1
[serve]
tensor_parallel = 2
flags = []
[warm]
requests = 1
prompt_tokens = 1
max_tokens = 1
[load]
requests = 8
prompt_tokens = 4
max_tokens = 4
repeats = 2
[loads.one]
concurrency = 1
[loads.many]
[replay]
zipf = 0.8
[cases.even.replay]
zipf = 0
[cases.skewed]
[arms.static]
[arms.metro]
redundancy = 1.5
[eplb]
window_size = 9
"""


def test_arms_of_all_cases_go_forth_and_back():
    starts = plan(tomllib.loads(FILE), rounds=1)
    forth = [("static", "even"), ("metro", "even"), ("static", "skewed"), ("metro", "skewed")]
    assert [(start.arm, start.case) for start in starts] == forth + forth[::-1]
    assert [start.position for start in starts] == list(range(8))
    assert len(plan(tomllib.loads(FILE), rounds=3)) == 24


def test_a_load_changes_the_shared_one_and_a_case_replaces_tables():
    start = plan(tomllib.loads(FILE), rounds=1)[0]
    assert start.loads["one"].at_once == 1
    assert start.loads["many"] == Load(requests=8, prompt_tokens=4, max_tokens=4, repeats=2)
    arm = arm_of(plan(tomllib.loads(FILE), rounds=1)[1])
    assert arm.settings["replay"] == {"zipf": 0, "seed": 3}
    assert arm.settings["window_size"] == 9
    assert arm_of(start).settings.keys() == {"replay"}


class Killed(BaseException):
    """Stands for a signal: nobody catches it."""


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    """`run_file` with servers that answer at once, which can be killed before the n-th row."""
    starts: list[str] = []
    running: set[str] = set()
    watched: list[float] = []
    seeds: list[int] = []
    rows_left = [1000]

    class Server:
        def __init__(self, arm, model):
            self.arm, self.url = arm, ""
            starts.append(arm.name)

        def __enter__(self):
            running.add(self.arm.name)
            return self

        def __exit__(self, *exception):
            running.discard(self.arm.name)

        def suspend(self):
            running.discard(self.arm.name)

        def resume(self):
            running.add(self.arm.name)

        def move_to(self, map):
            assert running == {self.arm.name}
            go.moved_to.append(map.name)

    def measure_once(load, server, model, seed):
        rows_left[0] -= 1
        if rows_left[0] < 0:
            raise Killed
        assert running == {server.arm.name}
        seeds.append(seed)
        made = row(server.arm.name)
        go.placed.append(go.moved_to[-1] if go.moved_to else "")
        known = {"run", "title", "arm", "case", "load", "repeat", "position", "seed", "gate"}
        known |= {
            "slow",
            "slow_shown",
            "in_turns",
            "one_server",
            "load_seed",
            "config_hash",
            "traffic",
            "sources",
            "harness",
            "versions",
            "commit",
            "machine",
            "machine_speed",
            "format",
        }
        return {name: getattr(made, name) for name in type(made).model_fields if name not in known}

    @contextmanager
    def watching(ranks, dtype):
        assert (ranks, dtype) == (2, "bfloat16")

        def watch():
            assert not running
            watched.append(100.0 * (len(watched) + 1))
            return [KernelTime(activated=16, tokens_each=1, time_us=[watched[-1]] * 2)]

        yield SimpleNamespace(before=watch, after=watch)

    monkeypatch.setattr(run.speed, "watching", watching)
    monkeypatch.setattr(run.real_size_model, "ensure", lambda **shape: tmp_path)
    monkeypatch.setattr(turn.gate, "prove", lambda arm, gate, say: f"proof of {arm.name}")
    monkeypatch.setattr(turn, "Server", Server)
    monkeypatch.setattr(turn, "send", lambda *asked: None)
    monkeypatch.setattr(turn, "_measure_once", measure_once)
    file = tmp_path / "test.toml"
    file.write_text(FILE)
    results = tmp_path / "results" / "test.jsonl"

    def go(rows=1000):
        starts.clear()
        watched.clear()
        seeds.clear()
        rows_left[0] = rows
        go.moved_to, go.placed = [], []
        run.run_file(file, 1, results)
        return read_measurements(results)

    go.starts, go.seeds, go.results, go.file = starts, seeds, results, file
    return go


def keys(rows):
    return [(row.position, row.case, row.arm, row.load, row.repeat) for row in rows]


def test_every_repeat_of_every_load_is_a_row(measuring):
    rows = measuring()
    assert len(rows) == 8 * 2 * 2
    assert max(Counter(keys(rows)).values()) == 1
    assert {(row.arm, row.gate) for row in rows} == {
        ("static", "proof of static"),
        ("metro", "proof of metro"),
    }
    assert {row.run for row in rows} == {"test"}


def test_a_row_names_the_seed_that_its_prompts_were_drawn_with(measuring):
    """Each repeat has prompts of its own; the run file's seed draws the routing of all of them."""
    rows = measuring()
    assert [row.load_seed for row in rows] == measuring.seeds
    assert {(row.repeat, row.seed, row.load_seed) for row in rows} == {(0, 3, 3), (1, 3, 4)}


def test_the_machine_is_timed_before_and_after_each_load_while_no_server_runs(measuring):
    times = [row.machine_speed[0].time_us for row in measuring()]
    assert times == [[200.0 * load + 150.0] * 2 for load in range(32)]


def test_a_killed_run_continues_behind_its_last_row(measuring):
    whole = keys(measuring())
    measuring.results.unlink()
    with pytest.raises(Killed):
        measuring(rows=6)
    with measuring.results.open("a") as file:
        file.write('{"format": "vllm-balance meas')
    assert keys(measuring()) == whole
    # Four rows per start: the second was half done, the first is not started again.
    assert measuring.starts == ["metro", "static", "metro", "metro", "static", "metro", "static"]


IN_TURNS = FILE.replace("seed = 3", "seed = 3\nin_turns = true").replace(
    "repeats = 2", "repeats = 3"
)


def test_loads_go_forth_and_back_over_servers_that_are_up_together(measuring):
    measuring.file.write_text(IN_TURNS)
    rows = measuring()
    assert measuring.starts == ["static", "metro", "static", "metro"]
    assert all(row.in_turns for row in rows)
    first = [(row.arm, row.repeat) for row in rows if (row.case, row.load) == ("even", "one")]
    there, back = [("static", 0), ("metro", 0)], [("metro", 1), ("static", 1)]
    assert first == [*there, *back, ("static", 2), ("metro", 2)]
    assert [row.case for row in rows] == ["even"] * 12 + ["skewed"] * 12


def test_placements_of_one_server_take_turns_as_servers_do(measuring, monkeypatch, tmp_path):
    files = SimpleNamespace(
        map=lambda place, slow, redundant: tmp_path / place,
        profile=tmp_path / "profile.json",
        replayed=tmp_path / "replayed.npz",
        shown_slowdown={Slowed(SLOW_RANK, 1.0): 1.0},
    )
    monkeypatch.setattr(run, "prepared", lambda *asked: files)
    settings, arms = ONE_SERVER.split("[arms", 1)
    head, tail = FILE.split("[arms.static]")
    text = f"{settings}{head}[arms{arms}{tail.partition('redundancy = 1.5')[2]}"
    measuring.file.write_text(text.replace("repeats = 2", "repeats = 3"))
    rows = measuring()
    assert measuring.starts == ["linear", "linear"], "one of each case"
    first = [(row.arm, row.repeat) for row in rows if (row.case, row.load) == ("even", "one")]
    there, back = [("linear", 0), ("gem", 0)], [("gem", 1), ("linear", 1)]
    assert first == [*there, *back, ("linear", 2), ("gem", 2)]
    assert measuring.placed == [row.arm for row in rows]
    assert all(row.one_server and row.in_turns for row in rows)


def test_a_round_in_turn_is_of_fresh_servers_that_are_up_together():
    starts = plan(tomllib.loads(IN_TURNS), rounds=2)
    forth = [("static", "even"), ("metro", "even"), ("static", "skewed"), ("metro", "skewed")]
    assert [(start.arm, start.case) for start in starts] == forth + forth[::-1]
    assert [start.group for start in starts] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [start.position for start in starts] == list(range(8))


ONE_SERVER = """
in_turns = true
one_server = true
[arms.linear]
balancer = "gem"
place = "linear"
online = { interval = 16 }
[arms.gem]
balancer = "gem"
place = "gem"
online = { interval = 16 }
"""


@pytest.mark.parametrize("name", FILES)
def test_run_files_hold_nothing_that_nobody_reads(name):
    assert run_files.checked(run_files.FOLDER / f"{name}.toml") == SETTINGS[name]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[replays]\nzipf = 1", "Unknown key 'replays'. Did you mean 'replay'"),
        ("[recordings]", "`python -m bench.recorder` measures it"),
        ("title =", "cannot be read: Invalid value"),
        (ONE_SERVER.replace("in_turns", "seed = 1 #"), "needs `in_turns = true`, and arms that"),
        (ONE_SERVER.replace('gem"', 'metro"', 1), "differ in `place` only"),
        (ONE_SERVER.replace("online", "gate"), "have `place` and `online`"),
        (ONE_SERVER + "[arms.static]", "have `place` and `online`"),
    ],
)
def test_what_no_run_file_is_is_refused(tmp_path, text, reason):
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(BalancerError, match=reason):
        run.run_file(tmp_path / "own.toml", 1, tmp_path / "own.jsonl")


@pytest.mark.parametrize(
    ("unit", "left_out"), [("no BF16 units", True), ("AVX-512 BF16", False), ("AMX", False)]
)
def test_files_for_other_cpus_are_left_out_where_asked(monkeypatch, capsys, unit, left_out):
    ran = []
    monkeypatch.setattr(run, "run_file", lambda file, *_: ran.append(file.stem))
    monkeypatch.setattr(run, "machine", lambda: f"A CPU, {unit}, 2 cores, 24 GiB")
    names = ["skew-bfloat16", "decode", "batch-bfloat16", "decode-float32"]
    files = [run_files.FOLDER / f"{name}.toml" for name in names]
    run.run(files, fitting=True)
    assert ran == (["decode-float32"] if left_out else names)
    said = [line for line in capsys.readouterr().err.splitlines() if "Left out" in line]
    others = "skew-bfloat16.toml, decode.toml, batch-bfloat16.toml"
    line = f"Left out, as they are for CPUs with BF16 units: {others}."
    assert said == [line] * left_out
    ran.clear()
    run.run(files)
    assert ran == names


def test_files_that_replay_a_recording_are_left_out_without_one(monkeypatch, capsys, tmp_path):
    ran = []
    monkeypatch.setattr(run, "run_file", lambda file, *_: ran.append(file.stem))
    names = ["trace", "turns-slow-bfloat16", "decode-float32", "harmoeny-dp"]
    files = [run_files.FOLDER / f"{name}.toml" for name in names]
    monkeypatch.setattr(run, "machine", lambda: "A CPU, AVX-512 BF16, 2 cores, 24 GiB")
    run.run(files, fitting=True)
    assert ran == ["trace", "decode-float32"]
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "Left out" in line]
    assert said.endswith("whose folder --traces names: turns-slow-bfloat16.toml, harmoeny-dp.toml.")
    ran.clear()
    run.run(files, fitting=True, traces=tmp_path)
    assert ran == names


def test_a_killed_run_in_turns_continues_behind_its_last_row(measuring):
    measuring.file.write_text(IN_TURNS)
    whole = keys(measuring())
    measuring.results.unlink()
    with pytest.raises(Killed):
        measuring(rows=16)
    assert keys(measuring()) == whole
    assert measuring.starts == ["static", "metro"]


def test_a_load_that_not_all_servers_had_is_sent_to_all_of_them_again(measuring):
    """Loads in turn are compared with their neighbours, and an old row has none."""
    measuring.file.write_text(IN_TURNS)
    whole = keys(measuring())
    measuring.results.unlink()
    with pytest.raises(Killed):
        measuring(rows=15)
    (alone,) = read_measurements(measuring.results)[14:]
    assert (alone.case, alone.arm, alone.repeat) == ("skewed", "metro", 1)
    rows = measuring()
    assert keys(rows[15:17]) == whole[14:16]
    assert keys(newest(rows)) == whole and alone not in newest(rows)
    assert len(rows) == len(whole) + 1


def test_arms_that_were_swapped_half_way_are_all_measured(measuring):
    """The settings are the same ones, and so is their hash, but a position has another arm."""
    with pytest.raises(Killed):
        measuring(rows=4)
    without = FILE.replace("[arms.static]\n", "")
    measuring.file.write_text(without.replace("[eplb]", "[arms.static]\n[eplb]"))
    rows = measuring()
    assert len({row.config_hash for row in rows}) == 1
    starts = Counter((row.case, row.arm, row.load, row.repeat) for row in rows)
    assert len(starts) == 4 * 4 and min(starts.values()) == 2


def test_a_finished_run_starts_nothing_and_writes_nothing(measuring):
    before = measuring()
    os.utime(measuring.results, ns=(0, 0))
    assert measuring() == before
    assert measuring.starts == []
    assert measuring.results.stat().st_mtime_ns == 0


@pytest.mark.parametrize(
    "changed", ["settings", "traffic", "sources", "harness", "machine", "packages"]
)
def test_what_is_other_than_in_the_rows_is_measured_anew(measuring, monkeypatch, changed):
    before = measuring()
    if changed == "settings":
        measuring.file.write_text(FILE.replace("zipf = 0.8", "zipf = 1.2"))
    elif changed in ("traffic", "sources", "harness"):
        monkeypatch.setattr(run, changed, lambda *_: f"other {changed}")
    else:
        origin = run.provenance()
        other = {"machine": "another"} if changed == "machine" else {"versions": {"torch": "0"}}
        monkeypatch.setattr(run, "provenance", lambda: origin | other)
    assert len(measuring()) == 2 * len(before)


@pytest.mark.parametrize("name", sorted({*FILES} - {"prefill"}))
def test_copies_without_a_choice_stand_beside_eplb_and_metro(name):
    """Redundancies of the three are the same, in the same order."""
    slots: dict[str, list[float]] = {}
    for arm, own in SETTINGS[name]["arms"].items():
        if "redundancy" in own:
            slots.setdefault(own.get("balancer", arm), []).append(own["redundancy"])
    if {"eplb", "metro"} <= slots.keys():
        assert slots["first_copy"] == slots["eplb"] == slots["metro"]


@pytest.mark.parametrize("name", FILES)
def test_published_run_files_can_be_run(name):
    settings = SETTINGS[name]
    assert settings["title"]
    for start in plan(settings, rounds=1):
        arm = arm_of(start)
        assert parse({"name": arm.balancer} | arm.settings)
        assert arm.num_ranks == 2
        if "dtype" in settings["model"]:
            assert arm.flags[arm.flags.index("--dtype") + 1] == settings["model"]["dtype"]
        at_once = int(arm.flags[arm.flags.index("--max-num-seqs") + 1]) * arm.data_parallel
        length = int(arm.flags[arm.flags.index("--max-model-len") + 1])
        warm = [Load(**settings["warm"])] if "warm" in settings else []
        for load in [*start.loads.values(), *warm]:
            assert load.at_once <= at_once
            longest = (load.prompt_tokens + load.max_tokens) * (1 + load.length_spread)
            assert longest < length
            assert load.warming or warm
