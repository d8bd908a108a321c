"""ExFlow: experts that follow each other on the same rank (arXiv 2401.08383), as a baseline.

A token that uses expert e in one layer and e' in the next need not change ranks if both live on
one. The affinity of two experts of consecutive layers is the number of recorded tokens that use
both; the placement keeps as much affinity as possible on one rank, with equally many experts per
rank. Load is not looked at.

The whole model at once is an integer program whose relaxation says nothing (a share 1 / S of every
expert on every rank keeps all affinity), so it is solved layer by layer: with its neighbours fixed,
the best placement of a layer is a transport problem, which `scipy.optimize.milp` (HiGHS) solves
exactly. Sweeps over the layers go on until none improves; after the first one what is kept never
falls.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from vllm_balance.errors import BalancerError
from vllm_balance.placement.policy import Array, Cluster, Progress, refuse_redundant
from vllm_balance.traces import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class ExflowPlacement:
    """Placement by affinity. Pure as long as the time limit is not reached."""

    name: ClassVar[str] = "exflow"
    time_limit_s: float = 120.0
    """Seconds for all layers; what is found by then is returned."""
    sweeps: int = 8
    """Most times that all layers are visited."""

    def place_trace(
        self, trace: Trace, cluster: Cluster, progress: Progress | None = None
    ) -> Array:
        """Logical expert of each slot, int32 [L, P]; see `PlacementPolicy.place`.

        Raises:
            BalancerError: the trace has no ids per token or no consecutive layers, redundant
                experts were asked for, or the experts do not divide over the ranks.
        """
        refuse_redundant(cluster, self.name)
        cluster.num_physical(trace.num_experts)
        affinity_LEE = affinities(trace)
        num_layers, num_ranks = trace.num_layers, cluster.num_ranks
        linear_E = np.arange(trace.num_experts) // (trace.num_experts // num_ranks)
        rank_LE = np.tile(linear_E, (num_layers, 1))
        deadline = time.monotonic() + self.time_limit_s
        for sweep in range(self.sweeps):
            improved = False
            for layer in range(num_layers):
                gain_ES = _gain(affinity_LEE, rank_LE, layer, num_ranks, sweep == 0)
                found_E = _assign(gain_ES, deadline - time.monotonic())
                if found_E is not None and _kept(gain_ES, found_E) > _kept(gain_ES, rank_LE[layer]):
                    rank_LE[layer], improved = found_E, True
                if sweep == 0 and progress is not None:
                    progress(layer)
            if not improved or time.monotonic() > deadline:
                break
        return np.argsort(rank_LE, axis=1, kind="stable").astype(np.int32)


def affinities(trace: Trace) -> Array:
    """Tokens that use expert e in layer l and e' in layer l + 1, float64 [L - 1, E, E].

    Raises:
        BalancerError: the trace holds counts instead of ids, or one layer.
    """
    if trace.topk_ids_TLK is None or trace.num_layers < 2:
        raise BalancerError(
            f"exflow places by which experts of consecutive layers serve the same tokens; trace "
            f"{trace.name} has {'only counts' if trace.topk_ids_TLK is None else 'one layer'}. "
            f"Record ids per token of at least two layers, or place by eplb or gem."
        )
    from scipy.sparse import csr_array

    num_tokens, num_layers, top_k = trace.topk_ids_TLK.shape
    starts = np.arange(num_tokens + 1) * top_k
    used_LTE = [
        csr_array(
            (np.ones(num_tokens * top_k), trace.topk_ids_TLK[:, layer].ravel(), starts),
            shape=(num_tokens, trace.num_experts),
        )
        for layer in range(num_layers)
    ]
    return np.stack([(here.T @ after).toarray() for here, after in pairwise(used_LTE)])


def _gain(
    affinity_LEE: Array, rank_LE: Array, layer: int, num_ranks: int, only_before: bool
) -> Array:
    """Affinity kept if an expert of the layer goes to a rank, its neighbours as they are, [E, S].

    In the first visit the layer behind is not placed yet and does not count."""
    on_rank_LES = rank_LE[..., None] == np.arange(num_ranks)
    gain_ES = np.zeros(on_rank_LES.shape[1:])
    if layer > 0:
        gain_ES += affinity_LEE[layer - 1].T @ on_rank_LES[layer - 1]
    if layer < len(rank_LE) - 1 and not only_before:
        gain_ES += affinity_LEE[layer] @ on_rank_LES[layer + 1]
    return gain_ES


def _kept(gain_ES: Array, rank_E: Array) -> float:
    return float(gain_ES[np.arange(len(rank_E)), rank_E].sum())


def _assign(gain_ES: Array, time_limit_s: float) -> Array | None:
    """The rank of each expert that keeps most, equally many per rank; None if time runs out."""
    if time_limit_s <= 0:
        return None
    from scipy.optimize import LinearConstraint, milp
    from scipy.sparse import eye_array, kron

    num_experts, num_ranks = gain_ES.shape
    one_rank_each = kron(eye_array(num_experts), np.ones((1, num_ranks)), format="csr")
    same_number = kron(np.ones((1, num_experts)), eye_array(num_ranks), format="csr")
    share = num_experts // num_ranks
    found = milp(
        -gain_ES.ravel(),
        integrality=np.ones(gain_ES.size),
        bounds=(0, 1),
        constraints=[
            LinearConstraint(one_rank_each, 1, 1),
            LinearConstraint(same_number, share, share),
        ],
        options={"time_limit": time_limit_s},
    )
    return None if found.x is None else np.rint(found.x).reshape(gain_ES.shape).argmax(1)
