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
from rich.table import Table

from vllm_balance import documents, maps, profiles, traces
from vllm_balance.commands.installed import require_vllm
from vllm_balance.commands.printing import progress, say, spans
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
from vllm_balance.placement.batches import Batches
from vllm_balance.placement.gem import GemPlacement
from vllm_balance.placement.gem_r import GemReplicaPlacement
from vllm_balance.recording import Phase
from vllm_balance.trace_summary import CONSISTENT, HEAVY, TEMPORAL, kinds

POLICIES = (*PLACEMENT, *TRACED)
PHASES = {phase.name.lower(): phase for phase in (Phase.PREFILL, Phase.DECODE)}
EXFLOW_SECONDS = 120.0
"""After which exflow takes the best placement found so far."""
ALIASES = {"gem+r": "gem_r"}
"""Other names of placements."""
SEARCHED = ("gem", "gem_r")
"""Placements that take EPLB's for the layers where it is better on the half they did not see."""


def place(
    trace: Annotated[Path, typer.Option(help="Recorded routing, .npz.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The map to write, a new file.")],
    profile: Annotated[
        Path | None, typer.Option(help="Written by `vllm-balance profile`; or give --model.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a profile, where there can be none: a model's folder, its "
            "config.json, or its name on Hugging Face if it was downloaded."
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Expert-parallel ranks; default: the profile's.")
    ] = None,
    speeds: Annotated[
        str, typer.Option(help="Relative speed of each rank, e.g. 1,1,0.86,1; default: the same.")
    ] = "",
    knee_tokens: Annotated[
        float | None,
        typer.Option(
            help="With --model: tokens of an expert that take as long as streaming its weights; "
            f"default: {GPU_KNEE_TOKENS:g}.",
        ),
    ] = None,
    policy: Annotated[str, typer.Option(help=f"One of {', '.join(POLICIES)}.")] = "gem",
    redundant: Annotated[int, typer.Option(min=0, help="Redundant experts per layer.")] = 0,
    routing: Annotated[
        str | None,
        typer.Option(
            help="Of gem_r only, how replicas are used: even, or one per expert as metro does."
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a batch over all ranks. Default: 256; of a trace of counts its steps "
            "as they were recorded.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Most batches of a kind to place by.")] = 128,
    phase: Annotated[
        str | None,
        typer.Option(
            help=f"Batches of {' or '.join(PHASES)} only. Default: of counts all recorded steps, "
            f"of ids decode."
        ),
    ] = None,
    prefill_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Beside the batches of decode, as many of prefill: so many consecutive tokens of "
            "prompts.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the halves and of drawn batches.")] = 0,
    time_limit: Annotated[
        float | None,
        typer.Option(min=1, help="Of exflow only: seconds.", show_default=str(EXFLOW_SECONDS)),
    ] = None,
    experts: Annotated[
        bool, typer.Option("--experts", help="List consistent and temporal experts.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the file of --output if there is one.")
    ] = False,
) -> None:
    """Place the experts of each layer by the modelled time of the slowest rank, and save the map.

    Half of the trace decides, the other half gives the scores that are printed.
    """
    require_vllm("place")
    documents.require_new(output, "map", force)
    policy = ALIASES.get(policy, policy)
    _require_policy(policy)
    split = split_of(routing, policy)
    _require_own("--time-limit", time_limit, policy, ("exflow",))
    taken = Batches(
        batch=batch,
        steps=steps,
        phase=_phase_of(phase, prefill_batch),
        prefill_batch=prefill_batch,
        seed=seed,
    )
    shape, costs = ranks_of(profile, model, ranks, speeds, knee_tokens)
    recorded = traces.load(trace)
    require_same_model(recorded, shape)
    cluster = Cluster(costs=costs, num_redundant=redundant)
    halves = recorded.split(seed)
    fit, held_out = (taken.of(half) for half in halves)
    if policy in TRACED:
        traced = TRACED[policy](time_limit_s=time_limit or EXFLOW_SECONDS)
        run = partial(traced.place_trace, halves[0], cluster)
    else:
        run = partial(policy_of(policy, seed=seed, split=split).place, fit, cluster)
    own_LP = with_progress(policy, recorded.num_layers, run)
    bases = [base for base in ("linear", "eplb") if base != policy]
    placements = {base: PLACEMENT[base]().place(fit, cluster) for base in bases} | {policy: own_LP}
    scores = {
        name: score_L(held_out, found_LP, cluster, split) / len(held_out)
        for name, found_LP in placements.items()
    }
    sources = {
        "profile": "none" if profile is None else profile.name,
        "speeds": speeds or "as profiled",
        "trace": trace.name,
        "seed": str(seed),
        "batches": taken.described(halves[0]),
    }
    if knee_tokens is not None:
        sources["knee_tokens"] = f"{knee_tokens:g}"
    lines = [f"Placed by {sources['batches']}."]
    if policy == "gem_r":
        sources["routing"] = split
    if policy in SEARCHED:
        of_eplb = keep_better(placements, scores, policy)
        sources["layers_of_eplb"] = f"{of_eplb} of {recorded.num_layers}"
        lines.append(
            f"Layers for which EPLB's placement was better on the other half, and was taken: "
            f"{sources['layers_of_eplb']}."
        )
    placement_map = maps.PlacementMap(
        created=datetime.now(UTC),
        policy=policy,
        sources=sources,
        shape=shape,
        num_ranks=cluster.num_ranks,
        layers=[
            maps.LayerMap(index=int(index), physical_to_logical=slots_P.tolist())
            for index, slots_P in zip(recorded.layer_index_L, placements[policy], strict=True)
        ],
    )
    maps.save(output, placement_map)
    unit = "us" if profile is not None else "times of a token"
    bound_L = lower_bound_L(held_out, cluster) / len(held_out)
    report(recorded.layer_index_L, scores, bound_L, unit)
    for line in lines:
        say(line)
    steps_NLE, what = taken.to_tell_kinds(halves[0], fit)
    report_kinds(steps_NLE, what, placement_map, listed=experts)
    say(f"Wrote {output}: {recorded.num_layers} of the model's {shape.num_layers} layers.")


