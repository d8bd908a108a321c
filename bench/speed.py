"""How fast the machine itself is while a row is measured: its expert kernel, timed beside it.

What else runs on a shared machine makes it slower by tens of per cent for minutes. So before and
after every load, while no server runs, two batches of experts are timed on all cores at once: one
that streams weights and one that computes. Rows keep the times (`machine_speed`), and a prediction
from a profile of another day is stretched by what they are against that profile's
(`bench/measured_points.py`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bench.real_size_model import PRESETS
from bench.server import rank_cores
from vllm_balance.commands.expert_probe import Probe, probing
from vllm_balance.measurement import KernelTime
from vllm_balance.model_shape import ModelShape
from vllm_balance.profiles import Profile
from vllm_balance.seams.device import kernel_isa
from vllm_balance.simulate.expert_times import measured
from vllm_balance.simulate.machine_speed import MachineSpeed

EXPERTS = 16
"""In each rank's memory, all of them activated: more than any cache holds."""
STREAMING, COMPUTING = 1, 64
"""Tokens of each expert in the two batches."""
ROUNDS = 3
"""Times that both batches are timed, in turn; each takes a quarter of a second or more."""
FRESH_S = 1.0
"""Behind one load, this long, a look is the one before the next load too."""
Times = list[KernelTime]


class Watch:
    """Times both batches, in about 3 s; nothing else should run meanwhile."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._times: Times = []
        self._ended = -math.inf

    def before(self) -> Times:
        """Before a load, which may follow another at once."""
        if time.monotonic() - self._ended < FRESH_S:
            return self._times
        return self.after()

    def after(self) -> Times:
        """Behind a load."""
        self._times = _timed(self._probe)
        self._ended = time.monotonic()
        return self._times


@contextmanager
def watching(ranks: int, dtype: str) -> Iterator[Watch]:
    """The probe's processes live inside.

    Args:
        ranks: that a server has, a core each.
        dtype: that models are served in.
    """
    cores_S = [[core] for core in rank_cores(ranks)]
    with probing(experts_of(dtype), kernel_isa(dtype), cores_S, EXPERTS) as probe:
        yield Watch(probe)


def experts_of(dtype: str, **counts: Any) -> ModelShape:
    """Experts of Qwen3-30B-A3B's shape for a probe, one layer of them.

    Args:
        counts: fields of the shape that are otherwise: its name, how many layers and experts.
    """
    preset = PRESETS["qwen3-30b-a3b"]
    shape = ModelShape(
        name="qwen3-30b-a3b",
        architecture="Qwen3MoeForCausalLM",
        num_layers=1,
        num_experts=preset.num_experts,
        top_k=preset.top_k,
        hidden=preset.hidden,
        inner=preset.inner,
        dtype=dtype,
    )
    return shape.model_copy(update=counts)


def _timed(probe: Probe) -> Times:
    rounds = [
        [probe.measure([tokens] * EXPERTS) for tokens in (STREAMING, COMPUTING)]
        for _ in range(ROUNDS)
    ]
    return [
        KernelTime(
            activated=EXPERTS,
            tokens_each=tokens,
            time_us=[
                statistics.median(timing.time_us for timing in timings_R)
                for timings_R in zip(*timings_RS, strict=True)
            ],
        )
        for tokens, timings_RS in zip(
            (STREAMING, COMPUTING), zip(*rounds, strict=True), strict=True
        )
    ]


def between(before: Times, after: Times) -> Times:
    """The mean of both, batch by batch and rank by rank."""
    return [
        first.model_copy(
            update={
                "time_us": [(a + b) / 2 for a, b in zip(first.time_us, second.time_us, strict=True)]
            }
        )
        for first, second in zip(before, after, strict=True)
    ]


def against(looks: Sequence[Times], profile: Profile) -> MachineSpeed:
    """Time of the experts over what the profile says: mean over ranks, median over looks.

    Args:
        looks: each of the same batches.

    Raises:
        ValueError: times and profile are of different numbers of ranks.
    """
    experts = measured(profile)

    def longer(each: KernelTime) -> float:
        stream_S = experts.stream_SN[:, each.tokens_each]
        expected_S = experts.fixed_S2[:, 0] + each.activated * stream_S
        pairs_S = zip(each.time_us, expected_S.tolist(), strict=True)
        return statistics.mean(time_us / expected_us for time_us, expected_us in pairs_S)

    return MachineSpeed(
        tuple(each.tokens_each for each in looks[0]),
        tuple(statistics.median(map(longer, same)) for same in zip(*looks, strict=True)),
    )
