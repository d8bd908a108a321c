"""Modelled tables of docs/simulator.md: `python -m bench.modelled tables | slo | phase`.

Nothing here is measured. Cells run in parallel with Ray; a run that was ended resumes behind its
rows, but for those that other code or other files of model and hardware decided.
`python -m bench.modelled docs` writes the tables anew.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import markdown
from bench.provenance import ROOT, code, commit, digest_of
from vllm_balance.measured_tables import rate_at
from vllm_balance.simulate.sweep import Cell, compute, missing, sweep

RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "simulator.md"
ZIPFS = (0.3, 0.8)
"""The busiest of 128 experts gets 3 or 12 times the mean: as in public recordings, or worse."""
REDUNDANCIES = (1.125, 1.25, 1.375, 1.5)
QWEN = Cell(model="qwen3-235b-a22b-fp8", hardware="b200", data=8, balancer="static",
            redundancy=1.0, zipf=0.3, concurrency=1024, layers=4, steps=32)  # fmt: skip
DEEPSEEK = replace(QWEN, model="deepseek-v3", data=16)
H20 = replace(DEEPSEEK, hardware="h20", concurrency=32, output_tokens=1024)
CASES = {"qwen": QWEN, "deepseek": DEEPSEEK, "h20": H20}
SLOS_MS = (20, 30, 40, 60)
BALANCERS = ("eplb", "first_copy", "metro")
CODE = ("vllm_balance/simulate", "vllm_balance/routing", "vllm_balance/placement", "kernels")
CODE += tuple(f"vllm_balance/{name}.py" for name in ("cost", "fetch_cost", "types"))
CODE += tuple(f"vllm_balance/{name}.py" for name in ("replay", "replay_rows"))
"""What decides a cell's row, beside its values and its files."""
COMMANDS = {"modelled": "tables", "slo": "slo", "phase": "phase"}
"""The command that makes each file of rows."""
app = typer.Typer(no_args_is_help=True)
Row = dict[str, Any]


def arms(cell: Cell, redundancies: tuple[float, ...] = REDUNDANCIES) -> Iterator[Cell]:
    """A cell without redundancy, and under every balancer and redundancy."""
    yield replace(cell, balancer="static", redundancy=1.0)
    for balancer, redundancy in product(BALANCERS, redundancies):
        yield replace(cell, balancer=balancer, redundancy=redundancy)


def phase_cells(fine: bool) -> Iterator[Cell]:
    """DeepSeek-V3 on H100s over batch, skew, redundancy and ranks."""
    batches = [2**power for power in range(4, 13, 1 if fine else 2)]
    zipfs = [round(0.1 * step, 1) for step in range(0, 13, 1 if fine else 4)]
    ratios = (1.0625, 1.125, 1.1875, 1.25, 1.375, 1.5) if fine else (1.125, 1.5)
    base = replace(DEEPSEEK, hardware="h100", prompt_tokens=1, layers=2, steps=4)
    for batch, zipf, ranks in product(batches, zipfs, (8, 16, 32, 64)):
        cell = replace(base, concurrency=batch, zipf=zipf, data=ranks)
        for seed in range(4 if fine else 1):
            yield from arms(replace(cell, seed=seed), ratios)


@app.command()
def tables() -> None:
    """METRO against EPLB on machines with B200 and H20."""
    cells = [
        arm
        for case, zipf in product(CASES.values(), ZIPFS)
        for arm in arms(replace(case, zipf=zipf))
    ]
    _run("modelled", cells)


@app.command()
def slo() -> None:
    """The same over the number of requests in flight, for the throughput at a fixed TPOT."""
    cells = [
        arm
        for case in (QWEN, DEEPSEEK)
        for batch in (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
        for arm in arms(replace(case, concurrency=batch, layers=2, steps=12), (1.125, 1.5))
    ]
    _run("slo", cells)


@app.command()
def phase(
    fine: Annotated[bool, typer.Option(help="Over 30,000 cells instead of hundreds.")] = False,
    results: Annotated[Path | None, typer.Option(help="File of rows; needed with --fine.")] = None,
    first: Annotated[int | None, typer.Option(help="Only so many cells.")] = None,
) -> None:
    """Which balancer wins, over batch, skew, redundancy and ranks."""
    _run("phase", list(phase_cells(fine))[:first], results)


@app.command()
def speed() -> None:
    """Seconds of one core to simulate 1,000 steps of 61 layers on 8 ranks."""
    for name in ("static", *BALANCERS):
        cell = replace(DEEPSEEK, data=8, layers=61, steps=1000, balancer=name, redundancy=1.5)
        compute(replace(cell, steps=1))
        start = time.process_time()
        compute(cell)
        Console().print(f"{name}: {time.process_time() - start:.1f} s")


@app.command()
def docs() -> None:
    """Write the tables of docs/simulator.md anew."""
    PAGE.write_text(markdown.filled(PAGE, "modelled", _table))


def _run(name: str, cells: list[Cell], results: Path | None = None) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    path = results or RESULTS / f"{name}.jsonl"
    left = missing(cells, path, decided_by)
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=len(cells), completed=len(cells) - len(left))
        sweep(
            left,
            path,
            {"commit": commit()},
            decided_by=decided_by,
            on_rows=lambda n: bar.advance(task, n),
        )


