"""The plots of a run: each a panel with one or several figures to choose from.

A figure is data and layout of plotly.js; the page adds fonts, margins and sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_balance.measured_tables import (
    grouped,
    has_few_tokens,
    median,
    tokens_per_s,
    total_tokens_per_s,
)
from vllm_balance.measurement import Latency, Measurement

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
"""Okabe and Ito's, which colour-blind readers can tell apart."""
DASHES = ("solid", "dot", "dash", "dashdot")
LATENCIES = {"TPOT": "tpot_ms", "TTFT": "ttft_ms", "ITL": "itl_ms", "end to end": "e2e_ms"}
BETWEEN_TOKENS = ("TPOT", "ITL")
"""Latencies that a load is not about if its requests have few tokens."""

Figure = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A place on the page for one figure at a time."""

    title: str
    note: str
    figures: dict[str, Figure]


def panels(rows: list[Measurement]) -> list[Panel]:
    """All plots of one run."""
    return [
        Panel(
            title="Throughput against latency",
            note="Up and to the left is better. A point is the median of one arm at one load; a "
            "line joins numbers of requests at once.",
            figures=dict(_paretos(rows)),
        ),
        Panel(
            title="Activated experts per rank over time",
            note="Per step, summed over layers: what each rank streams. In decode lower is better, "
            "and an arm's ranks close together. A line per arm and rank, from the first load of "
            "each arm.",
            figures={name: over_time(own) for name, own in _views(rows)},
        ),
        Panel(
            title="Experts and ranks",
            note="Share of a layer's tokens that each expert brought to each rank, experts in the "
            "order of their tokens on the first arm. Two filled cells in a column: replicas.",
            figures=dict(_heat_maps(rows)),
        ),
        Panel(
            title="Latency",
            note="Further left is better. Share of requests (ITL: of tokens) that took at most so "
            "long.",
            figures={
                f"{heading}{f', {name}' if name else ''}": latency(own, field)
                for name, own in _views(rows)
                for heading, field in LATENCIES.items()
                if not (heading in BETWEEN_TOKENS and has_few_tokens(own[0]))
            },
        ),
    ]


def _paretos(rows: list[Measurement]) -> Iterator[tuple[str, Figure]]:
    """Of the loads that have a time per token, and of those that are about the first one."""
    for heading in ("TPOT", "TTFT"):
        own = [row for row in rows if has_few_tokens(row) == (heading == "TTFT")]
        if own:
            yield heading, pareto(own, heading)


def pareto(rows: list[Measurement], heading: str) -> Figure:
    """Tokens per second over the median of a latency; of prompts too where that is TTFT.

    A line through the loads of each arm if they differ in how many requests there are at once.
    """

    def latency_ms(row: Measurement) -> float:
        found: Latency = getattr(row, LATENCIES[heading])
        return found.p50

    is_first = heading == "TTFT"
    lines: dict[tuple[str, str], list[list[Measurement]]] = {}
    for (case, _, arm), own in grouped(rows).items():
        lines.setdefault((case, arm), []).append(own)
    data, colours = [], colours_of(row.arm for row in rows)
    for (case, arm), loads in lines.items():
        loads.sort(key=lambda own: own[0].concurrency)
        joined = len({own[0].concurrency for own in loads}) == len(loads)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if joined else "markers",
                "name": " ".join(filter(None, (case, arm))),
                "x": [rounded(median(own, latency_ms)) for own in loads],
                "y": [
                    rounded(median(own, total_tokens_per_s if is_first else tokens_per_s))
                    for own in loads
                ],
                "text": [own[0].load_name or f"{own[0].concurrency} at once" for own in loads],
                "hovertemplate": "%{text}<br>%{x} ms<br>%{y} tokens/s<extra>%{fullData.name}"
                "</extra>",
                "marker": {"size": 9, "symbol": _case_number(rows, case)},
                "line": {"color": colours[arm]},
            }
        )
    layout = axes(
        f"{heading}, ms (median)",
        "tokens per second, prompts included" if is_first else "tokens per second",
    )
    layout["yaxis"]["rangemode"] = "tozero"
    slo = set() if is_first else {row.slo_tpot_ms for row in rows}
    layout["shapes"] = [mark(at) for at in sorted(filter(None, slo))]
    return {"data": data, "layout": layout}


def over_time(rows: list[Measurement]) -> Figure:
    """Activated experts of each rank over the seconds of a load."""
    data, colours = [], colours_of(row.arm for row in rows)
    for (_, _, arm), own in grouped(rows).items():
        samples = own[0].samples
        for rank in range(own[0].num_ranks):
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": f"{arm}, rank {rank}",
                    "x": [sample.at_s for sample in samples],
                    "y": [sample.activated_per_rank[rank] for sample in samples],
                    "marker": {"size": 4},
                    "line": {
                        "color": colours[arm],
                        "dash": DASHES[rank % len(DASHES)],
                    },
                }
            )
    return {"data": data, "layout": axes("seconds", "activated experts per step")}


def _heat_maps(rows: list[Measurement]) -> Iterator[tuple[str, Figure]]:
    for name, own in _views(rows):
        for layer in range(len(own[0].layers)):
            yield f"layer {layer}{f', {name}' if name else ''}", heat_map(own, layer)


def heat_map(rows: list[Measurement], layer: int) -> Figure:
    """Percent of a layer's tokens by expert and rank, a row for each rank of each arm."""
    names, shares = [], []
    order_E = None
    for (_, _, arm), own in grouped(rows).items():
        share_SE = tokens_per_expert_SE(own, layer)
        share_SE = 100 * share_SE / max(1, share_SE.sum())
        if order_E is None:
            order_E = share_SE.sum(0).argsort(kind="stable")[::-1]
        names += [f"{arm} {rank}" for rank in range(len(share_SE))]
        shares += [[rounded(value) for value in share_E[order_E]] for share_E in share_SE]
    assert order_E is not None
    layout = axes("expert", "")
    layout["xaxis"] |= {"type": "category", "nticks": 12}
    layout["yaxis"] |= {"autorange": "reversed", "type": "category"}
    layout["height"] = 120 + 26 * len(names)
    data = {
        "type": "heatmap",
        "x": [str(expert) for expert in order_E],
        "y": names,
        "z": shares,
        "colorscale": [[0, "#ffffff"], [0.15, "#9ecae1"], [0.5, "#3182bd"], [1, "#08306b"]],
        "colorbar": {"title": {"text": "%"}, "thickness": 10},
        "hovertemplate": "expert %{x}, %{y}: %{z} %<extra></extra>",
    }
    return {"data": [data], "layout": layout}


