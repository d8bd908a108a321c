"""Tables of the docs from the rows of bench/results: `python -m bench.tables`.

Replaces what stands between `<!-- table:NAME -->` and `<!-- end -->` in README.md and docs/*.md.
Ratios compare medians of the same run; every table names machine, commit and command.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tomllib
from collections.abc import Iterable
from typing import Any

import typer

from bench import markdown, recorder
from bench.provenance import ROOT

Row = dict[str, Any]
COLUMNS = (
    ("TPOT ms", "tpot_ms", ".1f"),
    ("TTFT ms", "ttft_ms", ".0f"),
    ("tokens/s", "tokens_per_s", ".1f"),
    ("experts on the worst rank", "activated_worst_rank", ".1f"),
    ("tokens on the worst rank", "tokens_worst_rank", ".0f"),
    ("deciding, share of MoE", "decide_share", ".2%"),
    ("wrapping, share of MoE", "wrapping_share", ".2%"),
)


def tables(
    check: bool = typer.Option(False, help="Change nothing; fail if a table is old."),
) -> None:
    """Write the tables of README.md and docs/ anew."""
    old = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text()
        if "<!-- table:" not in text:
            continue
        fresh = markdown.filled(page, "table", table)
        if fresh == text:
            continue
        old.append(page.name)
        if not check:
            page.write_text(fresh)
    if check and old:
        raise SystemExit(f"Tables are old in {', '.join(old)}: run python -m bench.tables.")


def table(run: str) -> str:
    """The Markdown table of one run."""
    kinds = {"exchange": exchange_table, "recorder": recorder_table, "slow_rank": slow_table}
    return kinds[run](run) if run in kinds else arms_table(run)


def recorder_table(run: str) -> str:
    """What a recording costs, by the newest run."""
    lines = (ROOT / "bench" / "results" / f"{run}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if (row["commit"], row["config_hash"])
            == (rows[-1]["commit"], rows[-1]["config_hash"])]  # fmt: skip
    title = tomllib.loads((ROOT / "configs" / "runs" / f"{run}.toml").read_text())["title"]
    origin = _origin(rows[-1], "bench.recorder")
    return "\n".join((f"{title}. Medians over bursts.", "", recorder.table(rows), "", origin))


def exchange_table(run: str) -> str:
    """What each way of exchanging counts costs."""
    lines = (ROOT / "bench" / "results" / f"{run}.jsonl").read_text().splitlines()
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
    text = markdown.table(headings, body)
    return "\n".join((intro, "", text, "", _origin(rows[-1], "bench.exchange")))


def arms_table(run: str) -> str:
    """The newest configuration of a run file, one line per arm."""
    settings = tomllib.loads((ROOT / "configs" / "runs" / f"{run}.toml").read_text())
    rows = _newest(run)
    arms = {name: [row for row in rows if row["arm"] == name] for name in settings["arms"]}
    headings = ["arm", *(title for title, _, _ in COLUMNS), "against static", "against eplb"]
    body = [[name, *_cells(own), *_ratios(own, arms)] for name, own in arms.items()]
    intro = f"{settings['title']}. Medians of {len(rows) // len(arms)} runs per arm."
    command = f"bench.run configs/runs/{run}.toml"
    text = markdown.table(headings, body)
    return "\n".join((intro, "", text, "", _origin(rows[-1], command)))


def slow_table(run: str) -> str:
    """End-to-end latency of every load and slowdown, and each arm against static and eplb."""
    rows = _newest(run)
    settings = tomllib.loads((ROOT / "configs" / "runs" / f"{run}.toml").read_text())
    pairs = [(arm, base) for base in ("static", "eplb") for arm in ("gem", "online")]
    headings = ["load", "asked", "shown", *(f"{arm} ms" for arm in settings["arms"])]
    headings += [f"{arm} against {base}" for arm, base in pairs]
    body = []
    for load, factor in itertools.product(settings["loads"], settings["slow"]):
        here = [row for row in rows if (row["load"], row["slow"]) == (load, factor)]
        e2e_ms = {
            arm: _median((row for row in here if row["arm"] == arm), "e2e_ms")
            for arm in settings["arms"]
        }
        shown = f"{here[0]['slow_shown'] - 1:+.1%}"
        times = [f"{time_ms:.0f}" for time_ms in e2e_ms.values()]
        gains = [f"{e2e_ms[arm] / e2e_ms[base] - 1:+.1%}" for arm, base in pairs]
        body.append([load, f"{factor - 1:+.0%}", shown, *times, *gains])
    intro = f"{settings['title']}. End-to-end latency of a request, medians."
    command = f"bench.run configs/runs/{run}.toml --traces DIR"
    text = markdown.table(headings, body)
    return "\n".join((intro, "", text, "", _origin(rows[-1], command)))


def _newest(run: str) -> list[Row]:
    """The rows of the newest configuration of a run file."""
    lines = (ROOT / "bench" / "results" / f"{run}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["config_hash"] == rows[-1]["config_hash"]]


def _origin(row: Row, command: str) -> str:
    return f"Measured on {row['machine']}; commit {row['commit']}; `python -m {command}`."


def _median(rows: Iterable[Row], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def _cells(rows: list[Row]) -> list[str]:
    return [format(_median(rows, key), spec) for _, key, spec in COLUMNS]


def _ratios(rows: list[Row], arms: dict[str, list[Row]]) -> list[str]:
    """Time per step against the two baselines, by TPOT or, for prefill, by TTFT."""
    key = "tpot_ms" if rows[0]["steps"] > 8 else "ttft_ms"
    ours = _median(rows, key)
    return [f"{ours / _median(arms[base], key) - 1:+.1%}" for base in ("static", "eplb")]


if __name__ == "__main__":
    typer.run(tables)
