"""``vllm-balance plan``: will a balancer help this model on this machine, and which one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.console import Console
from rich.table import Table

from vllm_balance import traces
from vllm_balance.commands.installed import require_vllm
from vllm_balance.errors import BalancerError

if TYPE_CHECKING:  # The simulator imports torch, which need not be there for other commands.
    from vllm_balance.simulate import Layout, Traffic
    from vllm_balance.simulate.advice import Advice, Candidate, Question
    from vllm_balance.simulate.models import Model

MOST_LAYERS = 4
"""Simulated layers, which stand for all."""
HEADINGS = ("x", "in flight", "TPOT", "TTFT", "tok/s", "gain", "experts", "wait", "GB")


def plan(
    model: Annotated[str, typer.Option(help="A name of configs/models, or a .toml file.")],
    machine: Annotated[
        str, typer.Option("--hardware", help="A name of configs/hardware, or a .toml file.")
    ],
    trace: Annotated[Path | None, typer.Option(help="Recorded routing, .npz.")] = None,
    zipf: Annotated[
        float | None, typer.Option(min=0, help="Without a trace: skew of the experts, e.g. 0.8.")
    ] = None,
    slo_tpot: Annotated[
        str | None, typer.Option(help="Longest time per output token, e.g. 50ms.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests in flight; default: what the SLO allows.")
    ] = None,
    tensor: Annotated[int | None, typer.Option(min=1, help="Tensor-parallel ranks.")] = None,
    data: Annotated[int | None, typer.Option(min=1, help="Data-parallel ranks.")] = None,
    dispatch: Annotated[str, typer.Option(help="all_gather or all_to_all.")] = "all_gather",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 1024,
    output: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 1024,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Simulate every balancer and redundancy, and say whether to turn one on. Modelled times."""
    require_vllm("plan")
    from vllm_balance.simulate import advice, hardware, models, validity

    shape = models.load(model)
    found, profile = hardware.load(machine)
    layout = layout_of(tensor, data, dispatch, found.ranks_per_node.value)
    if trace is None and zipf is None:
        raise BalancerError("Give a --trace of this model, or a skew such as --zipf 0.8.")
    if concurrency is None and slo_tpot is None:
        concurrency = 32 * layout.num_ranks
    question = advice.Question(
        model=shape,
        hardware=found,
        profile=profile,
        layout=layout,
        prompt_tokens=prompt,
        output_tokens=output,
        traffic=traffic_of(shape, trace, zipf or 0.0, seed),
        concurrency=concurrency,
        slo_tpot_us=None if slo_tpot is None else microseconds(slo_tpot),
    )
    report(question, advice.advise(question, validity.load().gain_error.value))


def layout_of(tensor: int | None, data: int | None, dispatch: str, ranks: int) -> Layout:
    """The layout asked for; by default one node with data-parallel attention, or tensor-parallel
    where a node has only two ranks. Raises BalancerError for a layout that no server accepts, and
    for an unknown dispatch."""
    if (tensor or 1) > 1 and (data or 1) > 1:
        raise BalancerError(
            f"--tensor {tensor} and --data {data} were asked for together; a server with "
            f"--moe-balancer refuses tensor inside data parallelism. Leave one of them out."
        )
    from vllm_balance.simulate.layout import Dispatch, Layout

    for known in get_args(Dispatch):
        if dispatch == known:
            if tensor is None and data is None:
                tensor, data = (ranks, 1) if ranks <= 2 else (1, ranks)
            return Layout(tensor=tensor or 1, data=data or 1, dispatch=known)
    raise BalancerError(f"--dispatch is {dispatch!r}; allowed are {', '.join(get_args(Dispatch))}.")