def tokens_per_expert_SE(rows: list[Measurement], layer: int) -> np.ndarray:
    """Pairs of each expert on each rank in one layer, [S, E], summed over rows."""
    tokens_SE = np.zeros((rows[0].num_ranks, rows[0].num_logical_experts), np.int64)
    for row in rows:
        heat = row.layers[layer]
        slots_SP = np.array(heat.physical_to_logical).reshape(row.num_ranks, -1)
        counts_SP = np.array(heat.slot_tokens).reshape(row.num_ranks, -1)
        for rank, (experts_P, counts_P) in enumerate(zip(slots_SP, counts_SP, strict=True)):
            held = experts_P >= 0
            np.add.at(tokens_SE[rank], experts_P[held], counts_P[held])
    return tokens_SE


def latency(rows: list[Measurement], field: str) -> Figure:
    """Cumulative distribution of one latency, the median over the repeats of each arm."""
    data, colours = [], colours_of(row.arm for row in rows)
    for (_, _, arm), own in grouped(rows).items():
        found: list[Latency] = [getattr(row, field) for row in own]
        quantiles = np.median([one.quantiles for one in found], axis=0)
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": arm,
                "x": [rounded(value) for value in quantiles],
                "y": [rounded(value) for value in np.linspace(0, 100, len(quantiles))],
                "line": {"color": colours[arm]},
            }
        )
    return {"data": data, "layout": axes("ms", "percent")}


def _views(rows: list[Measurement]) -> Iterator[tuple[str, list[Measurement]]]:
    """Each case and load by name, with its rows of all arms."""
    for case, load in dict.fromkeys((case, load) for case, load, _ in grouped(rows)):
        own = [row for row in rows if (row.case, row.load_name) == (case, load)]
        yield ", ".join(filter(None, (case, load))), own


def axes(x: str, y: str) -> dict[str, Any]:
    """A layout whose axes have titles."""
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}


def mark(x: float) -> dict[str, Any]:
    """A dashed line from the bottom of a plot to its top."""
    line = {"dash": "dash", "color": "#888"}
    return {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": line}


def colours_of(arms: Iterable[str]) -> dict[str, str]:
    """Of each arm, in the order in which they first come."""
    return dict(zip(dict.fromkeys(arms), itertools.cycle(COLOURS), strict=False))


def _case_number(rows: list[Measurement], case: str) -> int:
    return list(dict.fromkeys(row.case for row in rows)).index(case)


def rounded(value: float) -> float:
    """As many digits as a plot shows."""
    return round(float(value), 2)
