"""``vllm-balance trace info``: what a recorded trace looks like, as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vllm_balance import traces
from vllm_balance.commands import pictures
from vllm_balance.commands.printing import say, spans
from vllm_balance.errors import BalancerError, unknown
from vllm_balance.recording import Phase
from vllm_balance.trace_summary import (
    CONSISTENT,
    HEAVY,
    TEMPORAL,
    TraceSummary,
    main_phase,
    summarise,
)

PHASES = {phase.name.lower(): phase for phase in (Phase.PREFILL, Phase.DECODE, Phase.MIXED)}


def info(
    file: Annotated[Path, typer.Argument(help="Recorded routing, .npz.")],
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Of a trace of ids, consecutive tokens that make a step; default: "
            f"{traces.DEFAULT_BATCH}.",
        ),
    ] = None,
    phase: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(PHASES)}; default: the one with the most."),
    ] = None,
    experts: Annotated[
        bool,
        typer.Option(
            "--experts",
            help="List consistent and temporal experts, all groups, and the drift of each tenth.",
        ),
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture, e.g. trace.png.")] = None,
) -> None:
    """Print skew, consistent and temporal experts, co-activation groups and drift per layer.

    All of one phase, where phases were recorded: steps of prefill hold many times the tokens of
    steps of decode.
    """
    if plot is not None:
        pictures.require_drawable(plot)
    if phase is not None and phase not in PHASES:
        raise BalancerError(f"--phase asks for {phase!r}. {unknown('phase', phase, PHASES)}")
    trace = traces.load(file)
    if batch is not None and trace.counts_NLE is not None:
        raise BalancerError(
            f"--batch {batch} was given, and trace {trace.name} holds counts, whose steps are as "
            f"they were recorded. Leave it out."
        )
    chosen = main_phase(trace) if phase is None else PHASES[phase]
    part = trace if chosen is None else trace.of_phase(chosen)
    step_tokens = min(batch or traces.DEFAULT_BATCH, part.num_tokens)
    summary = summarise(part, step_tokens)
    _print_trace(trace, summary.num_steps, step_tokens)
    if len(trace.phases()) > 1 and chosen is not None:
        say(f"What follows is of the {summary.num_steps} steps of {chosen.name.lower()} (--phase).")
    _print_layers(trace, summary)
    if experts:
        _print_experts(trace, summary)
    if plot is not None:
        pictures.draw_trace(part, summary, plot)
        say(f"Wrote {plot}.")


def _print_trace(trace: traces.Trace, num_steps: int, step_tokens: int) -> None:
    """The trace in a line; the last two are of one of ids."""
    steps = (
        f"{num_steps} steps of {step_tokens} consecutive ones"
        if trace.counts_NLE is None
        else f"{len(trace.counts_NLE)} recorded steps"
    )
    phases = ", ".join(f"{number} {phase.name.lower()}" for phase, number in trace.phases().items())
    say(
        f"{trace.name}: {trace.num_layers} layers, {trace.num_experts} experts, "
        f"top-{trace.top_k}; {trace.num_tokens} tokens, {steps}{phases and f'; {phases}'}."
    )


def _print_layers(trace: traces.Trace, summary: TraceSummary) -> None:
    table = Table(
        caption=f"consistent: active in at least {CONSISTENT:.0%} of the steps; temporal: in at "
        f"most {TEMPORAL:.0%}, with {HEAVY:g} times the load of an active expert; drift: share of "
        f"the load that has moved from the first to the last tenth of the steps"
    )
    for heading in ("layer", "busiest / mean", "active experts", "consistent", "temporal"):
        table.add_column(heading, justify="right")
    table.add_column("together", overflow="fold")
    table.add_column("drift", justify="right")
    for row, layer in enumerate(trace.layer_index_L):
        groups = _groups(summary.groups_L[row][:3])
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
    Console().print(table)


def _print_experts(trace: traces.Trace, summary: TraceSummary) -> None:
    table = Table()
    table.add_column("layer", justify="right")
    for heading in ("consistent", "temporal", "together", "drift by tenth"):
        table.add_column(heading, overflow="fold")
    for row, layer in enumerate(trace.layer_index_L):
        found = (summary.consistent_LE[row], summary.temporal_LE[row])
        drift = " ".join(f"{share:.0%}" for share in summary.drift_LN[row])
        groups = _groups(summary.groups_L[row]) or "-"
        kinds = (spans(is_one_E.nonzero()[0]) for is_one_E in found)
        table.add_row(str(layer), *kinds, groups, drift)
    Console().print(table)


def _groups(groups: Sequence[Sequence[int]]) -> str:
    return " ".join(f"({','.join(map(str, group))})" for group in groups)
