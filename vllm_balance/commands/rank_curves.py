"""From the measured rounds of all ranks to a curve per rank.

What else runs on a machine slows one rank for seconds or minutes, and a placement that takes that
for the rank's speed moves load to the wrong one. So a rank is slower than the others only if the
rounds, which are far apart, agree that it is. And ranks of one kind have one curve, stretched by
that: it has the points of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student

from vllm_balance.cost import FORMS, Fit, Form, agreed, describe, fit
from vllm_balance.profiles import Point

Array = np.ndarray[Any, np.dtype[Any]]
ROUNDS = (3, 6)
"""Times that every batch is measured, far apart: at least, and at most if there is time."""
CERTAIN = 0.95
"""Confidence with which a rank must be slower or faster than the mean to count as such."""
OWN_CURVE = 0.5
"""A rank has a curve of its own if that misses its points by less than this share of what the
common one does: another kind of device."""


def fastest(points_RSN: Sequence[Sequence[Sequence[Point]]]) -> list[list[Point]]:
    """The fastest round of each rank and batch: what else runs on a machine only ever adds time."""
    return [
        [_fastest(rounds) for rounds in zip(*points_RN, strict=True)]
        for points_RN in zip(*points_RSN, strict=True)
    ]


def _fastest(rounds: Sequence[Point]) -> Point:
    """The fastest round of one batch; keeps the times of all."""
    best = min(rounds, key=lambda point: point.time_us)
    return best.model_copy(update={"rounds_us": [point.time_us for point in rounds]})


def slowness(points_RSN: Sequence[Sequence[Sequence[Point]]]) -> Array:
    """Time of each rank over that of the mean rank, [S]; 1 for all if the rounds do not agree.

    Per round the median over batches, of which every rank has the same; then Student's t over
    rounds, at least two, for each rank.
    """
    time_RSN = np.array([[[p.time_us for p in rank] for rank in ranks] for ranks in points_RSN])
    log_RS = np.median(np.log(time_RSN / time_RSN.mean(1, keepdims=True)), axis=2)
    slowness_S = np.exp(agreed(log_RS, student.ppf((1 + CERTAIN) / 2, len(log_RS) - 1)))
    return np.asarray(slowness_S / slowness_S.mean())


def curves(
    points_RSN: Sequence[Sequence[Sequence[Point]]], forms: Sequence[Form] = FORMS
) -> list[Fit]:
    """The curve of each rank, of one of the forms, described by its fastest points.

    Raises:
        BalancerError: too few or useless points, see `vllm_balance.cost.fit`.
    """
    slowness_S = slowness(points_RSN)
    points_SN = fastest(points_RSN)
    tokens = [np.array(point.tokens_E) for points in points_SN for point in points]
    even_us = [
        point.time_us / slow
        for points, slow in zip(points_SN, slowness_S, strict=True)
        for point in points
    ]
    common = fit(tokens, np.array(even_us), forms).model
    found = []
    for points, slow in zip(points_SN, slowness_S, strict=True):
        tokens_NE = [np.array(point.tokens_E) for point in points]
        time_us_N = np.array([point.time_us for point in points])
        own, shared = (
            fit(tokens_NE, time_us_N, forms),
            describe(common.slowed(slow), tokens_NE, time_us_N),
        )
        is_another = own.median_relative_error < OWN_CURVE * shared.median_relative_error
        found.append(own if is_another else shared)
    return found
