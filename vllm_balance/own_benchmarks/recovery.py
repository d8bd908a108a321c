"""What a change in mid-run costs, and how soon it is over."""

from __future__ import annotations

import math
import statistics

from pydantic import Field

from vllm_balance.measured_tables import MeasuredTable
from vllm_balance.own_benchmarks.rows import OwnRow

SETTLED = 3
"""Last bursts of a phase, whose median is where it ends."""
NEAR = 0.05
"""A burst within this of where its phase ends counts as recovered, if all behind it do."""
HEADINGS = (
    *("phase", "arm", "servers", "first burst ms", "last bursts ms", "against static"),
    *("against gem", "settled after s", "swaps", "moved MiB"),
)


class Burst(OwnRow):
    """Requests that were sent at once to a server, in one of its phases."""

    arm: str
    position: int
    """Place in the order in which servers were started."""
    phase: str
    """What has changed when it begins."""
    at_s: float
    """Since the change; when the burst was sent."""
    e2e_ms: float = Field(gt=0)
    """Median over requests, as the two below."""
    ttft_ms: float
    tpot_ms: float
    swaps: int | None = None
    """Experts that changed places since the change; None where nothing moves them."""
    expert_bytes: int
    """Weights of one expert."""


def table(rows: list[Burst]) -> MeasuredTable:
    """Per phase and arm: latency at the change and at the end, and what recovering took; "-" where
    what to compare with is not measured yet."""
    body = []
    for phase in dict.fromkeys(row.phase for row in rows):
        by_arm = {
            arm: [row for row in rows if (row.phase, row.arm) == (phase, arm)]
            for arm in dict.fromkeys(row.arm for row in rows if row.phase == phase)
        }
        ends_ms = {arm: _end_ms(own) for arm, own in by_arm.items()}
        for arm, own in by_arm.items():
            servers = list(by_server(own).values())
            body.append(
                [
                    phase,
                    arm,
                    str(len(servers)),
                    f"{statistics.median(bursts[0].e2e_ms for bursts in servers):.0f}",
                    f"{ends_ms[arm]:.0f}",
                    *(_against(ends_ms[arm], ends_ms.get(base)) for base in ("static", "gem")),
                    _seconds(statistics.median(map(recovery_s, servers))),
                    *_moved(servers),
                ]
            )
    return rows[-1].table(
        caption="End-to-end latency of a request, medians over requests, bursts and servers.",
        headings=HEADINGS,
        body=body,
        command="python -m bench.recovery --traces DIR",
        left=2,
    )


def by_server(rows: list[Burst]) -> dict[tuple[str, int], list[Burst]]:
    """The bursts of each server, in order, by its arm and position."""
    servers = dict.fromkeys((row.arm, row.position) for row in rows)
    return {at: [row for row in rows if (row.arm, row.position) == at] for at in servers}


def _end_ms(rows: list[Burst]) -> float:
    """End-to-end latency at the end of a phase, median over bursts and servers."""
    return statistics.median(
        row.e2e_ms for bursts in by_server(rows).values() for row in bursts[-SETTLED:]
    )


def _against(own_ms: float, base_ms: float | None) -> str:
    return "-" if base_ms is None else f"{own_ms / base_ms - 1:+.1%}"


def recovery_s(bursts: list[Burst]) -> float:
    """Seconds from the change to the first burst from which on all are near the end's latency.

    Infinite if the last one is not.
    """
    end_ms = statistics.median(row.e2e_ms for row in bursts[-SETTLED:])
    far = [i for i, row in enumerate(bursts) if row.e2e_ms > (1 + NEAR) * end_ms]
    if not far:
        return 0.0
    behind = bursts[far[-1] + 1 :]
    return behind[0].at_s if behind else math.inf


def _seconds(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else "never"


def _moved(servers: list[list[Burst]]) -> list[str]:
    """Swaps of a phase, and the weights that they moved."""
    counted = [bursts[-1].swaps for bursts in servers]
    swaps = [value for value in counted if value is not None]
    if not swaps:
        return ["-", "-"]
    middle = statistics.median(swaps)
    return [f"{middle:.0f}", f"{2 * middle * servers[0][0].expert_bytes / 2**20:,.0f}"]
