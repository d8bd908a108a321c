"""Time of one layer's experts on a rank: from a roofline, or from a measured profile.

Both come down to two sums over the rank's activated experts, of which the larger one counts::

    t_s = max(a + sum of stream(n_p), c + sum of compute(n_p))

A GPU runs all experts in one grouped kernel, where those that wait for weights and those that
compute overlap. A CPU core runs one expert after the other; its measured time per expert is all in
`stream`, and `compute` is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vllm_balance.cost import CostModel
from vllm_balance.profiles import Profile, RankProfile
from vllm_balance.simulate.hardware import Hardware
from vllm_balance.simulate.machine_speed import AS_PROFILED, MachineSpeed
from vllm_balance.simulate.models import Model

Array = np.ndarray[Any, np.dtype[Any]]
TABLE = 8192
"""Tokens of one expert up to which times are tabled; beyond, the last slope goes on."""
KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
"""Tokens between which a measured expert's time is taken to be straight."""
_OUTLIER = 0.05
_MANY = 8
"""Tokens of an expert from which they decide about its time, not its weights."""
_EVEN = 0.3
"""Beyond _MANY tokens, where points are few, a token that takes twice as long between two knots as
between the two before counts as much as a point that is missed by this share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTimes:
    """Times in microseconds, a row per kind of rank; entry n of a table is of n tokens."""

    fixed_S2: Array
    """a and c."""
    stream_SN: Array
    compute_SN: Array
    contention_N: Array | None = None
    """How many times longer an expert takes while all ranks are busy, which the tables are of, than
    on one rank alone; None: as long."""

    def of(self, tokens_LP: Array, num_ranks: int) -> tuple[Array, Array, Array]:
        """Time, activated experts and pairs of each rank in each layer, three [L, S].

        tokens_LP: pairs of each slot, int32 [L, P]; a rank's slots are consecutive.
        """
        from vllm_balance.simulate.rank_times import rank_times

        tables = (self.fixed_S2, self.stream_SN, self.compute_SN)
        beside_LS, alone_LS, activated_LS, pairs_LS = rank_times(
            tokens_LP, num_ranks, *tables, self.contention_N
        )
        time_LS = beside_LS if self.contention_N is None else sharing(beside_LS, alone_LS)
        return time_LS, activated_LS, pairs_LS

    def slowest(self, slowness: Sequence[float], tokens_N: Array) -> Array:
        """How many times longer products of so many tokens take, each on all ranks, where each rank
        takes so many times as long and is alone once the others are done, [N].

        A product streams its weights once, as an expert with as many tokens does.
        """
        if len(set(slowness)) == 1 or self.contention_N is None:
            return np.full(len(tokens_N), max(slowness))
        longer_NS = np.tile(slowness, (len(tokens_N), 1))
        contention_N = self.contention_N[np.minimum(tokens_N, TABLE).astype(np.int64)]
        return sharing(longer_NS, longer_NS / contention_N[:, None]).max(1)

    def at(self, speed: float) -> ExpertTimes:
        """The same at a share of the speed."""
        return replace(
            self,
            fixed_S2=self.fixed_S2 / speed,
            stream_SN=self.stream_SN / speed,
            compute_SN=self.compute_SN / speed,
        )

    def on(self, speed: MachineSpeed) -> ExpertTimes:
        """The same while the machine takes so many times longer."""
        if speed == AS_PROFILED:
            return self
        tokens_N = np.arange(TABLE + 1)
        longer_N, crowding_N = speed.at(tokens_N), speed.crowding(tokens_N)
        before_N = np.ones(TABLE + 1) if self.contention_N is None else self.contention_N
        return replace(
            self,
            fixed_S2=self.fixed_S2 * speed.memory,
            stream_SN=self.stream_SN * longer_N,
            compute_SN=self.compute_SN * longer_N,
            contention_N=before_N * crowding_N,
        )

    def slowed(self, slowness: Sequence[float], num_ranks: int) -> ExpertTimes:
        """The same where each rank takes so many times as long; one number stands for all."""
        if len(set(slowness)) == 1:
            return self.at(1 / slowness[0])
        kind_S = np.arange(num_ranks) % len(self.fixed_S2)
        longer_S1 = np.array(slowness)[:, None]
        return replace(
            self,
            fixed_S2=self.fixed_S2[kind_S] * longer_S1,
            stream_SN=self.stream_SN[kind_S] * longer_S1,
            compute_SN=self.compute_SN[kind_S] * longer_S1,
        )

    def of_size(self, size: float) -> ExpertTimes:
        """The same for experts with so many times the weights: streaming them and multiplying by
        them take so many times as long."""
        return replace(self, stream_SN=self.stream_SN * size, compute_SN=self.compute_SN * size)

    def curves(self, num_ranks: int) -> tuple[CostModel, ...]:
        """The two-piece curve of each rank, by which placements weigh experts and tokens."""
        rows = zip(self.fixed_S2, self.stream_SN, self.compute_SN, strict=True)
        kinds = [_curve(*row) for row in rows]
        return tuple(kinds[rank % len(kinds)] for rank in range(num_ranks))

    @property
    def knee_tokens(self) -> float:
        """Tokens per active expert from which a rank computes: what a profile tells production.

        Time of an expert with one token, over the time of a further token in a large batch.
        """
        table_N = self.compute_SN[0] if self.compute_SN.any() else self.stream_SN[0]
        return float(self.stream_SN[0, 1] / _token_us(table_N))

    @property
    def free_tokens(self) -> float:
        """Tokens that an expert which is computed in turn takes no further time for.

        From the line that its time follows for many tokens, by relative least squares.
        """
        return _free_tokens(self.stream_SN[0])


def _token_us(table_N: Array) -> float:
    """Time of one more token in a large batch."""
    few, many = KNOTS[-2], KNOTS[-1]
    return float((table_N[many] - table_N[few]) / (many - few))


def _free_tokens(table_N: Array) -> float:
    """See `ExpertTimes.free_tokens`."""
    many_K = np.array([k for k in KNOTS if k >= _MANY])
    time_K = table_N[many_K]
    design = np.stack([np.ones(len(many_K)), many_K], axis=1) / time_K[:, None]
    (start_us, token_us), *_ = np.linalg.lstsq(design, np.ones(len(many_K)), rcond=None)
    return float(max(0.0, (table_N[1] - start_us) / token_us))


def _curve(fixed_2: Array, stream_N: Array, compute_N: Array) -> CostModel:
    """Experts in one kernel: the larger of two pieces, tiles left out; else one after the other."""
    a_us, c_us = fixed_2.tolist()
    b_us = float(stream_N[1])
    if compute_N.any():
        return CostModel(a_us=a_us, b_us=b_us, c_us=c_us, beta_us=_token_us(compute_N))
    token_us = _token_us(stream_N)
    beta_us = min(float(stream_N[_MANY] - b_us) / (_MANY - 1), token_us)
    tile_us = token_us - beta_us
    free = (_free_tokens(stream_N) * token_us - beta_us) / tile_us if tile_us else 0.0
    return CostModel(
        a_us=a_us,
        b_us=b_us - beta_us,
        c_us=0.0,
        beta_us=beta_us,
        tile_us=tile_us,
        tile_tokens=1,
        free_tokens=max(1, round(free)),
        in_turn=True,
    )


def roofline(model: Model, hardware: Hardware) -> ExpertTimes:
    """Every expert streams its weights, in tiles of tokens; arithmetic hides behind that."""
    n = np.arange(TABLE + 1, dtype=np.float64)
    share = hardware.efficiency
    per_us = hardware.memory_bandwidth.per_us * share.expert_streaming.value
    tiles = np.ceil(n / hardware.tiles.stream_tokens.value)
    again = hardware.tiles.stream_share.value * np.maximum(tiles - 1, 0)
    moved = n * 2 * (2 * model.hidden.value + model.expert_matrices.value * model.inner.value)
    stream = np.where(n > 0, (1 + again) * model.expert_bytes + moved, 0) / per_us
    height = hardware.tiles.compute_tokens.value
    flop = 2 * model.expert_weights * np.ceil(n / height) * height
    peak = hardware.peak(model.expert_number).per_us * share.expert_compute.value
    compute, fixed = flop / peak, hardware.fixed.experts.value
    if hardware.experts == "in_turn":
        stream = np.maximum(stream, share.expert_exposed.value * stream + compute)
        compute = np.zeros_like(stream)
    return ExpertTimes(
        fixed_S2=np.array([[fixed, fixed]]), stream_SN=stream[None], compute_SN=compute[None]
    )


def measured(profile: Profile) -> ExpertTimes:
    """One expert after the other, each with the time that the profile's points tell."""
    rows = [_expert_times(rank) for rank in profile.ranks]
    return ExpertTimes(
        fixed_S2=np.array([[fixed, 0.0] for fixed, _ in rows]),
        stream_SN=np.stack([table_N for _, table_N in rows]),
        compute_SN=np.zeros((len(rows), TABLE + 1)),
        contention_N=_contention(profile.contention),
    )


