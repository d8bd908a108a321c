"""``vllm-balance plan``: will a balancer help this model on this machine, and which one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from vllm_balance import traces
from vllm_balance.commands.installed import require_vllm
from vllm_balance.commands.printing import say
from vllm_balance.errors import BalancerError

if TYPE_CHECKING:  # The simulator imports torch, which need not be there for other commands.
    from vllm_balance.simulate import Layout, Traffic
    from vllm_balance.simulate.advice import Advice, Candidate, Question
    from vllm_balance.simulate.hardware import Hardware
    from vllm_balance.simulate.models import Model
    from vllm_balance.simulate.validity import Errors

MAX_LAYERS = 4
"""Simulated layers, which stand for all."""
HEADINGS = ("x", "in flight", "TPOT", "TTFT", "tok/s", "gain", "experts", "wait", "GB")


def plan(
    model: Annotated[
        str, typer.Option(help="A name of the catalogue (any other lists them), or a .toml file.")
    ],
    machine: Annotated[str, typer.Option("--hardware", help="Likewise.")],
    trace: Annotated[Path | None, typer.Option(help="Recorded routing, .npz.")] = None,
    zipf: Annotated[
        float | None, typer.Option(min=0, help="Without a trace: skew of the experts, e.g. 0.8.")
    ] = None,
    slo_tpot: Annotated[
        str | None, typer.Option(help="Longest time per output token, e.g. 50ms.")
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1, help="Requests in flight; default: what the SLO allows, or 32 per rank."
        ),
    ] = None,
    tensor: Annotated[int | None, typer.Option(min=1, help="Tensor-parallel ranks.")] = None,
    data: Annotated[int | None, typer.Option(min=1, help="Data-parallel ranks.")] = None,
    dispatch: Annotated[
        str, typer.Option(help="Of data parallelism: all_gather or all_to_all.")
    ] = "all_gather",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each request's prompt.")] = 1024,
    output_tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 1024,
    batched_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-num-batched-tokens", min=2, help="Of each engine; default: vLLM's on this GPU."
        ),
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option("--max-num-seqs", min=1, help="Of each engine; default: vLLM's on this GPU."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the routing that is drawn.")] = 0,
) -> None:
    """Simulate every balancer and redundancy, and say whether to turn one on. Modelled times."""
    require_vllm("plan")
    from vllm_balance.simulate import advice, hardware, models, validity

    shape = models.load(model)
    found, profile = hardware.load(machine, shape)
    found = found.with_engine(*engine_of(found, batched_tokens, sequences))
    layout = layout_of(tensor, data, dispatch, found.ranks_per_node.value)
    _require_one_traffic(trace, zipf)
    recording = None if trace is None else traces.load(trace)
    if concurrency is None and slo_tpot is None:
        concurrency = 32 * layout.num_ranks
    question = advice.Question(
        model=shape,
        hardware=found,
        profile=profile,
        layout=layout,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        traffic=traffic_of(shape, recording, zipf or 0.0, seed),
        concurrency=concurrency,
        slo_tpot_us=None if slo_tpot is None else microseconds(slo_tpot),
    )
    errors = validity.load().of(profile, shape)
    report(question, advice.advise(question, errors.mean.value), errors)
    if recording is not None and recording.topk_ids_TLK is None:
        say(
            f"Trace {recording.name} holds counts of steps: which experts a token uses together is "
            f"drawn from them, not recorded."
        )


def _require_one_traffic(trace: Path | None, zipf: float | None) -> None:
    """Raises BalancerError unless exactly one says which experts are asked for."""
    if trace is None and zipf is None:
        raise BalancerError("Give a --trace of this model, or a skew such as --zipf 0.8.")
    if trace is not None and zipf is not None:
        raise BalancerError(
            f"--trace {trace} and --zipf {zipf:g} were given together, and each says which experts "
            f"the tokens ask for. Leave one of them out."
        )


def engine_of(
    machine: Hardware, batched_tokens: int | None, sequences: int | None
) -> tuple[int, int]:
    """What an engine takes, the file's where nothing was asked for.

    Raises BalancerError if it has more requests than tokens.
    """
    tokens = batched_tokens or machine.engine.batched_tokens.value
    requests = sequences or machine.engine.sequences.value
    if requests >= tokens:
        raise BalancerError(
            f"An engine with --max-num-seqs {requests:,} and --max-num-batched-tokens {tokens:,} "
            f"has no room for prompts while all its requests decode. Lower the first or raise the "
            f"second."
        )
    return tokens, requests


def layout_of(tensor: int | None, data: int | None, dispatch: str, ranks: int) -> Layout:
    """The layout asked for; by default one node with data-parallel attention, or tensor-parallel
    where a node has at most two ranks. Raises BalancerError for a layout that no server accepts,
    and for a dispatch that is unknown or has no data parallelism."""
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
            if known == "all_to_all" and (data or 1) == 1:
                raise BalancerError(
                    "--dispatch all_to_all is a way to exchange tokens between data-parallel "
                    "ranks, and the layout is tensor-parallel, whose ranks have all tokens. Leave "
                    "it out, or give --data."
                )
            return Layout(tensor=tensor or 1, data=data or 1, dispatch=known)
    raise BalancerError(f"--dispatch is {dispatch!r}; allowed are {', '.join(get_args(Dispatch))}.")


def microseconds(text: str) -> float:
    """An SLO such as 50ms, 0.05s or 800us. Raises BalancerError if it is no time."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(us|ms|s)\s*", text)
    if match is None or float(match[1]) <= 0:
        raise BalancerError(
            f"--slo-tpot is {text!r}; allowed is a positive number with a unit, us, ms or s. Write "
            f"for example 50ms, 0.05s or 800us."
        )
    return float(match[1]) * {"us": 1.0, "ms": 1e3, "s": 1e6}[match[2]]


