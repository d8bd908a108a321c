"""Tables in the docs: written from rows between their marks, and nothing else is touched."""

import json

import pytest
from measured import recovery_bursts, row, rows

from bench import tables

PAGE = "# Title\n\n<!-- table:decode -->\nold\n<!-- end -->\n\nText.\n"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A tree with rows of two runs and a README with one table."""
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    slo = [row("metro", slo_tpot_ms=100.0, goodput_per_s=1.0)]
    for name, own in (("decode", rows()), ("batch", slo)):
        text = "".join(one.model_dump_json() + "\n" for one in own)
        (tmp_path / "bench" / "results" / f"{name}.jsonl").write_text(text)
    (tmp_path / "README.md").write_text(PAGE)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    return tmp_path


def test_what_is_between_the_marks_is_replaced(root):
    tables.tables(check=False)
    lines = (root / "README.md").read_text().splitlines()
    assert lines[:3] == ["# Title", "", "<!-- table:decode -->"]
    assert lines[3] == "Decode <of> a test. Medians of 2 measurements per line."
    compared = "| arm | TPOT against static | TPOT against eplb | TPOT ms, lowest to highest |"
    assert lines[5].startswith(compared)
    assert lines[8].startswith("| eplb | +29.9% | +0.0% | 130 to 131 | 130.5 |")
    assert lines[-4:-1] == [
        "Measured on A machine; commit abc1234; `python -m bench.run configs/runs/decode.toml`.",
        "<!-- end -->",
        "",
    ]
    assert lines[-1] == "Text."


def test_old_tables_are_found_and_fresh_ones_pass(root):
    with pytest.raises(SystemExit, match=r"old in README\.md \(table\)"):
        tables.tables(check=True)
    tables.tables(check=False)
    tables.tables(check=True)


def test_tables_of_every_kind_are_checked_and_written(root, monkeypatch):
    """Two kinds on one page: each is written by its own, from its own rows."""
    shown = {"placement": (lambda rows: lambda name: f"{name}: {len(rows)} rows", "decode")}
    monkeypatch.setattr(tables, "WRITERS", shown)
    tables.tables(check=False)
    page = root / "docs" / "placement.md"
    page.write_text(f"{PAGE}<!-- placement:speeds -->\nold\n<!-- end -->\n")
    with pytest.raises(SystemExit, match=r"placement\.md \(table\), placement\.md \(placement\):"):
        tables.tables(check=True)
    tables.tables(check=False)
    assert page.read_text().endswith("<!-- placement:speeds -->\nspeeds: 6 rows\n<!-- end -->\n")
    assert "Decode <of> a test." in page.read_text()
    tables.tables(check=True)


def test_a_place_that_nothing_writes_is_an_error(root):
    (root / "docs" / "page.md").write_text("<!-- tabel:decode -->\nold\n<!-- end -->\n")
    with pytest.raises(ValueError, match="Nothing writes places <!-- tabel:NAME -->"):
        tables.tables(check=True)


def test_a_run_with_an_slo_has_a_second_table(root):
    assert "tokens/s within the SLO" in tables.table("batch-slo")
    assert "tokens/s within the SLO" not in tables.table("batch")


def test_a_table_of_a_run_that_was_not_measured_is_an_error(root):
    with pytest.raises(ValueError, match=r"prefill\.jsonl cannot be read"):
        tables.table("prefill")


def test_an_own_table_is_of_the_newest_run_alone_and_named_by_its_run_file(root):
    (root / "configs" / "runs").mkdir(parents=True)
    (root / "configs" / "runs" / "recovery.toml").write_text('title = "Requests"')
    rows = [
        row | {"started": day}
        for day, ms in (("Monday", 1000.0), ("Tuesday", 2000.0))
        for number, arm in enumerate(("static", "gem"))
        for row in recovery_bursts(arm, number, [ms] * 3)
    ]
    text = "".join(json.dumps(one) + "\n" for one in rows)
    (root / "bench" / "results" / "recovery.jsonl").write_text(text)
    intro, _, _, rule, *body, _, origin = tables.table("recovery").splitlines()
    assert intro.startswith("Requests. End-to-end latency of a request")
    assert rule.startswith("| --- | --- | ---: |")
    assert [line.split(" | ")[3] for line in body] == ["2000"] * 2
    assert origin == (
        "Measured on A machine; commit abc1234; `python -m bench.recovery --traces DIR`."
    )


def test_a_run_on_several_machines_has_a_table_for_each(root):
    path = root / "bench" / "results" / "decode.jsonl"
    with path.open("a") as file:
        file.write(row("static", machine="Another machine").model_dump_json() + "\n")
    both, brief = tables.table("decode"), tables.table("decode-brief")
    assert [line for line in both.splitlines() if line.startswith("Measured on")] == [
        f"Measured on {name}; commit abc1234; `python -m bench.run configs/runs/decode.toml`."
        for name in ("Another machine", "A machine")
    ]
    assert "A machine;" not in brief and "metro" not in brief
    (head,) = [line for line in brief.splitlines() if line.startswith("| arm")]
    named = [cell.strip() for cell in head.strip("|").split("|")]
    assert set(named) <= set(tables.BRIEF) and {"arm", "TPOT ms", "tokens/s"} <= set(named)
    (line,) = [line for line in brief.splitlines() if line.startswith("| static")]
    (whole,) = [line for line in both.splitlines()[:8] if line.startswith("| static")]
    assert [cell in whole.split("|") for cell in line.split("|")] == [True] * len(line.split("|"))
