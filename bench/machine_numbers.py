"""Constants of a CPU machine's hardware file that its cores have alone, each by a formula.

From the products of `bench.machine` and the profile's time t(n) of an expert with n tokens::

    t(n) = max(stream, exposed * stream + n * token), stream = t(1)

exposed and token by least squares of relative errors over 8 tokens and more; a product likewise
with the time of its arithmetic at the rate of the most tokens. The peaks are what the faster of
experts and products reaches, and the efficiencies are their shares of it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

import numpy as np

from bench.machine_cores import PRODUCTS
from bench.predictions import NUMBERS
from vllm_balance.errors import BalancerError
from vllm_balance.profiles import Profile
from vllm_balance.simulate.expert_times import KNOTS, measured

UNPACKED = (8, 32)
"""Tokens at which a product is neither streaming alone nor arithmetic alone."""
Row = dict[str, Any]
Values = dict[str, float]


def part(rows: list[Row], name: str, dtype: str = "bfloat16") -> list[Row]:
    """The rows of a part of `bench.machine` in `dtype` by the newest commit that has some.

    Raises:
        BalancerError: there are none.
    """
    # The first rows had one type.
    own = [row for row in rows if (row["part"], row.get("dtype", "bfloat16")) == (name, dtype)]
    if not own:
        raise BalancerError(
            f"bench/results/machine.jsonl has no {name} rows of this machine in {dtype}. Run "
            f"`python -m bench.machine --dtype {dtype}`."
        )
    return [row for row in own if row["commit"] == own[-1]["commit"]]


def of_cores(rows: list[Row], profile: Profile) -> Values:
    """Rates in byte/s and FLOP/s, shares of them, and `first_us` and `token_us` of an expert."""
    shape, (_, width) = profile.shape, NUMBERS[profile.shape.dtype]
    weights = 3 * shape.hidden * shape.inner
    times = measured(profile)
    table_N = times.stream_SN.mean(0)
    many = np.array([n for n in KNOTS if n >= KNOTS[3]])
    first_us = float(table_N[1])
    design = np.stack([np.full(len(many), first_us), many], axis=1)
    expert_exposed, token_us = relative_nnls(design, table_N[many], table_N[many])
    expert_rate, expert_flop = 1e6 * width * weights / first_us, 2e6 * weights / token_us
    dense_rate, dense_flop, dense_exposed = _products(part(rows, "product", shape.dtype), width)
    bandwidth, peak = max(expert_rate, dense_rate), max(expert_flop, dense_flop)
    copied = part(rows, "copy", shape.dtype)
    return {
        "memory_bandwidth": bandwidth,
        "peak": peak,
        "expert_streaming": expert_rate / bandwidth,
        "expert_compute": expert_flop / peak,
        "expert_exposed": min(expert_exposed, 1.0),
        "dense_streaming": dense_rate / bandwidth,
        "dense_compute": dense_flop / peak,
        "dense_exposed": dense_exposed,
        "experts_us": float(times.fixed_S2[:, 0].mean()),
        "copy": statistics.median(
            1e6 * row["bytes"] / time_us for row in copied for time_us in row["time_us"]
        ),
        "first_us": first_us,
        "token_us": token_us,
    }


def _products(rows: list[Row], width: int) -> tuple[float, float, float]:
    """(byte/s with one token, FLOP/s with the most, share of streaming that is not hidden).

    Args:
        width: bytes of a weight.
    """
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        times[row["product"], row["tokens"]] += row["time_us"]
    time_us = {key: statistics.median(found) for key, found in times.items()}
    most = max(tokens for _, tokens in time_us)
    size = {name: height * width for name, (height, width) in PRODUCTS.items()}
    rate = statistics.median(1e6 * width * size[name] / time_us[name, 1] for name in PRODUCTS)
    flop = sum(size.values()) * 2 * most / sum(time_us[name, most] for name in PRODUCTS)
    exposed = statistics.median(
        (time_us[name, tokens] - 2 * size[name] * tokens / flop) / time_us[name, 1]
        for name in PRODUCTS
        for tokens in UNPACKED
    )
    return rate, 1e6 * flop, min(max(exposed, 0.0), 1.0)


def relative_nnls(design: Any, time_us: Any, left_us: Any) -> list[float]:
    """Coefficients of `left_us`, none negative, by least squares relative to `time_us`."""
    from scipy.optimize import nnls

    found, _ = nnls(design / time_us[:, None], left_us / time_us)
    return [float(value) for value in found]
