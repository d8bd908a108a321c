"""What a simulated run comes to.

Symbols, used in names and in docs/simulator.md. Of one layer, one step and one rank s: G_s
activated physical experts, N_s pairs, t_s time of its experts. Of one layer and step::

    t_layer = t_exchange + t_decide + t_dispatch + max over s of t_s + t_combine

Of one step, all in microseconds::

    t_step = t_attention + t_rest + sum over layers of t_layer
    lambda = sum over layers of max over s of G_s        (experts on the worst rank)
    N_max  = sum over layers of max over s of N_s        (tokens on the worst rank)

Of a run: waiting share W = 1 - mean over ranks / max over ranks of t_s, summed over layers and
steps first; TTFT = t_request + requests ahead * t_ahead + end of the step with the first token -
arrival; TPOT = mean t_step from a request's first token to its last; X = tokens that come out /
time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_balance.simulate.serving import Steps

Array = np.ndarray[Any, np.dtype[Any]]
STAGES = ("attention", "exchange", "decide", "dispatch", "experts", "combine", "rest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Times of every step by stage, and what follows for requests."""

    steps: Steps
    stage_us: dict[str, Array]
    """Of each step, [N], by the names in STAGES."""
    busy_us_N: Array
    """Mean over ranks of the experts' time, summed over layers."""
    activated_N: Array
    """lambda."""
    pairs_N: Array
    """N_max."""
    request_us: float
    """Part of TTFT that no step is responsible for."""
    request_ahead_us: float
    """More of it for each request that arrived with this one and is ahead of it."""
    redundant_bytes: float
    """Memory that redundant experts take on each rank."""

    @property
    def step_us_N(self) -> Array:
        """t_step."""
        return np.asarray(sum(self.stage_us[stage] for stage in STAGES))

    @property
    def tpot_us(self) -> float:
        """Mean t_step over tokens of decoding requests; nan if none decoded."""
        weight = self.steps.decode_N
        return float((self.step_us_N * weight).sum() / weight.sum()) if weight.any() else np.nan

    def ttft_us_at(self, quantile: float) -> float:
        """Quantile of TTFT over requests that arrived; nan if none got a token."""
        end_N = np.concatenate([[0.0], np.cumsum(self.step_us_N)])
        arrived, first = self.steps.arrived_R, self.steps.first_R
        counted = (arrived >= 0) & (first >= 0)
        if not counted.any():
            return float("nan")
        spans = end_N[first[counted] + 1] - end_N[arrived[counted]]
        spans = spans + self.request_ahead_us * _ahead(arrived[counted])
        return float(np.quantile(spans, quantile)) + self.request_us

    @property
    def tokens_per_s(self) -> float:
        """X."""
        return float(1e6 * self.steps.sampled_N.sum() / self.step_us_N.sum())

    @property
    def waiting_share(self) -> float:
        """W."""
        return float(1 - self.busy_us_N.sum() / self.stage_us["experts"].sum())


def _ahead(arrived_R: Array) -> Array:
    """How many requests before this one, in the order given, arrived in the same step, [R]."""
    order_R = np.argsort(arrived_R, kind="stable")
    sorted_R = arrived_R[order_R]
    ahead_R = np.empty_like(arrived_R)
    ahead_R[order_R] = np.arange(len(sorted_R)) - np.searchsorted(sorted_R, sorted_R)
    return ahead_R
