"""``vllm-balance profile --check``: whether a stored profile still describes the ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import typer

from vllm_balance.commands.expert_probe import Probe, probing_kernels
from vllm_balance.commands.printing import say
from vllm_balance.commands.profiled_ranks import Ranks
from vllm_balance.commands.rank_curves import ROUNDS
from vllm_balance.profiles import Profile

POINTS = 6
"""Stored points that are measured again, or a few more: fast, slow and between."""
BETWEEN_RANKS = 0.05
"""How much time one rank may have gained on another."""
TOGETHER = 0.10
"""How much faster or slower all ranks together may have become."""


def check_profile(stored: Profile, ranks: Ranks) -> None:
    """Measures a few stored points again and prints how the ranks have moved.

    Args:
        ranks: as many as the profile has.

    Raises:
        BalancerError: too little memory, or a rank died.
        typer.Exit: status 1 if the profile no longer holds.
    """
    points = stored.ranks[0].points
    local = max(len(point.tokens_E) for point in points)
    by_time = sorted(range(len(points)), key=lambda i: points[i].time_us)
    chosen = by_time[:: max(1, len(points) // POINTS)]
    with probing_kernels(ranks.kernels(stored.shape, local)) as probe:
        time_us_NS = measure_again(probe, [points[i].tokens_E for i in chosen])
    ratio_S = deviations(stored, chosen, time_us_NS)
    for rank, ratio in enumerate(ratio_S):
        say(f"rank {rank}: {ratio - 1:+.1%} against the profile")
    problem = moved(ratio_S)
    if problem is not None:
        say(problem, "red")
        raise typer.Exit(1)
    say(
        f"The profile still holds: between ranks within {BETWEEN_RANKS:.0%}, all together within "
        f"{TOGETHER:.0%}.",
        "green",
    )


def moved(ratio_S: Sequence[float]) -> str | None:
    """Why a profile no longer holds, or None.

    Placements go by the ratios between ranks, which a rank that became slow changes and a machine
    that is slower today does not; what is derived from a rank's own times needs both.

    Args:
        ratio_S: new over stored time of each rank.
    """
    slow, fast = int(np.argmax(ratio_S)), int(np.argmin(ratio_S))
    between = ratio_S[slow] / ratio_S[fast] - 1
    if between > BETWEEN_RANKS:
        return (
            f"Rank {slow} has become {between:.1%} slower against rank {fast}, and placements go "
            f"by such ratios. If a second check says so too, measure the profile anew, and make "
            f"maps from it anew."
        )
    together = float(np.mean(ratio_S)) - 1
    if abs(together) > TOGETHER:
        changed = f"{abs(together):.0%} {'slower' if together > 0 else 'faster'}"
        return (
            f"The machine as a whole is {changed} than in the profile. The ratios between ranks "
            f"hold, so maps made from it stay good; for its times measure it anew."
        )
    return None


def measure_again(probe: Probe, batches: Sequence[Sequence[int]]) -> list[list[float]]:
    """Time of each batch on each rank, [N, S] us: the fastest of as many rounds as a profile has at
    least, as its points are.

    Args:
        batches: tokens of each activated expert, for each batch.
    """
    rounds = [[probe.measure(tokens_E) for tokens_E in batches] for _ in range(ROUNDS[0])]
    return [
        [min(timing.time_us for timing in timings_R) for timings_R in zip(*timings_RS, strict=True)]
        for timings_RS in zip(*rounds, strict=True)
    ]


def deviations(
    stored: Profile, chosen: Sequence[int], time_us_NS: Sequence[Sequence[float]]
) -> list[float]:
    """Median of new over stored time of the chosen points, for each rank."""
    return [
        float(
            np.median(
                [
                    times_S[rank.rank] / rank.points[i].time_us
                    for i, times_S in zip(chosen, time_us_NS, strict=True)
                ]
            )
        )
        for rank in stored.ranks
    ]
