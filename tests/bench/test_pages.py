"""Generated parts of the docs that `bench.tables --check` does not see, and what is not there."""

import json
import re
from pathlib import Path

import pytest

from bench import metro_gpu, run_files, tables, validation
from bench.provenance import ROOT
from vllm_balance.simulate import validity

UNMEASURED = "**Not measured in a server so far:**"
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_run_files_without_rows_are_named_where_the_docs_say_what_was_not_measured():
    """And no others: a file that has rows by now is taken from the list."""
    parts = (ROOT / "docs" / "benchmarks.md").read_text().split("\n\n")
    (paragraph,) = [text for text in parts if text.startswith(UNMEASURED)]
    named = set(re.findall(r"`([a-z0-9_-]+)\.toml`", paragraph))
    measured = {path.stem for path in RESULTS.glob("*.jsonl")}
    assert named == {path.stem for path in run_files.FOLDER.glob("*.toml")} - measured


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page):
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text())
    for file, anchor in links:
        found = page.parent / file if file else page
        assert found.exists(), f"{page.name}: {file}"
        assert not anchor or anchor in _anchors(found), f"{page.name}: {file}#{anchor}"


def _anchors(page: Path) -> set[str]:
    """What links to a page's headings look like on GitHub."""
    headings = re.findall(r"^#+ (.*)$", page.read_text().lower(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in headings}


def test_the_guide_of_the_simulator_names_the_errors_that_plan_shows():
    shown = validity.load()
    said = (
        f"missed by more than {shown.profiled.one_in_ten.value:.0%} on profiled CPUs and "
        f"{shown.roofline.one_in_ten.value:.0%} on GPUs"
    )
    page = (ROOT / "docs" / "simulator.md").read_text()
    assert said.replace("%", " %") in " ".join(page.split())


def test_every_place_for_a_table_is_written_by_something():
    kinds = {kind for page in PAGES for kind in tables.kinds(page.read_text())}
    assert kinds == {"table", "modelled", *tables.WRITERS}


def test_the_page_of_the_compiled_kernel_is_what_its_rows_say():
    rows = [json.loads(line) for line in metro_gpu.RESULTS.read_text().splitlines()]
    assert metro_gpu.DOCUMENT.read_text() == metro_gpu.render(rows)


def test_the_errors_that_plan_shows_are_those_of_the_rows(tmp_path, monkeypatch):
    published = validation.VALIDITY.read_text()
    path = tmp_path / "validity.toml"
    path.write_text(published)
    monkeypatch.setattr(validation, "VALIDITY", path)
    validation.write_validity(validation.read(validation.RESULTS))
    assert path.read_text() == published
