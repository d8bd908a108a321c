"""Pictures of profiles and traces. matplotlib is needed only here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_balance import documents
from vllm_balance.errors import BalancerError
from vllm_balance.profiles import Profile
from vllm_balance.trace_summary import TraceSummary
from vllm_balance.traces import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure


NUM_COLOURS = 20
"""Of the groups of a layer; further ones begin again."""


def require_drawable(path: Path) -> None:
    """Returns if a picture can be put at `path`; for a look before long work.

    Raises BalancerError without matplotlib, if it cannot draw files with this ending, or as
    `documents.require_writable` does.
    """
    figure, _ = _figure(1, 1)
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise BalancerError(
            f"--plot names {path}; the ending says what is drawn, and allowed are "
            f"{', '.join(sorted(formats))}."
        )
    documents.require_writable(path)


def draw_profile(profile: Profile, path: Path) -> None:
    """Points and fitted curves of each rank over the tokens per activated expert.

    Raises BalancerError without matplotlib, or if the file cannot be written.
    """
    figure, axes = _figure(1, len(profile.ranks))
    for rank, axis in zip(profile.ranks, axes, strict=True):
        even = [p for p in rank.points if len(set(p.tokens_E)) == 1]
        for activated in sorted({len(point.tokens_E) for point in even}):
            points = sorted(
                (p.tokens_E[0], p.time_us) for p in even if len(p.tokens_E) == activated
            )
            tokens, times = zip(*points, strict=True)
            (line,) = axis.plot(tokens, times, "o", label=f"{activated} experts")
            grid = np.unique(np.geomspace(1, max(tokens), 60).astype(int))
            fitted = [rank.curve.model.of_experts(np.full(activated, n)) for n in grid]
            axis.plot(grid, fitted, "-", color=line.get_color())
        skewed = [p for p in rank.points if len(set(p.tokens_E)) > 1]
        mean = [sum(p.tokens_E) / len(p.tokens_E) for p in skewed]
        axis.plot(mean, [p.time_us for p in skewed], "kx", label="skewed batches")
        error = rank.curve.median_relative_error
        axis.set(xscale="log", yscale="log", xlabel="tokens per activated expert")
        axis.set(ylabel="time, us", title=f"rank {rank.rank}: median error {error:.1%}")
        if rank.curve.knee_tokens:
            axis.axvline(rank.curve.knee_tokens, linestyle=":", color="grey")
        axis.legend(fontsize="small")
    _save(figure, path)


def draw_trace(trace: Trace, summary: TraceSummary, path: Path) -> None:
    """Skew and drift of the layers, and kind and group of every expert. Raises as `draw_profile`
    does."""
    figure, (skew, drift, kinds, groups) = _figure(2, 2)
    skew.plot(trace.layer_index_L, summary.skew_L, "o-")
    skew.set(xlabel="layer", ylabel="busiest expert / mean", ylim=(0, None), title="skew")
    drift.plot(summary.drift_LN.T, color="tab:blue", alpha=0.3)
    drift.plot(summary.drift_LN.mean(0), color="black", label="mean of the layers")
    drift.set(xlabel="tenth of the trace", ylabel="share of the load that moved", ylim=(0, None))
    drift.set(title="drift")
    drift.legend()
    kind_LE = summary.consistent_LE.astype(int) - summary.temporal_LE.astype(int)
    by_expert = {"aspect": "auto", "interpolation": "none"}
    kinds.imshow(kind_LE, cmap="coolwarm", vmin=-1, vmax=1, **by_expert)
    kinds.set(title="consistent (red), temporal (blue)")
    group_LE = np.where(summary.group_LE < 0, np.nan, summary.group_LE % NUM_COLOURS)
    groups.imshow(group_LE, cmap="tab20", vmin=0, vmax=NUM_COLOURS - 1, **by_expert)
    groups.set(title="experts that rise together: a colour per group")
    for axis in (kinds, groups):
        axis.set(xlabel="expert", ylabel="recorded layer")
    figure.suptitle(f"{trace.name}: {trace.num_experts} experts, top-{trace.top_k}")
    _save(figure, path)


def _figure(rows: int, columns: int) -> tuple[Figure, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BalancerError(
            "--plot needs matplotlib, which is not installed: pip install matplotlib."
        ) from error
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise BalancerError(f"The picture {path} cannot be written: {error}.") from error
