"""What one MoE layer costs on one rank: a curve with two pieces, fitted to measured points.

A rank that serves few tokens per expert waits for weights, one that serves many computes
(TEMPO, arXiv 2608.13057, section 3)::

    time = max(a + b * activated + b2 * further, c + beta * tokens)

``tokens`` counts (token, choice) pairs on the rank. ``further`` counts what an expert needs beyond
being streamed once, summed over the rank's experts: ceil(max(n - free, 0) / tile) of an expert with
n tokens. A grouped kernel overlaps experts and streams an expert's weights again for every further
tile of tokens, so that free = tile. One core computes its experts in turn, so that nothing hides
behind another expert, and both pieces add up: free are the tokens that an expert's own streaming
all but hides, beta is what each token costs all the same, c is 0, and tile = 1, or as many tokens
as the core's matrix units take at once. All times are in microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vllm_balance.errors import BalancerError

Array = np.ndarray[Any, np.dtype[Any]]
Form = tuple[int | None, int | None, bool]
"""(tile_tokens, free_tokens, in_turn) of a curve."""
PLAIN: Form = (None, None, False)
GROUPED: tuple[Form, ...] = tuple((tile, tile, False) for tile in (16, 32, 64, 128))
IN_TURN: tuple[Form, ...] = tuple(
    (1, free, True) for free in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
)
IN_TURN += ((16, 16, True), (32, 32, True))
FORMS = (PLAIN, *GROUPED, *IN_TURN)
"""What a fit tries."""
GPU_KNEE_TOKENS = 160.0
"""Knee of a datacentre GPU where nothing was measured: the middle of what TEMPO (arXiv 2608.13057)
reports for fp8."""
AMX_KNEE, CPU_KNEE = (43.0, 20.0), (4.0, 2.0)
"""Knee and free tokens of a core with and without AMX where nothing was measured: fitted to vLLM's
kernels with Qwen3-30B-A3B experts (docs/log.md)."""
_SPREAD = 0.05
"""Relative residual from which a point counts as an outlier rather than as noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Coefficients of one rank's curve, none negative."""

    a_us: float
    """Fixed time of the piece that waits for weights."""
    b_us: float
    """Time to stream the weights of one activated expert."""
    c_us: float
    """Fixed time of the piece that computes."""
    beta_us: float
    """Time to compute one (token, choice) pair; where experts run in turn, what is not hidden."""
    tile_us: float = 0.0
    """b2: time of each further tile of an expert that is activated anyway."""
    tile_tokens: int | None = None
    """Tokens in a further tile; None if the curve has no such term."""
    free_tokens: int | None = None
    """Tokens of an expert before further tiles begin; None: as many as a tile."""
    in_turn: bool = False
    """The rank computes one expert after the other."""

    @property
    def token_us(self) -> float:
        """Time of one more token in a large batch."""
        of_tiles = self.tile_us / self.tile_tokens if self.tile_tokens else 0.0
        return self.beta_us + of_tiles if self.in_turn else max(self.beta_us, of_tiles)

    @property
    def knee_tokens(self) -> float:
        """Tokens of an expert that take as long to compute as its weights to stream."""
        return self.first_us / self.token_us if self.token_us else float("inf")

    @property
    def first_us(self) -> float:
        """Time that an expert takes as soon as it has a token."""
        return self.b_us + self.beta_us if self.in_turn else self.b_us

    @property
    def hidden_tokens(self) -> float:
        """Tokens of an expert that its first one's time is enough for, measured by many; where
        experts run in turn. Of a last tile half is used on average."""
        tile = self.tile_tokens or 1
        hidden_us = self.beta_us + self.tile_us * max(self.free - (tile - 1) / 2, 0) / tile
        return hidden_us / self.token_us if self.token_us else 0.0

    @property
    def free(self) -> int:
        """Tokens of an expert before further tiles begin; 0 if the curve has none."""
        return self.free_tokens or self.tile_tokens or 0

    def further(self, tokens_E: Array) -> Array:
        """Further tiles of each expert, in the shape of `tokens_E`.

        An expert's tokens may be a fraction, where it is divided over replicas.
        """
        if self.tile_tokens is None:
            return np.zeros_like(tokens_E)
        beyond_E = np.maximum(tokens_E - self.free, 0)
        return beyond_E if self.tile_tokens == 1 else np.ceil(beyond_E / self.tile_tokens)

    def time_us(self, activated: Array, tokens: Array, further: Array | float = 0.0) -> Array:
        """Modelled time, in the shape of the arguments; 0 where there are no tokens."""
        memory = self.a_us + self.b_us * activated + self.tile_us * further
        compute = self.c_us + self.beta_us * tokens
        both = memory + compute if self.in_turn else np.maximum(memory, compute)
        return np.where(tokens > 0, both, 0.0)

    def of_experts(self, tokens_E: Array) -> float:
        """Modelled time of a rank whose experts get these tokens, [E]."""
        total, active = tokens_E.sum(), (tokens_E > 0).sum()
        return float(self.time_us(active, total, self.further(tokens_E).sum()))

    def slowed(self, factor: float) -> CostModel:
        """The curve of a rank that takes `factor` times as long, e.g. 1.08."""
        return replace(
            self,
            a_us=self.a_us * factor,
            b_us=self.b_us * factor,
            c_us=self.c_us * factor,
            beta_us=self.beta_us * factor,
            tile_us=self.tile_us * factor,
        )


