"""Generated parts of the docs that `bench.tables --check` does not see, and what is not there."""

import json
import re

from bench import metro_gpu, run_files, tables, validation
from bench.provenance import ROOT

UNMEASURED = "**Not measured in a server so far:**"
RESULTS = ROOT / "bench" / "results"


def test_run_files_without_rows_are_named_where_the_docs_say_what_was_not_measured():
    """And no others: a file that has rows by now is taken from the list."""
    parts = (ROOT / "docs" / "benchmarks.md").read_text().split("\n\n")
    (paragraph,) = [text for text in parts if text.startswith(UNMEASURED)]
    named = set(re.findall(r"`([a-z0-9_-]+)\.toml`", paragraph))
    measured = {path.stem for path in RESULTS.glob("*.jsonl")}
    assert named == {path.stem for path in run_files.FOLDER.glob("*.toml")} - measured


def test_every_place_for_a_table_is_written_by_something():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    kinds = {kind for page in pages for kind in tables.kinds(page.read_text())}
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
