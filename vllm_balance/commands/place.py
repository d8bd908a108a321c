"""``vllm-balance place``: a placement map from the ranks' curves and a trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_balance import documents, maps, profiles, traces
from vllm_balance.commands.installed import require_vllm
from vllm_balance.cost import GPU_KNEE_TOKENS, CostModel
from vllm_balance.errors import BalancerError, unknown
from vllm_balance.model_shape import ModelShape, from_config
from vllm_balance.placement import (
    PLACEMENT,
    TRACED,
    Cluster,
    PlacementPolicy,
    Split,
    lower_bound_L,
    score_L,
)
from vllm_balance.placement.gem import GemPlacement
from vllm_balance.placement.gem_r import GemReplicaPlacement
from vllm_balance.recording import Phase
from vllm_balance.trace_summary import CONSISTENT, kinds

POLICIES = (*PLACEMENT, *TRACED)
ALIASES = {"gem+r": "gem_r"}
"""Other names of placements."""


def place(
    trace: Annotated[Path, typer.Option(help="Recorded routing, .npz.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The map to write.")],
    profile: Annotated[
        Path | None, typer.Option(help="Written by `vllm-balance profile`; or give --model.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Instead of a profile, where there can be none: the model's folder."),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Expert-parallel ranks; default: the profile's.")
    ] = None,
    speeds: Annotated[
        str, typer.Option(help="Relative speed of each rank, e.g. 1,1,0.86,1; default: the same.")
    ] = "",
    policy: Annotated[str, typer.Option(help=f"One of {', '.join(POLICIES)}.")] = "gem",
    redundant: Annotated[int, typer.Option(min=0, help="Redundant experts per layer.")] = 0,
    routing: Annotated[
        str, typer.Option(help="How replicas are used: even, or one per expert as metro does.")
    ] = "even",
    batch: Annotated[int, typer.Option(min=1, help="Tokens of a batch over all ranks.")] = 256,
    steps: Annotated[int, typer.Option(min=2, help="Batches to place by.")] = 128,
    prefill: Annotated[bool, typer.Option(help="Batches of consecutive tokens.")] = False,
    prefill_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Also as many batches of so many consecutive tokens of prompts."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    time_limit: Annotated[float, typer.Option(min=1, help="Seconds; for exflow only.")] = 120.0,
) -> None:
    """Place the experts of each layer by the modelled time of the slowest rank, and save the map.

    Half of the trace decides, the other half gives the scores that are printed.
    """
    require_vllm("place")
    documents.require_writable(output)
    if routing not in ("even", "one"):
        raise BalancerError(f"--routing is {routing!r}; allowed are even and one.")
    policy = ALIASES.get(policy, policy)
    _require_policy(policy)
    split: Split = "even" if routing == "even" else "one"
    shape, costs = ranks_of(profile, model, ranks, speeds)
    recorded = traces.load(trace)
    require_same_model(recorded, shape)
    cluster = Cluster(costs=costs, num_redundant=redundant)
    halves = recorded.split(seed)
    fit, held_out = (
        batches(
            half, batch=batch, steps=steps, prefill=prefill, prefill_batch=prefill_batch, seed=seed
        )
        for half in halves
    )
    if policy in TRACED:
        traced = TRACED[policy](time_limit_s=time_limit)
        run = partial(traced.place_trace, halves[0], cluster)
    else:
        run = partial(policy_of(policy, seed=seed, split=split).place, fit, cluster)
    placement_LP = with_progress(policy, recorded.num_layers, run)
    placement_map = maps.PlacementMap(
        created=datetime.now(UTC),
        policy=policy,
        sources={
            "profile": "none" if profile is None else profile.name,
            "speeds": speeds or "as profiled",
            "trace": trace.name,
            "seed": str(seed),
        },
        shape=shape,
        num_ranks=cluster.num_ranks,
        layers=[
            maps.LayerMap(index=int(index), physical_to_logical=slots_P.tolist())
            for index, slots_P in zip(recorded.layer_index_L, placement_LP, strict=True)
        ],
    )
    maps.save(output, placement_map)
    bases = [base for base in ("linear", "eplb") if base != policy]
    placements = {base: PLACEMENT[base]().place(fit, cluster) for base in bases}
    placements[policy] = placement_LP
    unit = "us" if profile is not None else "times of a token"
    report(recorded.layer_index_L, held_out, placements, cluster, split, unit)
    _report_kinds(fit)
    Console().print(
        f"Wrote {output}: {recorded.num_layers} of the model's {shape.num_layers} layers."
    )


def _report_kinds(history_NLE: np.ndarray) -> None:
    """Prints how many experts are consistent and temporal."""
    consistent_LE, temporal_LE = kinds(history_NLE)
    Console().print(
        f"Experts per layer in the batches placed by: {consistent_LE.sum(1).mean():.1f} consistent "
        f"(active in {CONSISTENT:.0%} of them or more), {temporal_LE.sum(1).mean():.1f} temporal "
        f"(seldom active, heavy then)."
    )


def ranks_of(
    profile: Path | None, model: Path | None, ranks: int | None, speeds: str
) -> tuple[ModelShape, tuple[CostModel, ...]]:
    """The model's shape and the curve of each rank, measured or assumed.

    Raises:
        BalancerError: neither or both of profile and model, speeds that are no positive numbers,
            or numbers of ranks that do not fit each other.
    """
    factor_S = _speeds(speeds, ranks)
    if (profile is None) == (model is None):
        raise BalancerError(
            f"place needs --profile FILE or --model MODEL, one of them; "
            f"{'neither was' if profile is None else 'both were'} given. A profile has the "
            f"measured curves of x86 CPUs; for other devices give the model, and --speeds if "
            f"ranks differ."
        )
    if profile is not None:
        measured = profiles.load(profile)
        shape, costs = (
            measured.shape,
            measured.costs_of(ranks or len(factor_S) or len(measured.ranks)),
        )
    else:
        assert model is not None
        shape, costs = from_config(model), assumed_costs(ranks or len(factor_S))
    return shape, tuple(
        cost.slowed(1 / factor)
        for cost, factor in zip(costs, factor_S or [1.0] * len(costs), strict=True)
    )


def assumed_costs(num_ranks: int) -> tuple[CostModel, ...]:
    """Equal curves in times of one token: streaming an expert takes as long as computing
    GPU_KNEE_TOKENS of its tokens.

    Raises:
        BalancerError: no rank.
    """
    if not num_ranks:
        raise BalancerError("--model says nothing about ranks: add --ranks N, or --speeds 1,1,...")
    curve = CostModel(a_us=0.0, b_us=GPU_KNEE_TOKENS, c_us=0.0, beta_us=1.0)
    return (curve,) * num_ranks


def _speeds(asked: str, ranks: int | None) -> list[float]:
    """The speeds of --speeds, or none."""
    try:
        found = [float(part) for part in asked.split(",")] if asked else []
    except ValueError:
        found = [math.nan]
    if not all(math.isfinite(speed) and speed > 0 for speed in found):
        raise BalancerError(
            f"--speeds is {asked!r}; needed is a positive number for each rank, as 1,1,0.86,1."
        )
    if found and ranks not in (None, len(found)):
        raise BalancerError(f"--speeds names {len(found)} ranks, and --ranks asks for {ranks}.")
    return found


def policy_of(name: str, *, seed: int, split: Split) -> PlacementPolicy:
    """The policy of this name, one of PLACEMENT."""
    if name == "gem":
        return GemPlacement(seed=seed)
    return GemReplicaPlacement(split=split) if name == "gem_r" else PLACEMENT[name]()


def _require_policy(name: str) -> None:
    if name not in POLICIES:
        raise BalancerError(
            f"--policy asks for {name!r}. {unknown('placement', name, POLICIES)} "
            f"docs/placement.md says what each does."
        )


def require_same_model(trace: traces.Trace, shape: ModelShape) -> None:
    """Raises BalancerError if the trace is of another model than the profile."""
    last = int(trace.layer_index_L[-1])
    if (trace.num_experts, trace.top_k) != (shape.num_experts, shape.top_k) or (
        last >= shape.num_layers
    ):
        raise BalancerError(
            f"Trace {trace.name} has {trace.num_experts} experts, top-{trace.top_k} and layers up "
            f"to {last}; profile or model is {shape.name} with {shape.num_experts} experts, "
            f"top-{shape.top_k} and {shape.num_layers} layers. Both must be of one model."
        )


def batches(
    trace: traces.Trace,
    *,
    batch: int,
    steps: int,
    prefill: bool,
    prefill_batch: int | None = None,
    seed: int,
) -> np.ndarray:
    """Pairs of each expert in batches, [N, L, E].

    `steps` batches of `batch` tokens, of decode or of prefill, and as many of prefill of
    `prefill_batch` tokens, if that is given.

    Raises:
        BalancerError: a batch of prefill would be all tokens of the trace, every time.
    """
    kinds_of_batch = [(batch, prefill)]
    if prefill_batch is not None:
        kinds_of_batch.append((prefill_batch, True))
    held = None if trace.topk_ids_TLK is None else len(trace.tokens_of(Phase.PREFILL))
    for tokens, is_prefill in kinds_of_batch:
        if is_prefill and held is not None and tokens >= held:
            raise BalancerError(
                f"Batches of prefill of {tokens} consecutive tokens were asked for, and a half of "
                f"trace {trace.name} holds {held} of prompts, so that all batches would be one and "
                f"the same. Allowed are fewer than {held}: lower --batch or --prefill-batch, or "
                f"record more."
            )
    return np.concatenate(
        [
            (trace.prefill_steps if is_prefill else trace.steps)(tokens, steps, seed)
            for tokens, is_prefill in kinds_of_batch
        ]
    )


def with_progress(
    policy: str, num_layers: int, place: Callable[[Callable[[int], None]], np.ndarray]
) -> np.ndarray:
    """What `place` returns, which is given a function to call for each layer, behind a bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(f"placing by {policy}", total=num_layers)
        found = place(lambda _: bar.advance(task))
        bar.update(task, completed=num_layers)
    return found


def report(
    layer_index_L: np.ndarray,
    held_out_NLE: np.ndarray,
    placements: dict[str, np.ndarray],
    cluster: Cluster,
    split: Split,
    unit: str,
) -> None:
    """Prints, per layer, the mean modelled time of a batch: the last placement against others."""
    columns = {
        name: score_L(held_out_NLE, found_LP, cluster, split) / len(held_out_NLE)
        for name, found_LP in placements.items()
    }
    *bases, own = columns
    columns["lower bound"] = lower_bound_L(held_out_NLE, cluster) / len(held_out_NLE)
    table = Table(title=f"Modelled time of a batch that was not used for placing, {unit}")
    for heading in ("layer", *columns, *(f"{own} against {base}" for base in bases)):
        table.add_column(heading, justify="right")
    for row, layer in enumerate([*layer_index_L, "all"]):
        pick = {
            name: float(values.sum() if layer == "all" else values[row])
            for name, values in columns.items()
        }
        gains = [f"{pick[own] / pick[base] - 1:+.1%}" for base in bases]
        table.add_row(str(layer), *(f"{value:.0f}" for value in pick.values()), *gains)
    Console().print(table)
