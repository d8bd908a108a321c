"""Tables of the docs from the rows of bench/results: `python -m bench.tables`.

Replaces what stands between `<!-- KIND:NAME -->` and `<!-- end -->` in README.md and docs/*.md.
Tables of other kinds than `table` are those of a benchmark of its own, which writes them too.
Ratios compare medians of the same run; every table names machine, commit and command. A run that
was measured on several machines has a table for each, the newest first; NAME-brief is that one with
the columns that a first look needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import typer

from bench import (
    harmoeny_tables,
    markdown,
    metro_tables,
    modelled,
    placement,
    placement_accuracy,
    run_files,
    sweep_speed,
    validation,
)
from bench.provenance import ROOT
from vllm_balance import measured_tables, own_benchmarks, run_tables, slo_table
from vllm_balance.measured_tables import MeasuredTable
from vllm_balance.measurement import newest_by_machine, read_measurements
from vllm_balance.own_benchmarks import OWN_BENCHMARKS, OwnRow, newest_run

Row = dict[str, Any]
WRITERS = {
    "accuracy": (placement_accuracy.writer, "placement_accuracy"),
    "metro": (metro_tables.writer, "metro_routing"),
    "placement": (placement.writer, "placement"),
    "speed": (sweep_speed.writer, "sweep_speed"),
    "schedule": (harmoeny_tables.writer, "harmoeny_schedule"),
    "validation": (validation.writer, "validation"),
}
"""Of kinds that are tables of one file of rows: what writes them, and the file."""
BRIEF = ("arm", "TPOT ms", "TPOT against static", "TPOT against eplb", "tokens/s", "memory GiB")
"""Headings of a table for a first look."""


def tables(
    check: bool = typer.Option(False, help="Change nothing; fail if a table is old."),
) -> None:
    """Write the tables of README.md and docs/ anew."""
    old = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for kind in kinds(page.read_text()):
            fresh = markdown.filled(page, kind, _writer(kind))
            if fresh == page.read_text():
                continue
            old.append(f"{page.name} ({kind})")
            if not check:
                page.write_text(fresh)
    if check and old:
        raise SystemExit(f"Tables are old in {', '.join(old)}: run python -m bench.tables.")


def kinds(text: str) -> list[str]:
    """The kinds of places for tables that a page has, each once."""
    return list(dict.fromkeys(re.findall(r"^<!-- (\w+):\S+ -->$", text, re.MULTILINE)))


def _writer(kind: str) -> Callable[[str], str]:
    """What goes to each place of a kind, by its name, from the rows that are there.

    Raises:
        ValueError: nothing writes places of this kind.
    """
    if kind == "table":
        return table
    if kind == "modelled":
        return modelled.table
    if kind not in WRITERS:
        raise ValueError(f"Nothing writes places <!-- {kind}:NAME -->.")
    writer, name = WRITERS[kind]
    return writer(_rows(name))


def _rows(name: str) -> list[Row]:
    """All rows of a file of bench/results, oldest first."""
    lines = (ROOT / "bench" / "results" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def table(run: str) -> str:
    """The Markdown table of one run."""
    if run == "exchange":
        return exchange_table(run)
    return own_table(run) if run in OWN_BENCHMARKS else measured_table(run)


def own_table(run: str) -> str:
    """A benchmark that is no table of servers by arm, by its newest run."""
    own = OWN_BENCHMARKS[run]
    path = ROOT / "bench" / "results" / f"{run}.jsonl"
    found = own.table(newest_run(own_benchmarks.read(path, run)))
    if not found.title:
        settings = run_files.read(ROOT / "configs" / "runs" / f"{run}.toml")
        found = replace(found, title=settings["title"])
    return markdown.written(found)


class Exchange(OwnRow):
    """One way of exchanging counts."""

    ranks: int
    experts: int
    tokens_per_rank: int
    way: str
    collectives_per_layer: float
    bytes_per_layer: float
    exchange_us: float
    decide_us: float


def exchange_table(run: str) -> str:
    """What each way of exchanging counts costs."""
    rows = newest_run(map(Exchange.model_validate, _rows(run)))
    headings = [
        "processes",
        "experts",
        "way",
        "extra collectives",
        "bytes",
        "exchange us",
        "all us",
    ]
    body = [
        [
            str(row.ranks),
            str(row.experts),
            f"`{row.way}`",
            f"{row.collectives_per_layer:g}",
            f"{row.bytes_per_layer:,.0f}",
            f"{row.exchange_us:.0f}",
            f"{row.decide_us:.0f}",
        ]
        for row in rows
    ]
    intro = f"Per layer, {rows[0].tokens_per_rank} tokens per rank, top-8; medians of rank 0."
    text = markdown.table(headings, body)
    origin = f"Measured on {rows[-1].machine}; commit {rows[-1].commit}"
    return "\n".join((intro, "", text, "", f"{origin}; `python -m bench.exchange`."))


def measured_table(name: str) -> str:
    """The newest rows of a run file on each machine.

    `RUN` by arm, `RUN-slo` throughput within the SLO, `RUN-brief` by arm, of the newest alone.
    """
    run = name.removesuffix("-brief")
    kind = slo_table.table if run.endswith("-slo") else run_tables.main_table
    path = ROOT / "bench" / "results" / f"{run.removesuffix('-slo')}.jsonl"
    every = [kind(rows) for rows in newest_by_machine(read_measurements(path)).values()]
    return "\n\n".join(map(markdown.written, every if run == name else [_brief(every[0])]))


def _brief(found: MeasuredTable) -> MeasuredTable:
    """The columns that a first look needs, of those that are there."""
    columns = [found.headings.index(heading) for heading in BRIEF if heading in found.headings]
    return replace(
        found,
        caption=found.caption.replace(measured_tables.CORES_NOTE, ""),
        headings=[found.headings[column] for column in columns],
        body=[[line[column] for column in columns] for line in found.body],
    )


if __name__ == "__main__":
    typer.run(tables)