def traffic_of(
    shape: Model, trace: traces.Trace | None, zipf: float, seed: int
) -> Callable[[], tuple[Traffic, Traffic]]:
    """What makes fresh traffic: of a trace, half to serve and half to place experts by."""
    from vllm_balance.replay_rows import ReplaySettings
    from vllm_balance.simulate import recorded, skewed

    layers = _simulated_layers(shape)
    if trace is None:
        settings = ReplaySettings(zipf=zipf, seed=seed)
        served, placed_by = (skewed(settings, shape, layers, rank) for rank in (0, 1))
    else:
        first, second = trace.split(seed)
        served = recorded(second, shape, layers, seed)
        placed_by = recorded(first, shape, layers, seed)
    return lambda: (served.fresh(), placed_by.fresh())


def _simulated_layers(model: Model) -> int:
    return min(MAX_LAYERS, model.num_moe_layers)


def report(question: Question, found: Advice, errors: Errors) -> None:
    """Prints the candidates, what a server would refuse, and the answer."""
    layout, engine = question.layout, question.hardware.engine
    table = Table(
        padding=(0, 0),
        title=f"{question.model.name} on {layout.num_ranks} x {question.hardware.name}, "
        f"TP{layout.tensor} x DP{layout.data}; {question.prompt_tokens} tokens in, "
        f"{question.output_tokens} out; --max-num-batched-tokens {engine.batched_tokens.value} and "
        f"--max-num-seqs {engine.sequences.value} per engine. Modelled, not measured.",
        caption="x: physical / logical experts; TPOT and TTFT in ms; gain: tok/s against static; "
        "experts: activated on the worst rank of a layer; wait: share of the experts' time; "
        "GB: redundant experts of a rank; none: no room, or misses the SLO; TPOT -: answers of one "
        "token",
    )
    table.add_column("balancer")
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for each in found.candidates:
        cells = _cells(question, each, found.static_rate)
        style = "bold" if each is found.best else None
        table.add_row(each.balancer, f"{each.redundancy:.4g}", *cells, style=style)
    Console().print(table)
    say(
        f"{_simulated_layers(question.model)} layers were simulated and stand for "
        f"{question.model.num_moe_layers}; of a trace they are from all over it."
    )
    for reason, names in found.left_out.items():
        say(f"Left out, as a server would refuse it: {', '.join(names)}; {reason}.")
    say(answer(question, found, errors))


def _cells(question: Question, each: Candidate, static_rate: float) -> list[str]:
    if each.outcome is None:
        return ["none", *["-"] * 7]
    made = each.outcome
    return [
        str(each.concurrency),
        "-" if math.isnan(made.tpot_us) else f"{made.tpot_us / 1e3:.1f}",
        f"{made.ttft_us_at(0.5) / 1e3:.0f}",
        f"{each.tokens_per_s:,.0f}",
        f"{each.tokens_per_s / static_rate - 1:+.1%}",
        f"{made.mean(made.activated_N) / question.model.num_moe_layers:.1f}",
        f"{made.waiting_share:.0%}",
        f"{made.redundant_bytes / 1e9:.1f}",
    ]


