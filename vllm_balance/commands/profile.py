"""``vllm-balance profile``: the measured cost curve of every rank, as a file."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_balance import documents, model_shape, profiles
from vllm_balance.commands import pictures
from vllm_balance.commands.expert_probe import Probe, probing
from vllm_balance.commands.installed import require_vllm
from vllm_balance.commands.printing import progress, say
from vllm_balance.commands.profile_check import check_profile
from vllm_balance.commands.rank_curves import ROUNDS, curves, fastest
from vllm_balance.cost import GROUPED, CostModel
from vllm_balance.errors import BalancerError
from vllm_balance.model_shape import ModelShape
from vllm_balance.profiles import Curve, Point, Profile, RankProfile, Units
from vllm_balance.seams.device import device_name, kernel_isa, served_dtype
from vllm_balance.seams.versions import kernel_versions

COARSE = (1, 4, 16, 64)
"""Tokens per expert of the first samples, which find the knee."""
AROUND_KNEE = (0.5, 0.7, 1.0, 1.4, 2.0, 4.0)
"""Further samples, as multiples of the knee found."""
MAX_EXPERTS = 64
"""Of one rank that are held in memory if nothing else is asked for."""
MAX_TOKENS = 6144
"""Pairs of the largest sample on one rank."""
TILED = 16
"""Experts of the samples on both sides of where a grouped kernel may begin another tile."""
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
        int | None, typer.Option(min=1, help="Ranks measured at once.", show_default="2")
    ] = None,
    cores_per_rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="Cores that each rank computes with, as it will serve.", show_default="1"
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
        check_profile(stored, cores_of(len(stored.ranks), stored.cores_per_rank))
        return
    output = output or DEFAULT_OUTPUT
    documents.require_new(
        output, "profile", force, f"; `--check {output}` tells whether it still holds"
    )
    if plot is not None:
        pictures.require_drawable(plot)
    shape = shape.model_copy(update={"dtype": served_dtype(dtype, shape.dtype)})
    begun = time.monotonic()
    measured = measure_ranks(shape, ranks or 2, cores_per_rank or 1, experts)
    documents.write(output, measured)
    _print(measured)
    say(f"Measured in {time.monotonic() - begun:.0f} s. Wrote {output}.")
    if plot is not None:
        pictures.draw_profile(measured, plot)
        say(f"Wrote {plot}.")


def measure_ranks(
    shape: ModelShape, ranks: int, cores_per_rank: int, experts: int | None
) -> Profile:
    """Measures all ranks at once and fits their curves.

    Args:
        experts: held by each rank; None: its share, at most MAX_EXPERTS.

    Raises:
        BalancerError: too few cores, more experts than samples have tokens for, or a rank died.
    """
    cores_S, isa = cores_of(ranks, cores_per_rank), kernel_isa(shape.dtype)
    if experts is not None and experts * COARSE[1] > MAX_TOKENS:
        raise BalancerError(
            f"--experts asks for {experts} experts on each rank, and samples have at most "
            f"{MAX_TOKENS} tokens, {COARSE[1]} and more for each expert. Allowed are up to "
            f"{MAX_TOKENS // COARSE[1]}."
        )
    local = experts or min(-(-shape.num_experts // ranks), MAX_EXPERTS)
    with probing(shape, isa, cores_S, local) as probe:
        points_RSN = sample(probe, local)
    return Profile(
        units=Units(),
        created=datetime.now(UTC),
        device=device_name(shape.dtype),
        versions=kernel_versions(),
        shape=shape,
        cores_per_rank=cores_per_rank,
        ranks=ranks_of(points_RSN, [_place(cores) for cores in cores_S]),
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


def _place(cores: Sequence[int]) -> str:
    """Where a rank ran, in words for the file."""
    return f"core{'s' if len(cores) > 1 else ''} {', '.join(map(str, cores))}"


def sample(probe: Probe, local: int) -> list[list[list[Point]]]:
    """Points of each round and rank, the same batches in each: few far from the knee, many around
    it, and skewed ones.
    """
    begun = time.monotonic()
    with progress() as bar:
        task = bar.add_task("finding the knee", total=None)

        def measure(tokens_E: Sequence[int]) -> list[Point]:
            timings = probe.measure(tokens_E)
            bar.advance(task)
            return [Point(tokens_E=list(tokens_E), time_us=timing.time_us, repeats=timing.repeats)
                    for timing in timings]  # fmt: skip

        points_NS = [measure([n] * local) for n in COARSE if n * local <= MAX_TOKENS]
        batches = grid(local, _knee([points_S[0] for points_S in points_NS]))
        least, most = ROUNDS
        each = len(points_NS) + len(batches)
        bar.update(task, description="around the knee", total=least * each)
        rounds = [points_NS + [measure(tokens_E) for tokens_E in batches]]
        while len(rounds) < least or (len(rounds) < most and time.monotonic() - begun < SECONDS):
            total = each * max(least, len(rounds) + 1)
            bar.update(task, description=f"round {len(rounds) + 1}", total=total)
            rounds.append([measure(points_S[0].tokens_E) for points_S in rounds[0]])
    return [[list(points_N) for points_N in zip(*points_NS, strict=True)] for points_NS in rounds]


def grid(local: int, knee: float) -> list[list[int]]:
    """Batches, as tokens of each activated expert, around a knee and on both sides of tiles; each
    once, none of the first samples, none above MAX_TOKENS.
    """
    around = sorted({max(1, round(knee * factor)) for factor in AROUND_KNEE} - set(COARSE))
    batches = [[n] * local for n in around]
    for activated in sorted({max(1, local // 2), max(1, local // 4), max(1, local // 16)}):
        counts = sorted({1, *(max(1, round(knee * factor)) for factor in (0.5, 1.0, 2.0, 8.0))})
        batches += [[n] * activated for n in counts]
    for tile in (tile for tile, *_ in GROUPED if tile):
        batches += [[n] * min(local, TILED) for n in (tile, tile + 1)]
    for mean in sorted({max(2.0, knee / 2), max(3.0, 2 * knee), max(4.0, 4 * knee)}):
        for activated in {local, max(1, local // 2)}:
            weight = 1 / np.arange(1, activated + 1)
            tokens = np.maximum(1, np.round(mean * activated * weight / weight.sum()))
            batches.append(tokens.astype(int).tolist())
    known = {(n,) * local for n in COARSE}
    new = [batch for batch in dict.fromkeys(map(tuple, batches)) if batch not in known]
    return [list(batch) for batch in new if sum(batch) <= MAX_TOKENS]


def _knee(points: Sequence[Point]) -> float:
    """A first guess from evenly loaded samples: where the last slope reaches the first level."""
    first, last, before = points[0], points[-1], points[-2]
    rise = last.time_us - before.time_us
    slope = max(rise / (sum(last.tokens_E) - sum(before.tokens_E)), 1e-6)
    knee = first.time_us / slope / len(first.tokens_E)
    return float(np.clip(knee, 1, 128))


def ranks_of(
    points_RSN: Sequence[Sequence[Sequence[Point]]], places: Sequence[str]
) -> list[RankProfile]:
    """The entries of the file, from the points of each round and rank."""
    per_rank = zip(places, curves(points_RSN), fastest(points_RSN), strict=True)
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