def keep_better(
    placements: dict[str, np.ndarray], scores: dict[str, np.ndarray], policy: str
) -> int:
    """Gives `policy` EPLB's placement of the layers where that scores better; how many they are.

    Args:
        placements: expert of each slot by name, [L, P]; that of `policy` is replaced.
        scores: of batches that were not used for placing, [L]; likewise.
    """
    better_L = scores["eplb"] < scores[policy] * (1 - 1e-9)
    placements[policy] = np.where(better_L[:, None], placements["eplb"], placements[policy])
    scores[policy] = np.where(better_L, scores["eplb"], scores[policy])
    return int(better_L.sum())


def report_kinds(
    steps_NLE: np.ndarray, what: str, placement_map: maps.PlacementMap, *, listed: bool
) -> None:
    """Prints how many experts are consistent and temporal; if `listed`, which ones, and the ranks
    of the temporal ones.

    Args:
        steps_NLE: pairs of each expert in the steps that tell, [N, L, E]; `what` in words.
        placement_map: of the same layers.
    """
    consistent_LE, temporal_LE = kinds(steps_NLE)
    say(
        f"Experts per layer in {what}: {consistent_LE.sum(1).mean():.1f} consistent (active in at "
        f"least {CONSISTENT:.0%} of them), {temporal_LE.sum(1).mean():.1f} temporal (in at most "
        f"{TEMPORAL:.0%}, with {HEAVY:g} times the load of an active expert)"
        f"{'' if listed else '; --experts lists them'}."
    )
    if not listed:
        return
    slots = placement_map.num_physical // placement_map.num_ranks
    table = Table()
    table.add_column("layer", justify="right")
    for heading in ("consistent", "temporal: rank"):
        table.add_column(heading, overflow="fold")
    for row, layer in enumerate(placement_map.layers):
        expert_P = np.array(layer.physical_to_logical)
        places = [
            f"{expert}: {spans(np.unique(np.flatnonzero(expert_P == expert) // slots))}"
            for expert in np.flatnonzero(temporal_LE[row])
        ]
        consistent = spans(np.flatnonzero(consistent_LE[row]))
        table.add_row(str(layer.index), consistent, "; ".join(places) or "-")
    Console().print(table)


