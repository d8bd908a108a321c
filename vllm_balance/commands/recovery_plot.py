"""The plot of `bench.recovery`: latency burst by burst, with marks where something changed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from vllm_balance.commands.report_plots import (
    DASHES,
    LATENCIES,
    Figure,
    Panel,
    axes,
    colours_of,
    mark,
    rounded,
)
from vllm_balance.own_benchmarks.recovery import Burst, by_server

SHOWN = ("end to end", "TPOT", "TTFT")
LABEL_CHARACTERS = 10
"""Of a line of a phase's label: one of few bursts is narrow on a phone."""


def panels(rows: list[Burst]) -> list[Panel]:
    """One panel with a figure for each latency."""
    return [
        Panel(
            title="Latency burst by burst",
            note="Lower is better, and so is a line that comes down soon behind a dashed mark, "
            "where the traffic changed or a rank became slow. A point is the median over the "
            "requests of one burst, a line one server.",
            figures={heading: by_burst(rows, LATENCIES[heading]) for heading in SHOWN},
        )
    ]


def by_burst(rows: list[Burst], field: str) -> Figure:
    """One latency over the bursts of each server, counted through all phases."""
    servers = by_server(rows)
    arms = [arm for arm, _ in servers]
    data, colours = [], colours_of(arms)
    for place, ((arm, _), bursts) in enumerate(servers.items()):
        turn = arms[:place].count(arm)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": arm if arms.count(arm) == 1 else f"{arm}, server {turn + 1}",
                "x": list(range(1, len(bursts) + 1)),
                "y": [rounded(getattr(burst, field)) for burst in bursts],
                "text": [_said(burst) for burst in bursts],
                "hovertemplate": "%{text}<br>%{y} ms<extra>%{fullData.name}</extra>",
                "marker": {"size": 5},
                "line": {"color": colours[arm], "dash": DASHES[turn % len(DASHES)]},
            }
        )
    marks, labels = zip(*_phases(max(servers.values(), key=len)), strict=True)
    layout = axes("burst", "ms (median)")
    layout["xaxis"]["range"] = [0.5, 0.5 + max(map(len, servers.values()))]
    layout["shapes"] = list(marks[1:])
    layout["annotations"] = list(labels)
    layout["margin"] = {"t": 16 * max(1 + label["text"].count("<br>") for label in labels)}
    return {"data": data, "layout": layout}


def _said(burst: Burst) -> str:
    swaps = "" if burst.swaps is None else f", {burst.swaps} swaps"
    return f"{burst.phase}, after {burst.at_s:.0f} s{swaps}"


def _phases(bursts: list[Burst]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Of each phase of a server: a mark before its first burst, and its name above."""
    names = [burst.phase for burst in bursts]
    for name in dict.fromkeys(names):
        at = names.index(name) + 0.5
        lines = textwrap.wrap(name, LABEL_CHARACTERS, break_long_words=False)
        label = {"x": at, "y": 1, "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
        label |= {"text": "<br>".join(lines), "align": "left", "showarrow": False}
        yield mark(at), label | {"font": {"size": 11}}
