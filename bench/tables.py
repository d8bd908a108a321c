"""Tables of the docs from the rows of bench/results: `python -m bench.tables`.

Replaces what stands between `<!-- table:NAME -->` and `<!-- end -->` in README.md and docs/*.md.
Every table names machine, commit and command.
"""

from __future__ import annotations

import json
import re
from typing import Any

import typer

from bench.provenance import ROOT
from vllm_balance import measured_tables
from vllm_balance.measurement import newest, read_measurements

Row = dict[str, Any]
MARKED = re.compile(r"(<!-- table:([a-z0-9_-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables(
    check: bool = typer.Option(False, help="Change nothing; fail if a table is old."),
) -> None:
    """Write the tables of README.md and docs/ anew."""
    old = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text()
        fresh = MARKED.sub(lambda found: found[1] + table(found[2]) + found[3], text)
        if fresh == text:
            continue
        old.append(page.name)
        if not check:
            page.write_text(fresh)
    if check and old:
        raise SystemExit(f"Tables are old in {', '.join(old)}: run python -m bench.tables.")


def table(name: str) -> str:
    """The Markdown table of this name."""
    return exchange_table() if name == "exchange" else measured_table(name)


def exchange_table() -> str:
    """What each way of exchanging counts costs."""
    lines = (ROOT / "bench" / "results" / "exchange.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
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
            str(row["ranks"]),
            str(row["experts"]),
            f"`{row['way']}`",
            f"{row['collectives_per_layer']:g}",
            f"{row['bytes_per_layer']:,.0f}",
            f"{row['exchange_us']:.0f}",
            f"{row['decide_us']:.0f}",
        ]
        for row in rows
    ]
    intro = f"Per layer, {rows[0]['tokens_per_rank']} tokens per rank, top-8; medians of rank 0."
    return "\n".join(
        (intro, "", *_markdown(headings, body), "", _origin(rows[-1], "bench.exchange"))
    )


def measured_table(name: str) -> str:
    """The newest rows of a run file: `RUN` by arm, `RUN-slo` throughput within the SLO."""
    run = name.removesuffix("-slo")
    rows = newest(read_measurements(ROOT / "bench" / "results" / f"{run}.jsonl"))
    kind = measured_tables.arms_table if run == name else measured_tables.slo_table
    found = kind(rows)
    intro = f"{found.title}. {found.caption}"
    lines = _markdown(found.headings, found.body)
    return "\n".join((intro, "", *lines, "", f"{found.origin}; `{found.command}`.\n"))


def _markdown(headings: list[str], body: list[list[str]]) -> list[str]:
    return [_line(headings), _line(["---", *["---:"] * (len(headings) - 1)]), *map(_line, body)]


def _origin(row: Row, command: str) -> str:
    return f"Measured on {row['machine']}; commit {row['commit']}; `python -m {command}`.\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    typer.run(tables)