def ranks_of(
    profile: Path | None,
    model: Path | None,
    ranks: int | None,
    speeds: str,
    knee_tokens: float | None = None,
) -> tuple[ModelShape, tuple[CostModel, ...]]:
    """The model's shape and the curve of each rank, measured or assumed.

    Raises:
        BalancerError: neither or both of profile and model, a knee that is no positive number or
            is given beside a profile, speeds that are no positive numbers, or numbers of ranks that
            do not fit each other.
    """
    factor_S = _speeds(speeds, ranks)
    if (profile is None) == (model is None):
        raise BalancerError(
            f"place needs --profile FILE or --model MODEL, one of them; "
            f"{'neither was' if profile is None else 'both were'} given. A profile has the "
            f"measured curves of x86 CPUs; for other devices give the model, and --speeds if "
            f"ranks differ."
        )
    if knee_tokens is not None and (profile is not None or not 0 < knee_tokens < math.inf):
        raise BalancerError(
            f"--knee-tokens {knee_tokens:g} was given; it is a positive number that goes with "
            f"--model, as a profile has the knee of its ranks."
        )
    if profile is not None:
        measured = profiles.load(profile)
        shape, costs = (
            measured.shape,
            measured.costs_of(ranks or len(factor_S) or len(measured.ranks)),
        )
    else:
        assert model is not None
        knee = GPU_KNEE_TOKENS if knee_tokens is None else knee_tokens
        shape, costs = from_config(model), assumed_costs(ranks or len(factor_S), knee)
    return shape, tuple(
        cost.slowed(1 / factor)
        for cost, factor in zip(costs, factor_S or [1.0] * len(costs), strict=True)
    )


def assumed_costs(num_ranks: int, knee_tokens: float) -> tuple[CostModel, ...]:
    """Equal curves in times of one token: streaming an expert takes as long as computing so many
    of its tokens.

    Raises:
        BalancerError: no rank.
    """
    if not num_ranks:
        raise BalancerError("--model says nothing about ranks: add --ranks N, or --speeds 1,1,...")
    curve = CostModel(a_us=0.0, b_us=knee_tokens, c_us=0.0, beta_us=1.0)
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


def split_of(routing: str | None, policy: str) -> Split:
    """How the routing uses replicas, by --routing.

    Raises:
        BalancerError: it is unknown, or given for a policy other than gem_r.
    """
    if routing not in (None, "even", "one"):
        raise BalancerError(f"--routing is {routing!r}; allowed are even and one.")
    _require_own("--routing", routing, policy, ("gem_r",))
    return "one" if routing == "one" else "even"


def _require_own(option: str, given: object, policy: str, owners: tuple[str, ...]) -> None:
    """Raises BalancerError if an option was given for a policy that has no use for it."""
    if given is not None and policy not in owners:
        raise BalancerError(
            f"{option} was given with --policy {policy}, and only {', '.join(owners)} has a use "
            f"for it. Leave it out, or place by another policy."
        )


def _phase_of(name: str | None, prefill_batch: int | None) -> Phase | None:
    """The phase of --phase.

    Raises:
        BalancerError: it is unknown, or it is prefill and batches of prefill were asked for beside
            others.
    """
    if name is None:
        return None
    if name not in PHASES:
        raise BalancerError(f"--phase asks for {name!r}. {unknown('phase', name, PHASES)}")
    if PHASES[name] == Phase.PREFILL and prefill_batch is not None:
        raise BalancerError(
            f"--prefill-batch {prefill_batch} was given with --phase prefill, and adds batches of "
            f"prefill to those of decode. Leave one of them out; --batch says how large batches of "
            f"prefill are."
        )
    return PHASES[name]


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


def with_progress(
    policy: str, num_layers: int, place: Callable[[Callable[[int], None]], np.ndarray]
) -> np.ndarray:
    """What `place` returns, which is given a function to call for each layer, behind a bar."""
    with progress() as bar:
        task = bar.add_task(f"placing by {policy}", total=num_layers)
        found = place(lambda _: bar.advance(task))
        bar.update(task, completed=num_layers)
    return found


def report(
    layer_index_L: np.ndarray, scores: dict[str, np.ndarray], bound_L: np.ndarray, unit: str
) -> None:
    """Prints, per layer, the mean modelled time of a batch: the last placement against others."""
    *bases, own = scores
    columns = scores | {"lower bound": bound_L}
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
