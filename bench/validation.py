"""The simulator against what was measured and what was published: `python -m bench.validation`.

Writes bench/results/validation.jsonl anew (a row holds prediction and reference), and the errors
that `vllm-balance plan` shows (configs/validity.toml); `python -m bench.tables` writes the tables.
No constant is chosen per row: hardware and model files are those of the catalogue. Where a paper
does not say something, the same assumption holds for all of its rows (`bench/published.py`).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from bench import command, measured_points, published, validation_tables
from bench.provenance import ROOT, provenance
from vllm_balance.simulate.sweep import read

RESULTS = ROOT / "bench" / "results" / "validation.jsonl"
VALIDITY = ROOT / "configs" / "validity.toml"
SEED = 1
KINDS = {"profiled": "pair", "roofline": "published ratio"}
"""Of the rows behind each part of configs/validity.toml."""
Row = dict[str, Any]


def validate(
    traces: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder of the recorded traces; runs need theirs."
        ),
    ] = None,
) -> None:
    """Predict everything that is known, and say how far off it was."""
    origin = provenance()
    own = measured_points.points(ROOT / "bench" / "results", read(RESULTS), traces)
    rows = [*own, *({**row, **origin} for row in published.rows(SEED))]
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_validity(rows)
    Console().print(f"{len(rows)} points; `python -m bench.tables` writes their tables.")


def writer(rows: list[Row]) -> Callable[[str], str]:
    """What goes to each place of docs/simulator-results.md, by its name."""
    return lambda name: validation_tables.table(name, rows)


def write_validity(rows: list[Row]) -> None:
    """The errors of ratios between balancers, by kind; the file's other lines stay."""
    lines, part = [], ""
    for line in VALIDITY.read_text().splitlines():
        name = line.partition(" ")[0]
        part = line.strip("[]") if line.startswith("[") else part
        if part in KINDS and name in (found := errors(rows, KINDS[part])):
            head, _, source = line.partition(", unit")
            line = f"{head.partition('{')[0]}{{ value = {found[name]:g}, unit{source}"
        lines.append(line)
    VALIDITY.write_text("\n".join(lines) + "\n")


def errors(rows: list[Row], kind: str) -> dict[str, float]:
    """Number of the ratios of a kind, mean absolute error, and what at most a tenth was missed by
    more than. Points that are kept from older code say nothing about this one, and those of experts
    that were not profiled nothing about profiles."""
    found = [
        abs(row["error"])
        for row in rows
        if row["kind"] == kind and not row.get("kept") and row.get("profiled", True)
    ]
    return {
        "points": len(found),
        "mean": round(statistics.mean(found), 3),
        "one_in_ten": round(float(np.quantile(found, 0.9, method="inverted_cdf")), 3),
    }


if __name__ == "__main__":
    command.main(validate)
