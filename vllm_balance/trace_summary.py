"""What a trace looks like: skew, consistent and temporal experts, co-activation, drift.

Consistent experts are active in nearly every step; temporal ones seldom, but then with much load,
and often together (GEM, arXiv 2605.19945): averages over time do not show them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_balance.recording import Phase
from vllm_balance.traces import Trace

Array = np.ndarray[Any, np.dtype[Any]]
CONSISTENT = 0.85
"""Share of steps from which on an expert counts as consistent."""
TEMPORAL = 0.4
"""Share of steps up to which an expert may count as temporal ..."""
HEAVY = 1.5
"""... if its load while active is this many times the mean of the layer's active experts.

GEM's summaries give means of the class, 17 % of the steps and about 3 times the tokens, but no
cuts. As cuts they name no expert of five public recordings, where none that is active in at most
40 % of the steps has more than 2.2 times the mean (docs/placement.md).
"""
TOGETHER = 0.5
"""Correlation of two experts' counts over the steps from which on they count as one group."""
TENTHS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSummary:
    """Per layer figures of a trace in steps of consecutive tokens, of one phase if asked for."""

    num_steps: int
    skew_L: Array
    """Load of the busiest expert over the mean load."""
    active_share_L: Array
    """Mean share of the experts that a step activates."""
    consistent_LE: Array
    """bool: active in at least CONSISTENT of the steps."""
    temporal_LE: Array
    """bool: active in at most TEMPORAL of the steps, but heavy while active."""
    groups_L: tuple[tuple[tuple[int, ...], ...], ...]
    """Per layer the groups, of two experts or more, whose counts rise together."""
    drift_LN: Array
    """Share of the load that sits elsewhere than in the first tenth of the steps, per tenth."""

    @property
    def group_LE(self) -> Array:
        """Number of each expert's group in its layer, from 0; -1 for those in none."""
        found_LE = np.full(self.consistent_LE.shape, -1)
        for layer, groups_of_layer in enumerate(self.groups_L):
            for number, group in enumerate(groups_of_layer):
                found_LE[layer, list(group)] = number
        return found_LE


def summarise(trace: Trace, batch: int) -> TraceSummary:
    """Figures of a trace cut into steps of `batch` consecutive tokens (counts: its own steps).

    Steps of prefill hold many times the tokens of steps of decode, so that figures over both say
    little of either: see `main_phase`.
    """
    counts_NLE = trace.chunks(batch)
    load_LE = counts_NLE.sum(0, dtype=np.int64)
    consistent_LE, temporal_LE = kinds(counts_NLE)
    return TraceSummary(
        num_steps=len(counts_NLE),
        skew_L=load_LE.max(1) / np.maximum(load_LE.mean(1), 1e-9),
        active_share_L=(counts_NLE > 0).mean((0, 2)),
        consistent_LE=consistent_LE,
        temporal_LE=temporal_LE,
        groups_L=tuple(groups(counts_NLE[:, layer]) for layer in range(trace.num_layers)),
        drift_LN=drift_of_tenths(counts_NLE),
    )


def main_phase(trace: Trace) -> Phase | None:
    """The phase with the most tokens (counts: steps); None where phases were not recorded."""
    found = trace.phases()
    return max(found, key=lambda phase: found[phase]) if found else None


def kinds(counts_NLE: Array) -> tuple[Array, Array]:
    """Which experts are consistent and which are temporal, bool [L, E] each."""
    active_NLE = counts_NLE > 0
    load_LE, share_LE = counts_NLE.sum(0, dtype=np.int64), active_NLE.mean(0)
    while_active_LE = load_LE / np.maximum(active_NLE.sum(0), 1)
    mean_L = load_LE.sum(1) / np.maximum(active_NLE.sum((0, 2)), 1)
    is_heavy_LE = while_active_LE >= HEAVY * mean_L[:, None]
    return share_LE >= CONSISTENT, (share_LE > 0) & (share_LE <= TEMPORAL) & is_heavy_LE


def groups(counts_NE: Array) -> tuple[tuple[int, ...], ...]:
    """Experts whose counts correlate by at least TOGETHER, directly or through others."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    varies_E = np.flatnonzero(counts_NE.std(0) > 0) if len(counts_NE) > 2 else np.array([], int)
    if len(varies_E) < 2:
        return ()
    correlation = np.corrcoef(counts_NE[:, varies_E].T)
    threshold = max(TOGETHER, 3 / np.sqrt(len(counts_NE)))  # three standard errors of chance
    _, label = connected_components(csr_array(correlation >= threshold), directed=False)
    members = [varies_E[label == group] for group in range(label.max() + 1)]
    return tuple(tuple(found.tolist()) for found in members if len(found) > 1)


def drift_of_tenths(counts_NLE: Array) -> Array:
    """Total variation between the load of each tenth of the steps and the first, [L, tenths]."""
    parts = np.array_split(counts_NLE, min(TENTHS, len(counts_NLE)))
    load_NLE = np.stack([part.sum(0) for part in parts]).astype(np.float64)
    load_NLE /= np.maximum(load_NLE.sum(2, keepdims=True), 1)
    return np.asarray(0.5 * np.abs(load_NLE - load_NLE[0]).sum(2).T)
