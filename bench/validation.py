"""The simulator against what was measured and what was published: `python -m bench.validation`.

Writes bench/results/validation.jsonl anew (a row holds prediction and reference), the errors that
`vllm-balance plan` shows (configs/validity.toml), and the tables of docs/simulator.md. No constant
is chosen per row: hardware and model files are the ones of the catalogue. Where a paper does not
say something, the same assumption holds for all of its rows (`bench/published.py`).
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import typer
from rich.console import Console

from bench import markdown, measured_points, published, validation_tables
from bench.provenance import ROOT, provenance
from vllm_balance.simulate.sweep import read

RESULTS = ROOT / "bench" / "results" / "validation.jsonl"
PAGE = ROOT / "docs" / "simulator.md"
VALIDITY = ROOT / "configs" / "validity.toml"
SEED = 1
Row = dict[str, Any]


def validate(
    docs_only: bool = typer.Option(False, "--docs", help="Only write the tables anew."),
) -> None:
    """Predict everything that is known, and say how far off it was."""
    if not docs_only:
        origin = provenance()
        own = measured_points.points(ROOT / "bench" / "results", read(RESULTS))
        rows = [*own, *({**row, **origin} for row in published.rows(SEED))]
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = read(RESULTS)
    write_validity(rows)
    names = measured_points.hardware_names()
    PAGE.write_text(
        markdown.filled(PAGE, "validation", lambda name: validation_tables.table(name, rows, names))
    )
    Console().print(f"{len(rows)} points; see {PAGE.relative_to(ROOT)}.")


def write_validity(rows: list[Row]) -> None:
    """The mean absolute error of all ratios between balancers."""
    errors = [abs(row["error"]) for row in rows if row["kind"] in ("pair", "published ratio")]
    text = VALIDITY.read_text().splitlines()
    numbers = {"points": str(len(errors)), "gain_error": f"{statistics.mean(errors):.3f}"}
    for index, line in enumerate(text):
        name = line.partition(" ")[0]
        if name in numbers:
            text[index] = f'{name} = {{ value = {numbers[name]}, unit = "1", source = "rows" }}'
    VALIDITY.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    typer.run(validate)
