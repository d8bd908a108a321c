"""Tables of docs/metro-results.md between their markers, and docs/metro-lambda.svg."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bench import markdown
from bench.provenance import ROOT

PLOT = ROOT / "docs/metro-lambda.svg"
SHOWN = {"even": "even (vLLM's hash)", "first_copy": "first copy", "greedy": "greedy, id order",
         "metro": "metro"}  # fmt: skip


def _ratio(rows: list[dict], policy: str) -> str:
    """Mean and worst lambda / optimal over rows, as one cell."""
    mean = np.mean([row[policy]["lambda"] / row["optimal_lambda"] for row in rows])
    return f"{mean:.3f} ({max(row[policy]['worst_ratio'] for row in rows):.2f})"


def ratio_table(rows: list[dict], heads: list[str], *keys: str) -> str:
    """lambda / optimal per group: mean (worst batch)."""
    body = [
        [*map(str, key), *(_ratio(group, policy) for policy in SHOWN)]
        for key, group in markdown.grouped(rows, *keys).items()
    ]
    return markdown.table([*heads, *SHOWN.values()], body, left=len(keys))


def optimal_table(rows: list[dict]) -> str:
    """How many batches are exactly optimal, CPU kernel and GPU algorithm."""
    batches, body = sum(row["draws"] for row in rows), []
    for policy, name in (("metro", "CPU kernel"), ("metro_gpu", "GPU algorithm (numpy twin)"),
                         ("greedy", "the paper's greedy")):  # fmt: skip
        found = sum(row[policy]["optimal_batches"] for row in rows)
        worst = max(row[policy]["worst_excess"] for row in rows)
        body.append([name, str(found), str(batches), str(worst)])
    return markdown.table(["", "optimal batches", "of", "worst excess, experts"], body)


def tokens_table(rows: list[dict]) -> str:
    """Busiest rank's tokens relative to even routing, mean over all points of a batch size."""
    names = [*SHOWN, "metro_gpu"]
    body = []
    for (batch,), group in markdown.grouped(rows, "batch_tokens").items():
        cells = [
            f"{np.mean([r[n]['busiest_tokens'] / r['even']['busiest_tokens'] for r in group]):.3f}"
            for n in names
        ]
        body.append([str(batch), *cells])
    return markdown.table(["batch", *SHOWN.values(), "GPU algorithm"], body)


def _shape(row: dict) -> list[str]:
    return [*(str(row[key]) for key in "EPS"), f"{row['batch_tokens']} x {row['top_k']}"]


def _table(heads: list[str], body: list[list[str]]) -> str:
    return markdown.table(["E", "P", "S", "tokens x k", *heads], body, left=4)


def call_table(rows: list[dict]) -> str:
    """Whole calls of the routings as a layer makes them: median (range over sweeps)."""
    heads = [
        "target us",
        "metro us (range)",
        "even (vLLM's hash) us (range)",
        "first copy us (range)",
    ]
    return _table(heads, [
        [*_shape(row), "-" if row["target_us"] is None else f"{row['target_us']:.0f}",
         *(_with_range(row, key) for key in ("metro_us", "vllm_hash_us", "first_copy_us"))]
        for row in rows
    ])  # fmt: skip


def _with_range(row: dict, key: str, digits: int = 1) -> str:
    low, high = row["range_us"][key]
    return f"{row[key]:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


GRID_TIMES = {
    "metro": "metro, whole call",
    "even": "even (vLLM's hash), whole call",
    "first_copy": "first copy, whole call",
    "metro_choice": "metro, choice",
    "greedy_choice": "the paper's greedy, choice",
    "scipy_optimum": "SciPy's optimum",
}


def grid_time_table(rows: list[dict]) -> str:
    """Microseconds by batch size: median over sources, ranks and redundancies."""
    body = []
    for (batch,), group in markdown.grouped(rows, "batch_tokens").items():
        medians = [np.median([row["time_us"][name] for row in group]) for name in GRID_TIMES]
        body.append([str(batch), *(f"{median:,.1f}" for median in medians)])
    return markdown.table(["batch", *GRID_TIMES.values()], body)


def stage_table(rows: list[dict]) -> str:
    """METRO's whole call, taken apart."""
    stages = ("count", "choose", "map", "record")
    return _table([*(f"{name} us" for name in stages), "call and checks us"], [
        [*_shape(row), *(f"{row['stages_us'][name]:.2f}" for name in stages),
         f"{row['metro_us'] - sum(row['stages_us'].values()):.1f}"]
        for row in rows
    ])  # fmt: skip


def choice_table(rows: list[dict]) -> str:
    """Only the choice of replicas, counts given: median, and the range of SciPy's."""
    heads = ["metro, compiled us", "greedy in id order, compiled us",
             "SciPy's maximum flow from Python, CPU us (range)"]  # fmt: skip
    return _table(heads, [
        [*_shape(row), f"{row['stages_us']['choose']:.2f}", f"{row['greedy_choice_us']:.2f}",
         _with_range(row, "scipy_optimum_us", 0)]
        for row in rows
    ])  # fmt: skip


def provenance(times: list[dict], grid: list[dict]) -> str:
    """Where the numbers are from."""
    sources = sorted({row["source"] for row in grid})
    return (
        f"Times: {_origin(times[-1])}; {times[-1]['sweeps']} sweeps, "
        f"{times[-1]['repetitions']} calls in each ({times[-1]['scipy_repetitions']} of "
        "SciPy's).\n\n"
        f"All else: {_origin(grid[-1])}, seed {grid[-1]['seed']}. Sources: {', '.join(sources)}."
    )


def _origin(row: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
    return (
        f"commit {row['commit']}; one core, shared with other work, of {row['machine']}; {versions}"
    )


def plot(rows: list[dict]) -> None:
    """lambda / optimal over the batch size, mean over everything else."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "metro"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    groups = markdown.grouped(rows, "batch_tokens")
    for policy, name in SHOWN.items():
        means = [np.mean([r[policy]["lambda"] / r["optimal_lambda"] for r in group])
                 for group in groups.values()]  # fmt: skip
        axes.plot([key[0] for key in groups], means, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks([key[0] for key in groups], [str(key[0]) for key in groups])
    axes.set_xlabel("batch (tokens)")
    axes.set_ylabel("lambda / least possible lambda")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(PLOT, metadata={"Date": None})
    PLOT.write_text("\n".join(line.rstrip() for line in PLOT.read_text().splitlines()) + "\n")


def writer(rows: list[dict]) -> Callable[[str], str]:
    """What goes to each place of docs/metro-results.md, by its name."""
    grid = [row for row in rows if row["kind"] == "grid"]
    times = [row for row in rows if row["kind"] == "time"]
    replicated = sorted(grid, key=lambda row: (row["S"], row["redundancy"]))
    tables = {
        "optimal": optimal_table(grid),
        "sources": ratio_table(grid, ["source"], "source"),
        "batches": ratio_table(grid, ["batch"], "batch_tokens"),
        "shapes": ratio_table(replicated, ["ranks", "redundancy"], "S", "redundancy"),
        "grid-times": grid_time_table(grid),
        "tokens": tokens_table(grid),
        "calls": call_table(times),
        "stages": stage_table(times),
        "choices": choice_table(times),
        "provenance": provenance(times, grid),
    }
    return tables.__getitem__
