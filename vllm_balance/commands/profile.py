"""``vllm-balance profile``: the measured cost curve of every rank, as a file."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_balance import documents, model_shape, profiles
from vllm_balance.commands import expert_probe, pictures
from vllm_balance.commands.expert_probe import Probe, probing_kernels
from vllm_balance.commands.installed import require_vllm
from vllm_balance.commands.printing import progress, say
from vllm_balance.commands.profile_check import check_profile
from vllm_balance.commands.profile_samples import (
    ON_CORES,
    Extent,
    FirstGuess,
    grid,
    within_time,
)
from vllm_balance.commands.profiled_ranks import Cores, Ranks, visible_gpus
from vllm_balance.commands.rank_curves import ROUNDS, curves, fastest
from vllm_balance.cost import CostModel
from vllm_balance.errors import BalancerError
from vllm_balance.model_shape import ModelShape
from vllm_balance.profiles import Curve, Point, Profile, RankProfile, Units
from vllm_balance.seams.device import device_name, is_gpu, served_dtype
from vllm_balance.seams.versions import kernel_versions

MAX_EXPERTS = 64
"""Of one rank that are held in memory if nothing else is asked for."""
SECONDS = 70.0
"""After which no round is begun beyond the least."""
GOOD_FIT = 0.08
"""Median relative error from which on a profile comes with a warning."""
DEFAULT_OUTPUT = Path("profile.json")


def profile(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A model's folder, its config.json, or its name on Hugging Face if it was "
            "downloaded.",
        ),
    ],
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks measured at once.", show_default="2, or all GPUs"),
    ] = None,
    cores_per_rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cores that each rank computes with, as it will serve; not on GPUs.",
            show_default="1",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="The profile to write, a new file.",
            show_default=str(DEFAULT_OUTPUT),
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the file of --output if there is one.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture, e.g. profile.png.")] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a new profile: does this one still hold? A few of its points are "
            "measured again, on its ranks and cores; exit status 1 if it does not hold."
        ),
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Experts held by each rank; default: its share, at most {MAX_EXPERTS}."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="What the experts are served in: the --dtype of `vllm serve`.")
    ] = "auto",
) -> None:
    """Measure vLLM's expert kernel on every rank, fit the curves and save them.

    With --check exit status 1 if the profile no longer holds; 2 if something is refused.
    """
    require_vllm("profile")
    shape = model_shape.from_config(model)
    _refuse_quantised(model)
    if check is not None:
        new_only = {
            "--ranks": ranks, "--cores-per-rank": cores_per_rank, "--output": output,
            "--force": force or None, "--plot": plot, "--experts": experts,
        }  # fmt: skip
        _refuse_beside_check([name for name, value in new_only.items() if value is not None])
        stored = profiles.load(check)
        same = stored.shape.dtype if dtype == "auto" else served_dtype(dtype, shape.dtype)
        shape = shape.model_copy(update={"dtype": same})
        stored.require(shape=shape, device=device_name(same), versions=kernel_versions())
        check_profile(stored, ranks_here(len(stored.ranks), stored.cores_per_rank))
        return
    output = output or DEFAULT_OUTPUT
    documents.require_new(
        output, "profile", force, f"; `--check {output}` tells whether it still holds"
    )
    if plot is not None:
        pictures.require_drawable(plot)
    shape = shape.model_copy(update={"dtype": served_dtype(dtype, shape.dtype)})
    begun = time.monotonic()
    if is_gpu() and cores_per_rank is not None:
        raise BalancerError(
            f"--cores-per-rank asks for {cores_per_rank}, and experts run on GPUs here. Leave it "
            f"out."
        )
    measured = measure_ranks(shape, ranks_here(ranks, cores_per_rank or 1), experts)
    documents.write(output, measured)
    _print(measured)
    say(f"Measured in {time.monotonic() - begun:.0f} s. Wrote {output}.")
    if plot is not None:
        pictures.draw_profile(measured, plot)
        say(f"Wrote {plot}.")


def ranks_here(ranks: int | None, cores_per_rank: int) -> Ranks:
    """The ranks of this machine: so many, or two, or all GPUs.

    Raises:
        BalancerError: it has fewer cores or GPUs.
    """
    return visible_gpus(ranks) if is_gpu() else Cores(cores_of(ranks or 2, cores_per_rank))


def measure_ranks(shape: ModelShape, ranks: Ranks, experts: int | None) -> Profile:
    """Measures all ranks at once and fits their curves.

    Args:
        experts: held by each rank; None: its share, at most MAX_EXPERTS.

    Raises:
        BalancerError: too little memory, more experts than samples have tokens for, or a rank died.
    """
    extent, places = ranks.extent, ranks.places
    few = extent.coarse[1]
    if experts is not None and experts * few > extent.most_tokens:
        raise BalancerError(
            f"--experts asks for {experts} experts on each rank, and samples have at most "
            f"{extent.most_tokens} tokens, {few} and more for each expert. Allowed are up to "
            f"{extent.most_tokens // few}."
        )
    local = experts or min(-(-shape.num_experts // len(places)), MAX_EXPERTS)
    with probing_kernels(ranks.kernels(shape, local)) as probe:
        points_RSN = sample(probe, local, extent)
        beside = ranks.shares_memory and len(places) > 1
        alone = sample_alone(probe, points_RSN[0][0], extent) if beside else []
    return Profile(
        units=Units(),
        created=datetime.now(UTC),
        device=device_name(shape.dtype),
        versions=kernel_versions(),
        shape=shape,
        cores_per_rank=ranks.cores_per_rank,
        ranks=ranks_of(points_RSN, places, extent),
        alone=alone,
    )


def _refuse_quantised(model: Path) -> None:
    if (how := model_shape.quantisation_of(model)) is not None:
        raise BalancerError(
            f"The experts of {model} are quantised ({how}), and `vllm-balance profile` measures "
            f"vLLM's kernels for unquantised ones. `vllm-balance place --model MODEL --speeds ...` "
            f"places experts without a profile."
        )


def _refuse_beside_check(given: Sequence[str]) -> None:
    if given:
        raise BalancerError(
            f"--check was given together with {', '.join(given)}. It measures on the ranks, cores "
            f"and experts of the profile and writes nothing: leave {', '.join(given)} out, or "
            f"leave --check out to measure a new profile."
        )


def cores_of(ranks: int, each: int = 1) -> list[list[int]]:
    """So many neighbouring cores for each rank, one hardware thread of each, as vLLM binds them.

    Raises BalancerError if there are too few.
    """
    cores = own_cores()
    if ranks * each > len(cores):
        raise BalancerError(
            f"{ranks} ranks were asked for, with {each} of the cores each, and {len(cores)} cores "
            f"are free to use. Profile fewer ranks; one rank's profile can stand for all if they "
            f"are alike."
        )
    return [cores[rank * each : (rank + 1) * each] for rank in range(ranks)]


def own_cores() -> list[int]:
    """The cores that this process may use: of hardware threads that share one, the first."""
    first: dict[str, int] = {}
    for thread in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{thread}/topology/thread_siblings_list")
        core = siblings.read_text() if siblings.exists() else str(thread)
        first.setdefault(core, thread)
    return list(first.values())


def sample(probe: Probe, local: int, extent: Extent = ON_CORES) -> list[list[list[Point]]]:
    """Points of each round and rank, the same batches in each: few far from the knee, many around
    it, and skewed ones.
    """
    begun = time.monotonic()
    with progress() as bar:
        task = bar.add_task("finding the knee", total=None)

        def measure(tokens_E: Sequence[int], repeats: int | None = None) -> list[Point]:
            timings = probe.measure(tokens_E, repeats)
            bar.advance(task)
            return [Point(tokens_E=list(tokens_E), time_us=timing.time_us, repeats=timing.repeats)
                    for timing in timings]  # fmt: skip

        first = [[n] * local for n in extent.coarse if n * local <= extent.most_tokens]
        points_NS = [measure(tokens_E) for tokens_E in first]
        guess = FirstGuess.of([points_S[0] for points_S in points_NS])
        wanted = grid(local, guess.knee, extent)
        batches, hurried = within_time(guess, first, wanted)
        if hurried:
            say(_shortened(len(first + wanted), len(batches)), "yellow")
        least, most = (ROUNDS[0], ROUNDS[0]) if hurried else ROUNDS
        bar.update(task, description="around the knee", total=least * len(batches))
        planned = [(tokens_E, guess.repeats(tokens_E, hurried)) for tokens_E in batches]
        rounds = [points_NS + [measure(*sample) for sample in planned[len(first) :]]]
        while len(rounds) < least or (len(rounds) < most and time.monotonic() - begun < SECONDS):
            total = len(batches) * max(least, len(rounds) + 1)
            bar.update(task, description=f"round {len(rounds) + 1}", total=total)
            rounds.append([measure(*sample) for sample in planned])
    return [[list(points_N) for points_N in zip(*points_NS, strict=True)] for points_NS in rounds]


def sample_alone(probe: Probe, points: Sequence[Point], extent: Extent = ON_CORES) -> list[Point]:
    """The evenly loaded ones of the first samples once more, on rank 0 while the others are idle.

    Args:
        points: of rank 0, as `sample` measured them.
    """
    local = max(len(point.tokens_E) for point in points)
    even = [point for point in points if point.tokens_E in [[n] * local for n in extent.coarse]]
    with progress() as bar:
        task = bar.add_task("one rank alone", total=ROUNDS[0] * len(even))
        rounds: list[list[Point]] = []
        for _ in range(ROUNDS[0]):
            rounds.append([])
            for point in even:
                timing = probe.measure_alone(point.tokens_E, point.repeats)
                rounds[-1].append(point.model_copy(update=asdict(timing)))
                bar.advance(task)
    return fastest([[points_N] for points_N in rounds])[0]


def _shortened(wanted: int, measured: int) -> str:
    """What the user is told of a profile that would have taken too long."""
    left_out = f", and the {wanted - measured} longest of {wanted} are left out"
    return (
        f"With experts of this size a round takes long. Batches of over {expert_probe.SECONDS} s "
        f"are timed once in each round instead of {expert_probe.MIN_REPEATS} times"
        f"{left_out if measured < wanted else ''}."
    )


def ranks_of(
    points_RSN: Sequence[Sequence[Sequence[Point]]],
    places: Sequence[str],
    extent: Extent = ON_CORES,
) -> list[RankProfile]:
    """The entries of the file, from the points of each round and rank."""
    per_rank = zip(places, curves(points_RSN, extent.forms), fastest(points_RSN), strict=True)
    return [
        RankProfile(rank=rank, place=place, curve=Curve.of(found), points=points)
        for rank, (place, found, points) in enumerate(per_rank)
    ]


def _print(measured: Profile) -> None:
    table = Table(title=escape(f"{measured.shape.name} on {measured.device}"))
    headings = ("rank", "form", "fixed us", "us per expert", "us per token", "knee")
    for heading in (*headings, "median error", "R2"):
        table.add_column(heading, justify="right")
    for rank in measured.ranks:
        curve = rank.curve
        numbers = (curve.a_us, curve.b_us, curve.model.token_us)
        knee = "none" if curve.knee_tokens is None else f"{curve.knee_tokens:.1f}"
        table.add_row(
            str(rank.rank),
            form_of(curve.model),
            *(f"{number:.1f}" for number in numbers),
            knee,
            f"{curve.median_relative_error:.1%}",
            f"{curve.r2:.3f}",
        )
    Console().print(table)
    if contention := measured.contention:
        few, many = min(contention), max(contention)
        say(
            f"Beside the other ranks, rank 0 takes {contention[few]:.2f} times as long as alone "
            f"with {few:.0f} tokens per expert, and {contention[many]:.2f} times with {many:.0f}."
        )
    worst = max(rank.curve.median_relative_error for rank in measured.ranks)
    if worst > GOOD_FIT:
        say(
            f"A median error of {worst:.0%} is more than {GOOD_FIT:.0%}: something else probably "
            f"ran on these cores. Measure again on a quiet machine.",
            "yellow",
        )


def form_of(model: CostModel) -> str:
    """How the experts of a rank share its time, in words for a table."""
    how = "in turn" if model.in_turn else "together"
    if model.tile_tokens is None:
        return how
    if model.tile_tokens == 1:
        return f"{how}, {model.free} tokens free"
    return f"{how}, tiles of {model.tile_tokens}"
