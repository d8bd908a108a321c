"""The hub: one arm, a model on a machine under a balancer, simulated step by step."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vllm_balance.errors import BalancerError
from vllm_balance.placement import TRACED, Cluster
from vllm_balance.profiles import Profile
from vllm_balance.routing import FETCHING
from vllm_balance.simulate.decisions import (
    Decider,
    num_redundant,
    placement_policy,
    placements,
    policy_of,
)
from vllm_balance.simulate.dense_times import DenseTimes
from vllm_balance.simulate.expert_times import ExpertTimes, measured, roofline
from vllm_balance.simulate.fetches import (
    FetchingDecider,
    fetch_us,
    fetching_policy,
    with_fetches,
)
from vllm_balance.simulate.hardware import Hardware, is_in_format_of
from vllm_balance.simulate.layout import Layout
from vllm_balance.simulate.links import Network
from vllm_balance.simulate.machine_speed import AS_PROFILED, MachineSpeed
from vllm_balance.simulate.models import Model
from vllm_balance.simulate.outcome import Outcome
from vllm_balance.simulate.serving import schedule
from vllm_balance.simulate.steps import Load, Steps
from vllm_balance.simulate.traffic import Traffic
from vllm_balance.traces import Trace

Array = np.ndarray[Any, np.dtype[Any]]
HISTORY_STEPS, HISTORY_TOKENS = 64, 256
"""Batches that experts are placed by; their size where it does not matter."""
MOST_HISTORY_TOKENS = 4096
"""Of a batch as large as a step of the load: half the rows of a drawn skew."""
PROFILED_MATRICES = 3
"""Of an expert that `vllm-balance profile` measures: gate, up and down."""
_QUANTISED_BYTES = 1 + 4 / 128
"""Of a value of a hidden state on its way to experts in FP8: vLLM quantises tokens before they
travel, with a 32-bit scale for 128 values. Results come back as they are."""
_IDS_BYTES = 8
"""An expert id and its weight, per pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """Everything that a simulated run depends on."""

    model: Model
    hardware: Hardware
    layout: Layout
    load: Load
    balancer: str
    redundancy: float = 1.0
    profile: Profile | None = None
    """Measured expert times in place of the roofline."""
    seed: int = 0
    prefetch: Literal["async", "sync"] = "async"
    """`sync`: experts that are there wait for fetched ones too; on CPUs nothing hides a fetch."""
    warm: tuple[Load, ...] = ()
    """Loads that were served before: traffic went on, and dynamic slots were filled."""
    placed_by: str | None = None
    """The policy that made the map of a balancer which takes one; None: its own."""
    known_trace: Trace | None = None
    """Tokens that experts are placed by, for policies of `TRACED`."""
    known_batches: tuple[tuple[int, int], ...] = ()
    """Decoding and prompt tokens of the batches that experts are placed by; empty: in proportion
    to the load's."""
    slowness: tuple[float, ...] = (1.0,)
    """How many times longer each rank takes for all that it computes, but not for links, fetches,
    steps and requests; one number stands for all ranks."""
    speed: MachineSpeed = AS_PROFILED
    """Of the machine as a whole while the load is served, where ranks share its memory and send by
    it. Nothing is placed or decided by it."""

    @property
    def num_redundant(self) -> int:
        """Redundant experts or dynamic slots in each layer, over all ranks."""
        if self.balancer == "static":
            return 0
        return num_redundant(self.model.num_experts.value, self.layout.num_ranks, self.redundancy)

    @property
    def hides_fetches(self) -> bool:
        """Fetches run beside the experts that are there: if vLLM's Triton experts compute them.

        These take no weights of less than 8 bits.
        """
        by_triton = self.hardware.experts == "together" and self.model.expert_weight.value >= 1
        return by_triton and self.prefetch == "async"

    @property
    def redundant_bytes(self) -> float:
        """Memory that they take on each rank, in all layers."""
        own = self.num_redundant / self.layout.num_ranks * self.model.num_moe_layers
        return own * self.model.expert_bytes


