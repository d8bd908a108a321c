"""Constants of a CPU machine's hardware file that follow from servers, each by a formula.

From the server rows of `bench.machine`, with L layers and n requests at once; `predicted` is the
simulator's, without fixed times. How much of the profile's speed experts reach in a server is the
median over loads of predicted over measured time. With that, by non-negative least squares::

    TPOT - experts measured - rest predicted = step + L * layer + n * token
    TTFT - first steps predicted             = request + (n - 1) * request_beside

The first is of relative errors, and a median over repeats in which all requests decode together;
rows have the experts' time on one rank, and by how much the slowest of each layer is behind is the
simulator's. The second is their median too, or the fastest of repeats that do not say how fast the
machine was. With these, from prompts of several lengths T and layers of so many values per token::

    TTFT - fixed times - experts measured - rest predicted
        = L * T * values * prompt_value + (1 / attention_compute - 1) * scores at the peak

All of it is of a machine that is as fast as when the profile was measured: times of rows that say
how much slower the kernel was just then (bench/speed.py) are divided by what the simulator makes of
that.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bench import speed
from bench.load import Load
from bench.machine_numbers import part, relative_nnls
from bench.predictions import benchmark_model, loop
from vllm_balance.measurement import KernelTime
from vllm_balance.profiles import Profile
from vllm_balance.replay_rows import ReplaySettings
from vllm_balance.simulate import Arm, Layout, Outcome, simulate, skewed
from vllm_balance.simulate.hardware import Hardware

FEW_TOKENS = 8
"""An answer of more tokens is a load to decode."""
LATE = 1.05
"""Steps of a repeat over those of the shortest from which some requests came late."""
Row = dict[str, Any]
Values = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One load on a server of some layers, measured and predicted without fixed times."""

    layers: int
    load: Load
    tpot_us: float
    left_us: float
    """TPOT beyond the experts' measured time and the predicted rest; medians over repeats."""
    ttft_us: float
    experts_us: float
    """In the experts of all layers and steps on one rank."""
    scores_us: float
    """Attention proper of the first step at the peak."""
    values: float
    """Of a prompt in all layers that norms, residuals and rotary embedding go over."""
    made: Outcome

    @property
    def decodes(self) -> bool:
        return self.load.max_tokens > FEW_TOKENS

    @property
    def first_steps(self) -> int:
        """Steps until the median request's first token."""
        return int(np.median(self.made.steps.first_R)) + 1

    @property
    def first_sampled(self) -> int:
        """Tokens that come out of them."""
        return int(self.made.steps.sampled_N[: self.first_steps].sum())

    @property
    def prefill_us(self) -> float:
        """TTFT beyond the experts' measured time and the predicted rest of the first step."""
        experts_us, busy_us = self.made.stage_us["experts"], self.made.busy_us_N
        first_us = (self.experts_us - busy_us[1:].sum()) * experts_us[0] / busy_us[0]
        return float(self.ttft_us - first_us - (self.made.step_us_N[0] - experts_us[0]))


def served_experts(rows: list[Row], machine: Hardware, profile: Profile) -> float:
    """Share of the profile's speed that experts reach in a server; arguments as of `of_servers`."""
    loads = served(part(rows, "server", profile.shape.dtype), machine, profile)
    return statistics.median(float(each.made.busy_us_N.sum()) / each.experts_us for each in loads)


def of_servers(rows: list[Row], machine: Hardware, profile: Profile) -> Values:
    """Times in us, and the share of the peak that attention reaches.

    Args:
        machine: the file without fixed times, attention at its peak.
    """
    own = part(rows, "server", profile.shape.dtype)
    loads = served(own, machine, profile)
    decoding = [each for each in loads if each.decodes]
    step, layer, token = relative_nnls(
        np.array([[1, each.layers, each.load.requests] for each in decoding]),
        np.array([each.tpot_us for each in decoding]),
        np.array([each.left_us for each in decoding]),
    )
    request, beside = of_requests(decoding, step, layer, token)
    prefills = [each for each in loads if not each.decodes]
    first_us = [request + step + token + each.layers * layer for each in prefills]
    prompt_value, scores = of_prompts(prefills, np.array(first_us))
    return {
        "step": step,
        "layer": layer,
        "token": token,
        "request": request,
        "request_beside": beside,
        "decide": statistics.median(row["decide_us_per_layer"] for row in own),
        "prompt_value": prompt_value,
        "attention_compute": 1 / (1 + scores),
    }


def of_prompts(prefills: list[Served], fixed_us: Any) -> list[float]:
    """[time of a value, us; attention proper beyond its time at the peak, as a multiple of it].

    Args:
        fixed_us: time to the first token that depends on no length, of each prefill.
    """
    return relative_nnls(
        np.array([[each.values, each.scores_us] for each in prefills]),
        np.array([each.ttft_us for each in prefills]),
        np.array([each.prefill_us for each in prefills]) - fixed_us,
    )