def decided_by(cell: Cell) -> str:
    """Digest of the code and of the files of model and hardware that decide a cell's row."""
    return _decided_by(cell.model, cell.hardware)


@cache
def _decided_by(model: str, hardware: str) -> str:
    configs = ROOT / "configs"
    files = (configs / "hardware").glob(f"{hardware}.*")  # With the profile, if there is one.
    return digest_of([*code(*CODE), *files, configs / "models" / f"{model}.toml"])


def _table(name: str) -> str:
    if name == "slo":
        return _slo_table()
    if name == "phase":
        return _phase_table()
    rows = _newest("modelled")
    case = CASES[name]
    own = [row for row in rows if (row["model"], row["hardware"]) == (case.model, case.hardware)]
    order = ("static", *BALANCERS)
    own.sort(key=lambda row: (row["zipf"], order.index(row["balancer"]), row["redundancy"]))
    head = ["zipf", "balancer", "redundancy", "TPOT ms", "against none", "against EPLB",
            "tokens/s", "experts on the worst rank", "waiting", "GB per rank"]  # fmt: skip
    body = []
    for row in own:
        base = next(r for r in own if r["zipf"] == row["zipf"] and r["balancer"] == "static")
        even = [r for r in own if (r["zipf"], r["redundancy"]) == (row["zipf"], row["redundancy"])
                and r["balancer"] == "eplb"]  # fmt: skip
        body.append([
            f"{row['zipf']:g}", row["balancer"], f"{row['redundancy']:g}",
            f"{row['tpot_us'] / 1e3:.1f}", f"{row['tpot_us'] / base['tpot_us'] - 1:+.1%}",
            f"{row['tpot_us'] / even[0]['tpot_us'] - 1:+.1%}" if even else "-",
            f"{row['tokens_per_s']:,.0f}", f"{row['activated_worst_rank']:,.0f}",
            f"{row['waiting_share']:.0%}", f"{row['redundant_bytes'] / 1e9:.1f}",
        ])  # fmt: skip
    return _with_origin("modelled", markdown.table(head, body, left=2), own)


def _newest(name: str) -> list[Row]:
    """The last row of each cell."""
    rows = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
    return list({row["key"]: row for row in rows}.values())


def _with_origin(name: str, table: str, rows: list[Row]) -> str:
    """A table, and beneath it where its rows are from and how many of them are of older code."""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    text = f"Modelled; commit {commits}; `python -m bench.modelled {COMMANDS[name]}`."
    old = sum(row.get("decided_by") != _decided_by(row["model"], row["hardware"]) for row in rows)
    if old:
        text += f" Of older code: {old:,} of {len(rows):,} rows; the command computes them anew."
    return f"{table}\n\n{text}"


def _slo_table() -> str:
    """Tokens per second of each arm at a TPOT of exactly the SLO."""
    rows = _newest("slo")
    head = ["model", "balancer", "redundancy", *(f"{slo} ms" for slo in SLOS_MS)]
    groups: dict[tuple[str, str, float], list[Row]] = {}
    rows.sort(key=lambda row: (row["model"], ("static", *BALANCERS).index(row["balancer"])))
    for row in rows:
        groups.setdefault((row["model"], row["balancer"], row["redundancy"]), []).append(row)
    body = []
    for (model, balancer, redundancy), own in groups.items():
        cells = []
        for limit in SLOS_MS:
            rate = rate_at(limit, ((r["tpot_us"] / 1e3, r["tokens_per_s"]) for r in own))
            cells.append("-" if rate is None else f"{rate:,.0f}")
        body.append([model, balancer, f"{redundancy:g}", *cells])
    return _with_origin("slo", markdown.table(head, body, left=2), rows)


def _phase_table() -> str:
    """The best arm of each cell, and its throughput against no redundancy."""
    rows = _newest("phase")
    keys = ("data", "zipf")
    batches = sorted({row["concurrency"] for row in rows})
    head = ["ranks", "zipf", *(f"batch {batch}" for batch in batches)]
    body = []
    for group in sorted({tuple(row[key] for key in keys) for row in rows}):
        cells = []
        for batch in batches:
            own = [r for r in rows if tuple(r[key] for key in keys) == group
                   and r["concurrency"] == batch]  # fmt: skip
            base = statistics.mean(r["tpot_us"] for r in own if r["balancer"] == "static")
            best = min(own, key=lambda row: row["tpot_us"])
            gain = best["tpot_us"] / base - 1
            name = f"{best['balancer']} {best['redundancy']:g}"
            cells.append("none" if gain > -0.005 else f"{name}: {gain:+.0%}")
        body.append([str(group[0]), f"{group[1]:g}", *cells])
    return _with_origin("phase", markdown.table(head, body, left=2), rows)


if __name__ == "__main__":
    app()