def simulate(arm: Arm, traffic: Traffic, placed_by: Traffic) -> Outcome:
    """Runs an arm on `traffic`, with experts placed by the load of `placed_by`.

    The two traffics hold the simulated layers, which stand for all MoE layers of the model in equal
    parts. Both are advanced.

    Raises:
        BalancerError: the parts do not fit together.
    """
    window = arm.model.window.tokens.value if arm.model.window else None
    steps = schedule(arm.load, window=window, seed=arm.seed)
    whole_N2 = steps.whole_N2
    network = Network.of(arm.hardware, arm.layout.ranks_per_node)
    dense = DenseTimes(model=arm.model, hardware=arm.hardware, layout=arm.layout, network=network)
    decider = decider_of(arm, placed_by, steps)
    _serve_before(arm, traffic, decider, whole_N2)
    stage = _MoeStage(arm, decider, network)
    rows = [stage.step(traffic, decode, prefill) for decode, prefill in whole_N2.tolist()]
    columns = np.array(rows).T * (arm.model.num_moe_layers / traffic.num_layers)
    names = ("exchange", "decide", "dispatch", "experts", "combine")
    tokens_N, memory = steps.whole_N2.sum(1), arm.speed.memory
    longer_N = arm.speed.at(tokens_N) * stage.times.slowest(arm.slowness, tokens_N)
    return Outcome(
        steps=steps,
        stage_us={
            "attention": longer_N * dense.attention_us(steps),
            "rest": longer_N * dense.rest_us(steps) + memory * dense.served_us(steps),
            **dict(zip(names, columns[:5], strict=True)),
        },
        busy_us_N=columns[5],
        activated_N=columns[6],
        pairs_N=columns[7],
        request_us=arm.speed.cores * arm.hardware.fixed.request.value,
        request_beside_us=arm.speed.cores * arm.hardware.fixed.request_beside.value,
        redundant_bytes=arm.redundant_bytes,
    )


def _serve_before(
    arm: Arm, traffic: Traffic, decider: Decider | FetchingDecider, whole_N2: Array
) -> None:
    """Serves what came before the load, whose steps have so many tokens: what warmed up, and before
    a steady load, for dynamic slots, its largest step."""
    fetches = isinstance(decider, FetchingDecider)
    before = [schedule(load, seed=arm.seed).whole_N2 for load in arm.warm]
    if arm.load.steady and fetches:
        before.append(whole_N2[whole_N2.sum(1).argmax()][None])
    for tokens_2 in itertools.chain(*before):
        ids_LTK = traffic.batch(*tokens_2.tolist())
        if fetches:
            decider.slots(ids_LTK)


def decider_of(
    arm: Arm, placed_by: Traffic, steps: Steps | None = None
) -> Decider | FetchingDecider:
    """The balancer of an arm, on placements for the load of `placed_by`.

    Args:
        steps: of the arm's load, if they are known already.
    """
    ranks, slots = arm.layout.num_ranks, arm.num_redundant
    times = expert_times(arm)
    knee = times.knee_tokens
    free = times.free_tokens if arm.hardware.experts == "in_turn" else None
    if arm.balancer in FETCHING:
        fetching = fetching_policy(
            arm.balancer, arm.model, arm.hardware, knee, hidden=arm.hides_fetches
        )
        num_experts = arm.model.num_experts.value
        return FetchingDecider.of(
            fetching, placed_by.num_layers, num_experts, ranks, slots // ranks
        )
    policy = policy_of(arm.balancer, knee, free)
    placement = arm.placed_by or placement_policy(arm.balancer, slots)
    cluster = Cluster(
        costs=times.curves(ranks),
        num_redundant=slots,
        num_nodes=_num_nodes(arm),
        num_groups=arm.model.num_groups.value if arm.model.num_groups else 1,
    )
    known: Array | Trace | None = arm.known_trace
    if placement not in TRACED:
        known = placed_by.history(_history_tokens(arm, steps))
    if known is None:
        raise BalancerError(
            f"{placement} places experts by the tokens of a trace, and none was given as "
            f"known_trace. Give one of the simulated layers, or choose another balancer."
        )
    return Decider.of(policy, placements(placement, known, cluster))


def _num_nodes(arm: Arm) -> int:
    """As vLLM's EPLB counts them: one if ranks do not divide over them."""
    ranks = arm.layout.num_ranks
    nodes = math.ceil(ranks / (arm.layout.ranks_per_node or arm.hardware.ranks_per_node.value))
    return 1 if ranks % nodes else nodes