def microseconds(text: str) -> float:
    """A time such as 50ms, 0.05s or 800us. Raises BalancerError if it is none."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(us|ms|s)\s*", text)
    if match is None or float(match[1]) <= 0:
        raise BalancerError(f"{text!r} is no time; write for example 50ms, 0.05s or 800us.")
    return float(match[1]) * {"us": 1.0, "ms": 1e3, "s": 1e6}[match[2]]


def traffic_of(
    shape: Model, trace: Path | None, zipf: float, seed: int
) -> Callable[[], tuple[Traffic, Traffic]]:
    """What makes fresh traffic: of a trace, half to serve and half to place experts by."""
    from vllm_balance.replay_rows import ReplaySettings
    from vllm_balance.simulate import recorded, skewed

    layers = min(MOST_LAYERS, shape.num_moe_layers)
    if trace is None:
        served = placed_by = skewed(ReplaySettings(zipf=zipf, seed=seed), shape, layers)
    else:
        first, second = traces.load(trace).split(seed)
        served = recorded(second, shape, layers, seed)
        placed_by = recorded(first, shape, layers, seed)
    return lambda: (served.fresh(), placed_by.fresh())


def report(question: Question, found: Advice) -> None:
    """Prints the candidates and the answer."""
    layout = question.layout
    table = Table(
        padding=(0, 0),
        title=f"{question.model.name} on {layout.num_ranks} x {question.hardware.name}, "
        f"TP{layout.tensor} x DP{layout.data}; {question.prompt_tokens} tokens in, "
        f"{question.output_tokens} out. Modelled, not measured.",
        caption="x: physical / logical experts; TPOT and TTFT in ms; gain: tok/s against static; "
        "experts: activated on the worst rank of a layer; wait: share of the experts' time; "
        "GB: redundant experts of a rank; none: no room, or misses the SLO; TTFT -: no request "
        "arrives in the simulated steps",
    )
    table.add_column("balancer")
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    base = found.candidates[0].tokens_per_s
    for each in found.candidates:
        cells = _cells(question, each, base)
        style = "bold" if each is found.best else None
        table.add_row(each.balancer, f"{each.redundancy:.4g}", *cells, style=style)
    Console().print(table)
    Console().print(answer(question, found), soft_wrap=True)


def _cells(question: Question, each: Candidate, base: float) -> list[str]:
    if each.outcome is None:
        return ["none", *["-"] * 7]
    made = each.outcome
    ttft_us = made.ttft_us_at(0.5)
    return [
        str(each.concurrency),
        f"{made.tpot_us / 1e3:.1f}",
        "-" if math.isnan(ttft_us) else f"{ttft_us / 1e3:.0f}",
        f"{each.tokens_per_s:,.0f}",
        f"{each.tokens_per_s / base - 1:+.1%}",
        f"{made.activated_N.mean() / question.model.num_moe_layers:.1f}",
        f"{made.waiting_share:.0%}",
        f"{made.redundant_bytes / 1e9:.1f}",
    ]


def answer(question: Question, found: Advice) -> str:
    """What to do, in one or two sentences."""
    from vllm_balance.simulate.advice import settings_of

    at = f"at {question.slo_tpot_us / 1e3:g} ms per token" if question.slo_tpot_us else "here"
    if found.best.balancer == "static":
        return f"No, leave it off: nothing beats serving without redundant experts {at}."
    band = f"{found.gain - found.error:+.1%} to {found.gain + found.error:+.1%}"
    name = f"{found.best.balancer} with redundancy {found.best.redundancy:.4g}"
    if not found.worth_it:
        return (
            f"No, leave it off: the best, {name}, is predicted to give {found.gain:+.1%} tokens/s "
            f"{at}, which is within the model's error ({band})."
        )
    assert found.best.outcome is not None
    return (
        f"Yes: {name} is predicted to give {found.gain:+.1%} tokens/s {at} ({band}), for "
        f"{found.best.outcome.redundant_bytes / 1e9:.1f} GB more memory on each rank. Measure "
        f"before you believe it, with --moe-balancer {found.best.balancer} "
        f"--moe-balancer-config '{json.dumps(settings_of(question, found.best))}'."
    )
