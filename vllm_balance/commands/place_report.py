"""What ``vllm-balance place`` prints: modelled times, and the kinds of experts."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table

from vllm_balance import maps
from vllm_balance.commands.printing import say, spans
from vllm_balance.trace_summary import CONSISTENT, HEAVY, TEMPORAL, kinds


def report(
    layer_index_L: np.ndarray, scores: dict[str, np.ndarray], bound_L: np.ndarray, unit: str
) -> None:
    """Prints, per layer, the mean modelled time of a batch: the last placement against others."""
    *bases, own = scores
    columns = scores | {"lower bound": bound_L}
    table = Table(title=f"Modelled time of a batch that was not used for placing, {unit}")
    for heading in ("layer", *columns, *(f"{own} against {base}" for base in bases)):
        table.add_column(heading, justify="right")
    for row, layer in enumerate([*layer_index_L, "all"]):
        pick = {
            name: float(values.sum() if layer == "all" else values[row])
            for name, values in columns.items()
        }
        gains = [f"{pick[own] / pick[base] - 1:+.1%}" for base in bases]
        table.add_row(str(layer), *(f"{value:.0f}" for value in pick.values()), *gains)
    Console().print(table)


def report_kinds(
    steps_NLE: np.ndarray, what: str, placement_map: maps.PlacementMap, *, listed: bool
) -> None:
    """Prints how many experts are consistent and temporal; if `listed`, which ones, and the ranks
    of the temporal ones.

    Args:
        steps_NLE: pairs of each expert in the steps that tell, [N, L, E]; `what` in words.
        placement_map: of the same layers.
    """
    consistent_LE, temporal_LE = kinds(steps_NLE)
    say(
        f"Experts per layer in {what}: {consistent_LE.sum(1).mean():.1f} consistent (active in at "
        f"least {CONSISTENT:.0%} of them), {temporal_LE.sum(1).mean():.1f} temporal (in at most "
        f"{TEMPORAL:.0%}, with {HEAVY:g} times the load of an active expert)"
        f"{'' if listed else '; --experts lists them'}."
    )
    if not listed:
        return
    slots = placement_map.num_physical // placement_map.num_ranks
    table = Table()
    table.add_column("layer", justify="right")
    for heading in ("consistent", "temporal: rank"):
        table.add_column(heading, overflow="fold")
    for row, layer in enumerate(placement_map.layers):
        expert_P = np.array(layer.physical_to_logical)
        places = [
            f"{expert}: {spans(np.unique(np.flatnonzero(expert_P == expert) // slots))}"
            for expert in np.flatnonzero(temporal_LE[row])
        ]
        consistent = spans(np.flatnonzero(consistent_LE[row]))
        table.add_row(str(layer.index), consistent, "; ".join(places) or "-")
    Console().print(table)
