"""``vllm-balance place``: a placement map from the ranks' curves and a trace."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from vllm_balance import documents, maps, traces
from vllm_balance.commands.installed import require_vllm
from vllm_balance.commands.place_ranks import ranks_of
from vllm_balance.commands.place_report import report, report_kinds
from vllm_balance.commands.printing import progress, say
from vllm_balance.cost import GPU_KNEE_TOKENS
from vllm_balance.errors import BalancerError, unknown
from vllm_balance.model_shape import ModelShape
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
    placements = bases_of(policy, fit, cluster) | {policy: own_LP}
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
    layers = layers_of(recorded.layer_index_L, placements[policy])
    placement_map = maps.PlacementMap(
        created=datetime.now(UTC),
        policy=policy,
        sources=sources,
        shape=shape,
        num_ranks=cluster.num_ranks,
        layers=layers,
    )
    maps.save(output, placement_map)
    bound_L = lower_bound_L(held_out, cluster) / len(held_out)
    report(recorded.layer_index_L, scores, bound_L, "us" if profile else "times of a token")
    for line in lines:
        say(line)
    steps_NLE, what = taken.to_tell_kinds(halves[0], fit)
    report_kinds(steps_NLE, what, placement_map, listed=experts)
    say(f"Wrote {output}: {recorded.num_layers} of the model's {shape.num_layers} layers.")


def bases_of(policy: str, fit_NLE: np.ndarray, cluster: Cluster) -> dict[str, np.ndarray]:
    """Expert of each slot [L, P] by the placements that another one is compared with."""
    bases = [base for base in ("linear", "eplb") if base != policy]
    return {base: PLACEMENT[base]().place(fit_NLE, cluster) for base in bases}


def layers_of(layer_index_L: np.ndarray, slots_LP: np.ndarray) -> list[maps.LayerMap]:
    """The layers of a map: their numbers in the model, and the expert of each slot."""
    return [
        maps.LayerMap(index=int(index), physical_to_logical=slots_P.tolist())
        for index, slots_P in zip(layer_index_L, slots_LP, strict=True)
    ]


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
