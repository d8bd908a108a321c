"""Modelled rows: which code and files decided them, and what a table says of that."""

from dataclasses import replace

import pytest

from bench import modelled, provenance

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
        *(f"configs/{name}" for name in CONFIGS),
    ],
)
def test_code_and_files_of_a_cell_decide_its_row(tree, name):
    assert changed(tree, name)


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