def of_requests(decoding: list[Served], step: float, layer: float, token: float) -> list[float]:
    """[time of a request alone, time for each beside it], us, with these fixed times."""
    left_us = [
        each.ttft_us
        - each.made.ttft_us_at(0.5)
        - (each.first_steps * (step + each.layers * layer) + each.first_sampled * token)
        for each in decoding
    ]
    # Delays are of no share of a time: errors in us.
    return relative_nnls(
        np.array([[1, each.load.requests - 1] for each in decoding]),
        np.ones(len(decoding)),
        np.array(left_us),
    )


def served(rows: list[Row], machine: Hardware, profile: Profile) -> list[Served]:
    """Every load of the rows; `machine` has no fixed times."""
    groups: dict[tuple[int, ...], list[Row]] = defaultdict(list)
    for row in rows:
        # Rows of the first client counted prompts in words of one token.
        prompt = row.get("prompt_tokens", row.get("prompt_words"))
        groups[row["layers"], row["requests"], prompt, row["max_tokens"]].append(row)
    return [_group(key, own, machine, profile) for key, own in groups.items()]


def _group(key: tuple[int, ...], rows: list[Row], machine: Hardware, profile: Profile) -> Served:
    layers, requests, prompt, output = key
    load = Load(requests=requests, prompt_tokens=prompt, max_tokens=output)
    model = benchmark_model("qwen3-30b-a3b", layers, profile.shape.dtype)
    arm = Arm(
        model=model,
        hardware=machine,
        profile=profile,
        layout=Layout(tensor=machine.ranks_per_node.value),
        load=loop(load),
        balancer="static",
    )
    made = _simulated(arm)
    heads = model.num_heads.value / machine.ranks_per_node.value
    scores = 2 * layers * heads * model.attention_width * float(made.steps.attended_N[0])
    rows = [_as_profiled(row, arm, made, profile) for row in rows]
    steps = min(row["steps"] for row in rows)
    together = [row for row in rows if row["steps"] <= LATE * steps]
    return Served(
        layers=layers,
        load=load,
        tpot_us=1e3 * statistics.median(row["tpot_ms"] for row in together),
        left_us=statistics.median(_left_us(row, layers, made) for row in together),
        ttft_us=1e3 * _typical(together, lambda row: row["ttft_ms"]),
        experts_us=_typical(
            together, lambda row: row["experts_us_per_layer"] * layers * row["steps"]
        ),
        scores_us=scores / machine.peak(model.dense_number).per_us,
        values=layers * prompt * model.elementwise_width(machine.ranks_per_node.value),
        made=made,
    )


def _simulated(arm: Arm) -> Outcome:
    """Under even routing, all layers."""
    even, layers = ReplaySettings(zipf=0.0), arm.model.num_moe_layers
    return simulate(arm, skewed(even, arm.model, layers), skewed(even, arm.model, layers))


def _typical(rows: list[Row], value: Callable[[Row], float]) -> float:
    """Median over repeats; of the fastest where they do not say how fast the machine was, as other
    work delays a first token and never hurries it."""
    if all("machine_speed" in row for row in rows):
        return statistics.median(map(value, rows))
    return value(min(rows, key=lambda row: row["ttft_ms"]))


def _as_profiled(row: Row, arm: Arm, made: Outcome, profile: Profile) -> Row:
    """The row of a machine that is as fast as in the profile."""
    if "machine_speed" not in row:
        return row
    times = [KernelTime(**each) for each in row["machine_speed"]]
    slow = _simulated(replace(arm, speed=speed.against([times], profile)))

    def less(value: Callable[[Outcome], float]) -> float:
        return value(made) / value(slow)

    decodes = row["max_tokens"] > FEW_TOKENS
    return {
        **row,
        "ttft_ms": row["ttft_ms"] * less(lambda of: of.ttft_us_at(0.5)),
        "tpot_ms": row["tpot_ms"] * (less(lambda of: of.tpot_us) if decodes else 1.0),
        "experts_us_per_layer": row["experts_us_per_layer"]
        * less(lambda of: float(of.stage_us["experts"].sum())),
    }


def _left_us(row: Row, layers: int, made: Outcome) -> float:
    """TPOT beyond experts and the predicted rest of a decoding step, in one repeat."""
    experts_N, busy_N = made.stage_us["experts"], made.busy_us_N
    prompts_N, decode_N = made.steps.prefill_N > 0, made.steps.decode_N
    # The row's mean counts the steps of prompts too.
    own_us = row["experts_us_per_layer"] * layers * row["steps"] - busy_N[prompts_N].sum()
    slowest = experts_N[~prompts_N].sum() / busy_N[~prompts_N].sum()
    experts_us = own_us / (row["steps"] - prompts_N.sum()) * slowest
    rest_us = made.tpot_us - (experts_N * decode_N).sum() / decode_N.sum()
    return float(1e3 * row["tpot_ms"] - experts_us - rest_us)