def knee_of(costs: Sequence[CostModel]) -> float:
    """Tokens per activated expert at which the ranks' mean curve turns compute-bound, above 0."""
    token_us = sum(cost.token_us for cost in costs)
    knee = sum(cost.first_us for cost in costs) / token_us if token_us else float("inf")
    return max(knee, 1e-6)


def free_of(costs: Sequence[CostModel]) -> float | None:
    """Tokens of an expert that its first one's time is enough for, mean over ranks; None: experts
    overlap."""
    if not all(cost.in_turn for cost in costs):
        return None
    return sum(cost.hidden_tokens for cost in costs) / len(costs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A fitted curve and how well it describes its points."""

    model: CostModel
    residual_us_N: tuple[float, ...]
    """Modelled minus measured time of each point."""
    r2: float
    """Share of the variance of the measured times that the curve explains."""
    median_relative_error: float
    """Median over the points of abs(modelled - measured) / measured."""


def fit(tokens_NE: Sequence[Array], time_us_N: Array, forms: Sequence[Form] = FORMS) -> Fit:
    """The curve that describes measured times best, robust against a minority of outliers.

    Args:
        tokens_NE: for each point the tokens of each expert on the rank, at least one positive.
        time_us_N: measured time of each point, microseconds.
        forms: forms to try; one with more coefficients has to pay for its freedom (BIC).
    Raises:
        BalancerError: fewer than six points, no variety, or times that are not positive numbers.
    """
    time_us_N = np.asarray(time_us_N, dtype=np.float64)
    _check(tokens_NE, time_us_N)
    candidates = [_fit_form(tokens_NE, time_us_N, form) for form in forms]
    _, model = min(candidates, key=lambda candidate: candidate[0])
    return describe(model, tokens_NE, time_us_N)


def describe(model: CostModel, tokens_NE: Sequence[Array], time_us_N: Array) -> Fit:
    """How well a curve describes measured points, which are as in `fit`."""
    residual_N = np.array([model.of_experts(tokens_E) for tokens_E in tokens_NE]) - time_us_N
    spread = ((time_us_N - time_us_N.mean()) ** 2).sum()
    return Fit(
        model=model,
        residual_us_N=tuple(residual_N.tolist()),
        r2=float(1 - (residual_N**2).sum() / spread),
        median_relative_error=float(np.median(np.abs(residual_N) / time_us_N)),
    )


def agreed(log_MS: Array, t: float) -> Array:
    """Mean over M measurements of what S ranks differ by, [S]; 0 where they do not agree that a
    rank differs at all.

    Args:
        log_MS: logarithms of each rank's time over the typical rank's.
        t: Student's t of M - 1 degrees of freedom for the confidence that is wanted: so many
            standard errors must be between the mean and 0.
    """
    mean_S = log_MS.mean(0)
    error_S = log_MS.std(0, ddof=1) / np.sqrt(len(log_MS))
    return np.asarray(np.where(np.abs(mean_S) > t * error_S, mean_S, 0.0))


def _check(tokens_NE: Sequence[Array], time_us_N: Array) -> None:
    if len(tokens_NE) != len(time_us_N) or len(time_us_N) < 6:
        raise BalancerError(
            f"A cost curve was asked for from {len(tokens_NE)} points and {len(time_us_N)} times; "
            f"at least 6 of each are needed. Measure more with `vllm-balance profile`."
        )
    if not (np.isfinite(time_us_N).all() and (time_us_N > 0).all()):
        raise BalancerError("Measured times must be positive numbers; at least one is not.")
    if len({(int((t > 0).sum()), int(t.sum())) for t in tokens_NE}) < 4 or np.ptp(time_us_N) == 0:
        raise BalancerError(
            "The points of a cost curve hardly differ: at least 4 different pairs of activated "
            "experts and tokens and two different times are needed."
        )


def _fit_form(tokens_NE: Sequence[Array], time_us_N: Array, form: Form) -> tuple[float, CostModel]:
    """(BIC of the robust cost, best curve of this form) over several starts."""
    from scipy.optimize import least_squares

    tile_tokens, free_tokens, in_turn = form
    active_N = np.array([(t > 0).sum() for t in tokens_NE], dtype=np.float64)
    tokens_N = np.array([t.sum() for t in tokens_NE], dtype=np.float64)
    probe = CostModel(a_us=0, b_us=0, c_us=0, beta_us=0, tile_tokens=tile_tokens,
                      free_tokens=free_tokens, in_turn=in_turn)  # fmt: skip
    further_N = np.array([probe.further(t).sum() for t in tokens_NE])
    memory_N3 = np.stack([np.ones_like(active_N), active_N, further_N], axis=1) / time_us_N[:, None]
    compute_N2 = np.stack([np.ones_like(tokens_N), tokens_N], axis=1) / time_us_N[:, None]
    together = np.add if in_turn else np.maximum
    used_5 = np.array([True, True, tile_tokens is not None, not in_turn, True])
    mean_N = tokens_N / active_N
    knees = [np.inf] if in_turn else np.unique(np.quantile(mean_N, (0.1, 0.3, 0.5, 0.7, 0.9)))

    def coefficients(scaled: Array) -> Array:
        x = np.zeros(5)
        x[used_5] = scaled * unit_5[used_5]
        return x

    def relative(scaled: Array) -> Array:
        x = coefficients(scaled)
        return together(memory_N3 @ x[:3], compute_N2 @ x[3:]) - 1

    best_cost, best = np.inf, np.zeros(5)
    for knee in knees:
        start_5 = _alternate(memory_N3, compute_N2, mean_N <= knee)
        unit_5 = np.maximum(start_5, 1e-3 * time_us_N.min() / np.array([1, 1, 1, 1, 100]))
        start = (start_5 / unit_5)[used_5]
        found = least_squares(relative, start, bounds=(0, np.inf), loss="soft_l1", f_scale=_SPREAD)
        if found.cost < best_cost:
            best_cost, best = found.cost, coefficients(found.x)
    freedom = used_5.sum() + (tile_tokens is not None)
    bic = len(time_us_N) * np.log(max(best_cost, 1e-12)) + freedom * np.log(len(time_us_N))
    a_us, b_us, tile_us, c_us, beta_us = best.tolist()
    found = replace(probe, a_us=a_us, b_us=b_us, tile_us=tile_us, c_us=c_us, beta_us=beta_us)
    return bic, found


def _alternate(memory_N3: Array, compute_N2: Array, is_memory_N: Array) -> Array:
    """A start: fit each piece to its points, give each point to the larger piece, repeat."""
    from scipy.optimize import nnls

    x = np.zeros(5)
    for _ in range(20):
        if is_memory_N.any():
            x[:3] = nnls(memory_N3[is_memory_N], np.ones(is_memory_N.sum()))[0]
        if not is_memory_N.all():
            x[3:] = nnls(compute_N2[~is_memory_N], np.ones((~is_memory_N).sum()))[0]
        larger_N = memory_N3 @ x[:3] >= compute_N2 @ x[3:]
        if (larger_N == is_memory_N).all():
            break
        is_memory_N = larger_N
    return x