def answer(question: Question, found: Advice, errors: Errors) -> str:
    """What to do, in one paragraph."""
    from vllm_balance.simulate.advice import flags_of, settings_of

    at = f"at {question.slo_tpot_us / 1e3:g} ms per token" if question.slo_tpot_us else "here"
    if len(found.candidates) == 1:
        maps = "" if question.model.support == "no map" else ", and exflow with a map"
        return f"No: a server would refuse every balancer here but static{maps}."
    if found.best.balancer == "static":
        return f"No, leave it off: nothing beats serving without a balancer {at}."
    band = " to ".join(f"{gain:+.1%}" for gain in found.band)
    name = _name(question, found.best)
    if not found.worth_it:
        only = ", and alone to keep the SLO" if found.static_misses else ""
        return (
            f"No, leave it off: the best, {name}, is predicted to give {found.gain:+.1%} tokens/s "
            f"{at}{only}, which is within the model's error ({band})."
        )
    flags = "".join(f"{flag} " for flag in flags_of(question, found.best))
    keeps = "keep the SLO, which a server without it misses, and " if found.static_misses else ""
    return (
        f"Yes: {name} is predicted to {keeps}give {found.gain:+.1%} tokens/s {at} ({band}), for "
        f"{_memory(question, found.best)}. The band is what a TPOT means that is longer or shorter "
        f"by {errors.mean.value:.1%}, the mean error where the simulator could be checked; one "
        f"ratio in ten was missed by more than {errors.one_in_ten.value:.0%}. "
        f"{_uncounted(question, flags)}"
        f"Measure before you believe it, with {flags}--moe-balancer {found.best.balancer} "
        f"--moe-balancer-config '{json.dumps(settings_of(question, found.best))}'."
        f"{_how_to_place(question, found.best) if found.best.balancer == 'gem' else ''}"
    )


def _uncounted(question: Question, flags: str) -> str:
    """What no candidate is charged with: eager decoding, where a balancer needs it."""
    if not flags or question.output_tokens == 1:
        return ""
    return "Decoding without CUDA graphs, which it needs, is slower than modelled here. "


def _how_to_place(question: Question, found: Candidate) -> str:
    """How the map that the settings name is made: by batches as large as the load's, at most as
    large as those that were simulated."""
    from vllm_balance.simulate.advice import MAP, knee_of
    from vllm_balance.simulate.run import MOST_HISTORY_TOKENS

    assert found.outcome is not None
    ranks, steps = question.layout.num_ranks, found.outcome.steps
    with_prompts_N = steps.prefill_N > 0
    mean = float(question.prompt_tokens)  # A cycle that was cut short may have no prompt.
    if with_prompts_N.any():
        tokens_N, times_N = steps.prefill_N[with_prompts_N], steps.times_N[with_prompts_N]
        mean = float(np.average(tokens_N, weights=times_N))
    decode = 0 if question.output_tokens == 1 else found.concurrency
    scale = max((decode + mean) / MOST_HISTORY_TOKENS, 1.0)
    prompts = max(1, round(mean / scale))
    if not decode:
        batches = f"--phase prefill --batch {prompts}"
    else:
        batches = f"--batch {max(1, round(decode / scale))} --prefill-batch {prompts}"
    by = f"--model MODEL --knee-tokens {knee_of(question, found):g}"
    if question.hardware.experts == "in_turn":
        by = "--profile PROFILE"
    return (
        f" Make {MAP} with `vllm-balance place --policy gem {by} --ranks {ranks} --trace TRACE "
        f"{batches} -o {MAP}`, from a trace of your traffic."
    )


def _name(question: Question, found: Candidate) -> str:
    """A balancer and what it needs."""
    from vllm_balance.simulate.advice import settings_of

    slots = settings_of(question, found).get("dynamic_slots")
    if slots is not None:
        return f"{found.balancer} with {slots:g} dynamic slots per rank"
    if found.redundancy == 1:
        return f"{found.balancer} without redundant experts"
    return f"{found.balancer} with redundancy {found.redundancy:.4g}"


def _memory(question: Question, found: Candidate) -> str:
    """What it takes, on each rank and of the host."""
    from vllm_balance.simulate.advice import host_bytes

    text = f"{found.redundant_bytes / 1e9:.1f} GB more memory on each rank"
    store = host_bytes(question, found)
    return f"{text} and {store / 1e9:.0f} GB of host memory" if store else text