def _history_tokens(arm: Arm, steps: Steps | None) -> Array:
    """Decoding and prompt tokens of each batch that experts are placed by, [N, 2].

    In the load's proportion. vLLM's EPLB adds batches up, so that their size does not matter. GEM
    weighs one against the other, and is given batches as large as the steps of the load.
    """
    load = arm.load
    if arm.known_batches:
        return np.array(arm.known_batches)
    if arm.balancer != "gem":
        computed = load.prompt_tokens + load.output_tokens - 1
        prompts = round(HISTORY_TOKENS * load.prompt_tokens / computed)
        return np.full((HISTORY_STEPS, 2), (HISTORY_TOKENS - prompts, prompts))
    steps = steps or schedule(load, seed=arm.seed)
    share = steps.times_N / steps.times_N.sum()
    drawn_N = np.random.default_rng(arm.seed).choice(len(share), HISTORY_STEPS, p=share)
    tokens_N2 = steps.whole_N2[drawn_N]
    most = np.maximum(tokens_N2.sum(1, keepdims=True) / MOST_HISTORY_TOKENS, 1)
    return (tokens_N2 / most).astype(np.int64)


def expert_times(arm: Arm) -> ExpertTimes:
    """Measured times where the profile is of experts in the model's format, in proportion to their
    weights; else the roofline. Slow ranks have rows of their own."""
    return _at_full_speed(arm).slowed(arm.slowness, arm.layout.num_ranks)


def _at_full_speed(arm: Arm) -> ExpertTimes:
    profile, model = arm.profile, arm.model
    if profile is None or not is_in_format_of(profile, model):
        return roofline(model, arm.hardware)
    served = arm.hardware.efficiency.served_experts
    profiled_weights = PROFILED_MATRICES * profile.shape.hidden * profile.shape.inner
    size = model.expert_weights / profiled_weights
    return measured(profile).of_size(size).at(served.value if served else 1.0)


class _MoeStage:
    """The part of a layer that the balancer is in."""

    def __init__(self, arm: Arm, decider: Decider | FetchingDecider, network: Network) -> None:
        self.arm, self.decider, self.network = arm, decider, network
        self.times, self.memory = expert_times(arm).on(arm.speed), arm.speed.memory
        decide_us = arm.hardware.decide_us(arm.balancer, arm.model.num_experts.value)
        self.decide_us = max(arm.slowness) * self.memory * decide_us
        fetched_us = fetch_us(arm.model, arm.hardware) if arm.balancer in FETCHING else 0.0
        self.fetch_us = self.memory * fetched_us

    def step(self, traffic: Traffic, num_decode: int, num_prefill: int) -> tuple[float, ...]:
        """(exchange, decide, dispatch, experts, combine, mean over ranks of experts, lambda,
        N_max), times in microseconds, all summed over the simulated layers."""
        tokens_LP, fetched_LS = self.decider.slots(traffic.batch(num_decode, num_prefill))
        time_LS, activated_LS, pairs_LS = self.times.of(tokens_LP, self.decider.num_ranks)
        busy = float(time_LS.mean(1).sum())
        if fetched_LS is not None:
            hidden = self.arm.hides_fetches
            time_LS = with_fetches(time_LS, activated_LS, fetched_LS, self.fetch_us, hidden=hidden)
        layers = len(tokens_LP)
        sent = self._network(num_decode + num_prefill, pairs_LS)
        exchange, dispatch, combine = (self.memory * each for each in sent)
        return (
            layers * exchange,
            layers * self.decide_us,
            dispatch,
            float(time_LS.max(1).sum()),
            combine,
            busy,
            float(activated_LS.max(1).sum()),
            float(pairs_LS.max(1).sum()),
        )

    def _network(self, num_tokens: int, pairs_LS: Array) -> tuple[float, float, float]:
        """Exchange of one layer; dispatch and combine of all."""
        layout, network, layers = self.arm.layout, self.network, len(pairs_LS)
        ranks = layout.num_ranks
        model = self.arm.model
        state = model.hidden.value * model.activation_bytes
        if layout.data == 1:
            return 0.0, 0.0, layers * network.all_reduce_us(num_tokens * state, ranks)
        narrow = model.hidden.value * (
            _QUANTISED_BYTES if model.expert_number == "float8" else model.activation_bytes
        )
        if layout.dispatch == "all_gather":
            sent = num_tokens * (narrow + model.top_k.value * _IDS_BYTES)
            gather = network.all_gather_us(sent, ranks)
            scatter = network.reduce_scatter_us(num_tokens * state, ranks)
            return 0.0, layers * gather, layers * scatter
        counts = 4 * ranks * model.num_experts.value
        asks = self.decider.policy.counts_decide
        exchange = network.all_reduce_us(counts, ranks) if asks else 0.0
        busiest_L = pairs_LS.max(1)
        sent_L = busiest_L * narrow
        dispatch = sum(network.all_to_all_us(float(sent), ranks) for sent in sent_L)
        combine = sum(network.all_to_all_us(float(pairs * state), ranks) for pairs in busiest_L)
        return exchange, dispatch, combine
