"""What a simulated run comes to.

Symbols, used in names and in docs/simulator.md. Of one layer, one step and one rank s: G_s
activated physical experts, N_s pairs, t_s time of its experts. Of one layer and step::

    t_layer = t_exchange + t_decide + t_dispatch + max over s of t_s + t_combine

Of one step, all in microseconds::

    t_step = t_attention + t_rest + sum over layers of t_layer
    lambda = sum over layers of max over s of G_s        (experts on the worst rank)
    N_max  = sum over layers of max over s of N_s        (tokens on the worst rank)

Of a run, whose simulated steps count as often as there are steps of the load that they stand for:
waiting share W = 1 - mean over ranks / max over ranks of t_s, summed over layers and steps first;
TTFT = t_request + requests beside * t_beside + end of the step with the first token - arrival;
TPOT = mean t_step from a request's first token to its last; X = tokens that come out / time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_balance.simulate.steps import Steps

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
    request_beside_us: float
    """More of it for each other request that arrived with this one."""
    redundant_bytes: float
    """Memory that redundant experts take on each rank."""

    @property
    def step_us_N(self) -> Array:
        """t_step."""
        return np.asarray(sum(self.stage_us[stage] for stage in STAGES))

    def mean(self, values_N: Array) -> float:
        """Mean over the steps of the load of what the simulated steps have, [N]."""
        return float(np.average(values_N, weights=self.steps.times_N))

    @property
    def tpot_us(self) -> float:
        """Mean t_step over tokens of decoding requests; nan if none decoded."""
        weight = self.steps.decode_N * self.steps.times_N
        return float((self.step_us_N * weight).sum() / weight.sum()) if weight.any() else np.nan

    def tpot_us_at(self, quantile: float) -> float:
        """Quantile over requests of the mean t_step from a request's first token to its last; nan
        if none of several tokens ended.

        Unlike `tpot_us` it leaves out what few requests wait for, as those of a burst do whose
        prompts are computed before the others'.
        """
        end_M, first_R, last_R = self._end_us_M, self.steps.first_R, self.steps.last_R
        ended_R = (last_R > first_R) & (last_R < len(self.steps.like_M))
        if not ended_R.any():
            return float("nan")
        first_R, last_R = first_R[ended_R], last_R[ended_R]
        spans_R = end_M[last_R + 1] - end_M[first_R + 1]
        return float(np.quantile(spans_R / (last_R - first_R), quantile))

    @property
    def _end_us_M(self) -> Array:
        """When each step of the load begins, and at last when the last one ends."""
        return np.concatenate([[0.0], np.cumsum(self.step_us_N[self.steps.like_M])])

    def ttft_us_at(self, quantile: float) -> float:
        """Quantile of TTFT over requests that got their first token; nan if there is none.

        Steps before the first one are taken to be as long as the mean of those that are there.
        """
        end_M = self._end_us_M
        arrived_R, first_R = self.steps.arrived_R, self.steps.first_R
        if not len(first_R):
            return float("nan")
        before_R = np.minimum(arrived_R, 0) * end_M[-1] / (len(end_M) - 1)
        spans_R = end_M[first_R + 1] - end_M[np.maximum(arrived_R, 0)] - before_R
        _, came_R, number_R = np.unique(arrived_R, return_inverse=True, return_counts=True)
        spans_R = spans_R + self.request_beside_us * (number_R[came_R] - 1)
        return float(np.quantile(spans_R, quantile)) + self.request_us

    @property
    def tokens_per_s(self) -> float:
        """X."""
        return 1e6 * self.mean(self.steps.sampled_N) / self.mean(self.step_us_N)

    @property
    def waiting_share(self) -> float:
        """W."""
        return 1 - self.mean(self.busy_us_N) / self.mean(self.stage_us["experts"])