def _contention(measured: dict[float, float]) -> Array | None:
    """`ExpertTimes.contention_N`: straight in the logarithm of tokens between those measured."""
    if not measured:
        return None
    tokens_K = sorted(measured)
    n = np.maximum(np.arange(TABLE + 1), 1)
    return np.interp(np.log(n), np.log(tokens_K), [measured[tokens] for tokens in tokens_K])


def sharing(time_LS: Array, alone_LS: Array) -> Array:
    """Time of each rank that shares memory with the others until they are done, [L, S].

    Ranks begin together. From its time while all are busy to its time alone a rank gets faster by
    the same step with each one that is done. Never longer than the one, never shorter than the
    other.

    Args:
        time_LS: while all ranks are busy throughout.
        alone_LS: while no other is.
    """
    num_ranks = time_LS.shape[1]
    order_LS = np.argsort(time_LS, axis=1, kind="stable")
    sorted_LS, sorted_alone_LS = (
        np.take_along_axis(each, order_LS, axis=1) for each in (time_LS, alone_LS)
    )
    gap_LS = np.diff(sorted_LS, axis=1, prepend=0)
    beside_S = np.arange(num_ranks)[::-1] / max(num_ranks - 1, 1)
    crowded_LS = np.cumsum(gap_LS * beside_S, axis=1)
    share_LS = np.divide(
        sorted_alone_LS, sorted_LS, out=np.ones_like(sorted_LS), where=sorted_LS > 0
    )
    found_LS = np.empty_like(time_LS)
    shared_LS = share_LS * sorted_LS + (1 - share_LS) * crowded_LS
    np.put_along_axis(found_LS, order_LS, shared_LS, axis=1)
    return found_LS


