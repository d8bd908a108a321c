"""The ranks that ``vllm-balance place`` places experts on: measured curves, or assumed ones."""

from __future__ import annotations

import math
from pathlib import Path

from vllm_balance import profiles
from vllm_balance.cost import GPU_KNEE_TOKENS, CostModel
from vllm_balance.errors import BalancerError
from vllm_balance.model_shape import ModelShape, from_config


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
