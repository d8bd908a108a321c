"""What a recording costs while serving, from the bursts without one around it."""

from __future__ import annotations

import statistics

import numpy as np
from pydantic import Field

from vllm_balance.measured_tables import MeasuredTable
from vllm_balance.own_benchmarks.rows import OwnRow

HEADINGS = (
    *("recording", "bursts", "TPOT ms", "against off", "quartiles", "least to most"),
    *("bytes a step", "dropped steps", "in serving", "in the writer's thread"),
)


class Burst(OwnRow):
    """Requests that were sent at once, and what was recorded of them."""

    position: int
    """Place in the order in which bursts were sent."""
    arm: str
    """What was recorded: `off`, `counts` or `ids`."""
    server: int | None = None
    """A run that was ended has several; None in rows that are older than this field."""
    tpot_ms: float = Field(gt=0)
    """Median over requests."""
    seconds: float = Field(gt=0)
    """From the first request to the last answer."""
    steps: int = 0
    dropped_steps: int = 0
    bytes: int = 0
    """Of the file."""
    serving_us: float = 0.0
    """What the recorder took for itself while steps waited."""
    writing_us: float = 0.0
    """Likewise in its writer's thread."""


def table(rows: list[Burst]) -> MeasuredTable:
    """Per arm: time per token, against no recording, and what a step takes in the file."""
    against = against_off(rows)
    body = []
    for arm in dict.fromkeys(row.arm for row in rows):
        own = [row for row in rows if row.arm == arm]
        values_ms = [row.tpot_ms for row in own]
        median_ms = statistics.median(values_ms)
        steps = sum(row.steps for row in own)
        body.append(
            [
                arm,
                str(len(own)),
                f"{median_ms:.1f}",
                *spread([against[row.position] for row in own if row.position in against]),
                f"{(max(values_ms) - min(values_ms)) / median_ms:.1%}",
                f"{sum(row.bytes for row in own) / steps:,.0f}" if steps else "-",
                str(sum(row.dropped_steps for row in own)),
                _share([row.serving_us / row.seconds for row in own]),
                _share([row.writing_us / row.seconds for row in own]),
            ]
        )
    return rows[-1].table(
        caption="Medians over bursts.",
        headings=HEADINGS,
        body=body,
        command="python -m bench.recorder",
    )


def against_off(rows: list[Burst]) -> dict[int, float]:
    """TPOT of each burst by its position, over that of the bursts without recording around it on
    the same server.

    Between two of them on the line between; of a burst without recording, over its neighbours'. One
    that has none, of a run that was ended, is left out.
    """
    found = {}
    for row in rows:
        off = {
            each.position: each.tpot_ms
            for each in rows
            if (each.server, each.arm) == (row.server, "off") and each.position != row.position
        }
        known = sorted(off)
        if known:
            around_ms = np.interp(row.position, known, [off[place] for place in known])
            found[row.position] = row.tpot_ms / float(around_ms)
    return found


def spread(ratios: list[float]) -> tuple[str, str]:
    """Median and quartiles of ratios, as differences; "-" if there are fewer than two."""
    if len(ratios) < 2:
        return "-", "-"
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle - 1:+.2%}", f"{low - 1:+.1%} to {high - 1:+.1%}"


def _share(us_per_s: list[float]) -> str:
    """Median share of a burst's time."""
    return f"{statistics.median(us_per_s) / 1e6:.2%}"
