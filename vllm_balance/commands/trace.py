"""``vllm-balance trace info``: what a recorded trace looks like, as a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vllm_balance import traces
from vllm_balance.commands import pictures
from vllm_balance.recording import Phase
from vllm_balance.trace_summary import CONSISTENT, HEAVY, TEMPORAL, TraceSummary, summarise


def info(
    file: Annotated[Path, typer.Argument(help="Recorded routing, .npz.")],
    batch: Annotated[int, typer.Option(min=1, help="Consecutive tokens that make a step.")] = 256,
    plot: Annotated[Path | None, typer.Option(help="Write a picture, e.g. trace.png.")] = None,
) -> None:
    """Print skew, consistent and temporal experts, co-activation groups and drift per layer."""
    if plot is not None:
        pictures.require_drawable(plot)
    trace = traces.load(file)
    summary = summarise(trace, batch)
    _print(trace, summary, batch)
    if plot is not None:
        pictures.draw_trace(trace, summary, plot)
        Console().print(f"Wrote {plot}.")


def _print(trace: traces.Trace, summary: TraceSummary, batch: int) -> None:
    console = Console()
    steps = (
        f"{summary.num_steps} recorded steps"
        if summary.num_tokens is None
        else f"{summary.num_tokens} tokens, {summary.num_steps} steps of "
        f"{min(batch, summary.num_tokens)} consecutive ones"
    )
    console.print(
        f"{trace.name}: {trace.num_layers} layers, {trace.num_experts} experts, "
        f"top-{trace.top_k}; {steps}{_phases(trace)}."
    )
    table = Table(
        caption=f"consistent: active in at least {CONSISTENT:.0%} of the steps; temporal: in at "
        f"most {TEMPORAL:.0%}, with {HEAVY} times the load of an active expert; drift: share of "
        f"the load that has moved from the first to the last tenth of the steps"
    )
    for heading in ("layer", "busiest / mean", "active experts", "consistent", "temporal"):
        table.add_column(heading, justify="right")
    table.add_column("together", overflow="fold")
    table.add_column("drift", justify="right")
    for row, layer in enumerate(trace.layer_index_L):
        groups = " ".join(f"({','.join(map(str, g))})" for g in summary.groups_L[row][:3])
        more = len(summary.groups_L[row]) - 3
        table.add_row(
            str(layer),
            f"{summary.skew_L[row]:.2f}",
            f"{summary.active_share_L[row]:.0%}",
            str(summary.consistent_LE[row].sum()),
            str(summary.temporal_LE[row].sum()),
            groups + (f" and {more} more" if more > 0 else ""),
            f"{summary.drift_LN[row, -1]:.1%}",
        )
    console.print(table)


def _phases(trace: traces.Trace) -> str:
    """How many of the steps or tokens belong to which phase, if it was recorded."""
    phases = trace.phase_T if trace.phase_N is None else trace.phase_N
    if phases is None:
        return ""
    counted = [(phase.name.lower(), int((phases == phase).sum())) for phase in Phase]
    return "; " + ", ".join(f"{number} {name}" for name, number in counted if number)