def _expert_times(rank: RankProfile) -> tuple[float, Array]:
    """(fixed time, table of one expert's time): rising, straight between KNOTS, robust fit."""
    from scipy.optimize import nnls

    most = max(max(point.tokens_E) for point in rank.points)
    knots_K = np.array(
        [1, *(k for k, below in zip(KNOTS[1:], KNOTS, strict=False) if below < most)]
    )
    design = np.array(
        [np.append(_rises(np.array(p.tokens_E), knots_K).sum(0), 1.0) for p in rank.points]
    )
    time_us = np.array([point.time_us for point in rank.points])
    relative = design / time_us[:, None]
    even = _evenness(knots_K, rank)
    weight = np.ones(len(time_us))
    for _ in range(30):
        rows = np.concatenate([relative * weight[:, None], even])
        found, _ = nnls(rows, np.concatenate([weight, np.zeros(len(even))]))
        residual = relative @ found - 1
        weight = 1 / np.sqrt(1 + (residual / _OUTLIER) ** 2)
    table = _rises(np.arange(TABLE + 1), knots_K) @ found[:-1]
    table[0] = 0.0
    return float(found[-1]), table


def _evenness(knots_K: Array, rank: RankProfile) -> Array:
    """What the fit should make zero: by how much a token's time changes at each knot, as shares.

    A row for each knot between two pieces, zero below _MANY; columns are the fit's: the first knot,
    each piece, the fixed time.
    """
    token_us = min(point.time_us / sum(point.tokens_E) for point in rank.points)
    share = np.diag(_EVEN / (np.diff(knots_K) * token_us))
    change = np.diff(share, axis=0) * (knots_K[1:-1, None] >= _MANY)
    return np.pad(change, ((0, 0), (1, 1)))


def _rises(tokens_N: Array, knots_K: Array) -> Array:
    """How far an expert with n tokens has come: 1 for the first knot, then a share of each piece.

    [N, K]; the last piece, which holds the largest measured number of tokens, goes on for ever.
    """
    share = (tokens_N[:, None] - knots_K[:-1]) / np.diff(knots_K)
    share = np.maximum(share, 0)
    share[:, :-1] = np.minimum(share[:, :-1], 1)
    return np.concatenate([np.ones((len(tokens_N), 1)), share], axis=1)
