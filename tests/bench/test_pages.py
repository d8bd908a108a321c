"""What the docs say was not measured."""

import re

from bench import run_files
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
