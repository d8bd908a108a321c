"""Will a balancer help here: candidates simulated on one traffic, compared, and a plain answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from vllm_balance.config import DEFAULT_DYNAMIC_SLOTS
from vllm_balance.errors import BalancerError
from vllm_balance.profiles import Profile
from vllm_balance.routing import FETCHING
from vllm_balance.simulate.acceptance import refusal, require_served
from vllm_balance.simulate.decisions import num_redundant
from vllm_balance.simulate.hardware import Hardware
from vllm_balance.simulate.layout import Layout
from vllm_balance.simulate.memory import has_room_for_weights, most_in_flight, most_requests
from vllm_balance.simulate.models import Model
from vllm_balance.simulate.outcome import Outcome
from vllm_balance.simulate.run import Arm, expert_times, simulate
from vllm_balance.simulate.slo_search import misses, most_within
from vllm_balance.simulate.steps import Load
from vllm_balance.simulate.traffic import Traffic

REDUNDANCIES = (1.125, 1.25, 1.5)
PLACING = ("eplb", "gem")
"""Balancers that gain without redundant experts, by where experts are."""
REPLICATING = ("eplb", "first_copy", "metro")
DYNAMIC_SLOTS = (2, DEFAULT_DYNAMIC_SLOTS)
"""Of `harmoeny`, per rank: the fewest that a server accepts, and its default."""
MAP = "MAP.json"
"""What `vllm-balance place` writes for `gem`."""
STEPS = 16
"""Simulated steps per candidate and concurrency, each the mean of many of a cycle."""
ALIKE = 0.01
"""Relative throughput up to which memory decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A deployment and its load."""

    model: Model
    hardware: Hardware
    layout: Layout
    prompt_tokens: int
    output_tokens: int
    traffic: Callable[[], tuple[Traffic, Traffic]]
    """Fresh traffic to serve and to place experts by, the same at every call."""
    profile: Profile | None = None
    concurrency: int | None = None
    """Requests in flight; None: as many as the SLO allows."""
    slo_tpot_us: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One balancer and redundancy at the concurrency that suits it."""

    balancer: str
    redundancy: float
    """Physical / logical experts; dynamic slots count."""
    concurrency: int
    """0: there is no room for what was asked for, or it misses the SLO."""
    outcome: Outcome | None

    @property
    def tokens_per_s(self) -> float:
        """Throughput; 0 if it cannot serve."""
        return 0.0 if self.outcome is None else self.outcome.tokens_per_s

    @property
    def redundant_bytes(self) -> float:
        """Memory of redundant experts on each rank; 0 if it cannot serve."""
        return 0.0 if self.outcome is None else self.outcome.redundant_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The candidates, the best one, and what it gains over no redundancy."""

    candidates: tuple[Candidate, ...]
    left_out: dict[str, tuple[str, ...]]
    """Balancers that a server would refuse, by the reason."""
    best: Candidate
    static_rate: float
    """Tokens per second without a balancer; at the requests asked for also if it misses the SLO."""
    gain: float
    """Relative throughput of the best over static; with requests asked for, at as many."""
    band: tuple[float, float]
    """The gain if its TPOT is longer, or shorter, by the error of predicted ratios. A little of
    TPOT is many requests where an SLO decides how many there are."""

    @property
    def worth_it(self) -> bool:
        """Whether the gain is positive at the lower end of its band."""
        return self.best.balancer != "static" and self.band[0] > 0

    @property
    def static_misses(self) -> bool:
        """Whether the SLO is kept only with a balancer."""
        return self.candidates[0].outcome is None


def advise(question: Question, error: float) -> Advice:
    """Simulates every candidate; where an SLO is searched, the others from where static met it.

    Args:
        error: of predicted ratios of TPOT, relative.

    Raises:
        BalancerError: neither a concurrency nor an SLO was given, an SLO for answers of one token,
            vLLM has not the model, its experts do not divide, or nothing can serve.
    """
    if question.concurrency is None and question.slo_tpot_us is None:
        raise BalancerError("Give the requests in flight, or an SLO for TPOT, or both.")
    if question.slo_tpot_us is not None and question.output_tokens < 2:
        raise BalancerError(
            "An SLO is for the time between the tokens of an answer, and answers of one token were "
            "asked for. Leave the SLO out, or ask for at least two tokens."
        )
    require_served(question.model, question.layout)
    static, *others = candidates(question)
    base = _candidate(question, *static)
    rate = base.tokens_per_s
    if base.outcome is None and question.concurrency is not None:
        rate = _candidate(replace(question, slo_tpot_us=None), *static).tokens_per_s
    if not rate:
        raise BalancerError(_cannot_serve(question))
    found = (base, *(_candidate(question, *each, near=base.concurrency) for each in others))
    if all(each.outcome is None for each in found):
        raise BalancerError(_cannot_serve(question))
    best = _cheapest_of_the_best(found)
    return Advice(
        candidates=found,
        left_out=left_out(question),
        best=best,
        static_rate=rate,
        gain=best.tokens_per_s / rate - 1,
        band=_band(question, best, rate, error),
    )


def _band(
    question: Question, best: Candidate, static_rate: float, error: float
) -> tuple[float, float]:
    """Gains of `best` if its TPOT is longer, or shorter, than predicted by a share `error`; none if
    it then misses the SLO at the requests asked for."""
    assert best.outcome is not None
    gains = []
    for factor in (1 + error, 1 - error):
        rate = best.tokens_per_s / factor
        if question.slo_tpot_us is not None and question.concurrency is None:
            kept = replace(question, slo_tpot_us=question.slo_tpot_us / factor)
            near = best.concurrency
            rate = _candidate(kept, best.balancer, best.redundancy, near).tokens_per_s / factor
        elif question.slo_tpot_us is not None:
            misses = factor * best.outcome.tpot_us > question.slo_tpot_us
            rate = min(rate, static_rate) if misses else rate
        gains.append(rate / static_rate - 1)
    return gains[0], gains[1]


def _cheapest_of_the_best(found: tuple[Candidate, ...]) -> Candidate:
    """Least memory among those that are as fast as the fastest, but for ALIKE."""
    most = max(candidate.tokens_per_s for candidate in found)
    close = [each for each in found if each.tokens_per_s >= (1 - ALIKE) * most]
    return min(close, key=lambda each: (each.redundant_bytes, -each.tokens_per_s))


def candidates(question: Question) -> tuple[tuple[str, float], ...]:
    """Balancers and redundancies that a server of this deployment would accept."""
    return tuple(each for each in _considered(question) if _refusal(question, *each) is None)


def left_out(question: Question) -> dict[str, tuple[str, ...]]:
    """Balancers of which a server would refuse some redundancy or all, by the reason."""
    found: dict[str, dict[str, None]] = {}
    for balancer, redundancy in _considered(question):
        reason = _refusal(question, balancer, redundancy)
        if reason is not None:
            found.setdefault(reason, {})[balancer] = None
    return {reason: tuple(names) for reason, names in found.items()}


def _considered(question: Question) -> tuple[tuple[str, float], ...]:
    experts, ranks = question.model.num_experts.value, question.layout.num_ranks
    ratios = dict.fromkeys(1 + num_redundant(experts, ranks, r) / experts for r in REDUNDANCIES)
    slots = [n for n in DYNAMIC_SLOTS if n <= experts - experts // ranks]
    return (
        ("static", 1.0),
        *((name, 1.0) for name in PLACING),
        *((name, ratio) for name in REPLICATING for ratio in ratios),
        *(("harmoeny", 1 + n * ranks / experts) for n in slots),
    )


def _refusal(question: Question, balancer: str, redundancy: float) -> str | None:
    model, layout = question.model, question.layout
    redundant = num_redundant(model.num_experts.value, layout.num_ranks, redundancy)
    return refusal(model, question.hardware, layout, balancer, redundant)


def settings_of(question: Question, candidate: Candidate) -> dict[str, float | str]:
    """What a server is told to be this candidate: keys of --moe-balancer-config."""
    if candidate.balancer == "static":
        return {}
    if candidate.balancer == "gem":
        return {"map": MAP}
    arm = _arm(question, candidate.balancer, candidate.redundancy, 1)
    if candidate.balancer in FETCHING:
        settings: dict[str, float | str] = {
            "dynamic_slots": arm.num_redundant // question.layout.num_ranks
        }
    else:
        settings = {"num_redundant_experts": arm.num_redundant}
    if candidate.balancer in ("metro", *FETCHING):
        settings["knee_tokens"] = knee_of(question, candidate)
    if candidate.balancer == "metro" and question.hardware.experts == "in_turn":
        settings["free_tokens"] = round(expert_times(arm).free_tokens, 1)
    return settings


def knee_of(question: Question, candidate: Candidate) -> float:
    """`knee_tokens` of a candidate's ranks, to a tenth."""
    arm = _arm(question, candidate.balancer, candidate.redundancy, 1)
    return round(expert_times(arm).knee_tokens, 1)


def flags_of(question: Question, candidate: Candidate) -> tuple[str, ...]:
    """Flags of `vllm serve` beside the balancer's own: what one that fetches needs on GPUs."""
    if candidate.balancer not in FETCHING or question.hardware.experts != "together":
        return ()
    arm = _arm(question, candidate.balancer, candidate.redundancy, 1)
    overlapping = ("--moe-backend triton",) if arm.hides_fetches else ()
    return ("--enforce-eager", *overlapping)


def host_bytes(question: Question, candidate: Candidate) -> float:
    """Host memory of a candidate that fetches: one copy of all experts; else 0."""
    if candidate.balancer not in FETCHING:
        return 0.0
    model = question.model
    return model.num_moe_layers * model.num_experts.value * model.expert_bytes


def _cannot_serve(question: Question) -> str:
    """Why not even static can."""
    fits, asked = _fits(question, "static", 1.0), question.concurrency
    name = question.model.name
    where = f"{question.layout.num_ranks} ranks of {question.hardware.name}"
    if not has_room_for_weights(question.model, question.hardware, question.layout):
        return (
            f"{name} takes {question.model.weight_bytes / 1e9:.0f} GB, which do not fit on "
            f"{where}. Use more ranks or a smaller number format."
        )
    if not fits:
        tokens = question.prompt_tokens + question.output_tokens
        return (
            f"The cache of one request of {tokens:,} tokens takes "
            f"{question.model.cache_bytes(tokens) / 1e9:.0f} GB, and does not fit on {where} "
            f"beside the weights of {name}. Ask for shorter ones, or use more ranks."
        )
    if asked is None:
        return (
            f"{name} on {where} misses the SLO even without balancing and with the least batch "
            f"(room for {fits:,} requests). Relax it or use faster hardware."
        )
    if asked > fits:
        return _too_many(question, asked, where)
    return (
        f"{name} on {where} misses the SLO at {asked:,} requests in flight, balanced or not. "
        f"Ask for fewer, relax the SLO, or use faster hardware."
    )


def _too_many(question: Question, asked: int, where: str) -> str:
    """Which bound more requests are asked for than."""
    model, machine, layout = question.model, question.hardware, question.layout
    tokens = question.prompt_tokens + question.output_tokens
    fits = most_requests(model, machine, layout, 0, tokens)
    if asked > fits:
        return (
            f"{asked:,} requests in flight were asked for; {fits:,} of {tokens:,} tokens fit on "
            f"{where} beside the weights of {model.name}. Ask for fewer or shorter ones, or use "
            f"more ranks."
        )
    each = machine.engine.sequences.value
    return (
        f"{asked:,} requests in flight were asked for; {layout.data} engines of at most {each:,} "
        f"each run {each * layout.data:,} at once, and the others would wait outside. Ask for "
        f"fewer, or raise --max-num-seqs, here and of the server."
    )


def _fits(question: Question, balancer: str, redundancy: float) -> int:
    """Requests that a candidate has room for."""
    redundant = _arm(question, balancer, redundancy, 1).num_redundant
    tokens = question.prompt_tokens + question.output_tokens
    return most_in_flight(question.model, question.hardware, question.layout, redundant, tokens)


def _arm(question: Question, balancer: str, redundancy: float, concurrency: int) -> Arm:
    return Arm(
        model=question.model,
        hardware=question.hardware,
        profile=question.profile,
        layout=question.layout,
        balancer=balancer,
        redundancy=redundancy,
        # vLLM's kernels that take tokens from an all-to-all compute all experts at once.
        prefetch="sync" if question.layout.dispatch == "all_to_all" else "async",
        load=Load(
            concurrency=concurrency,
            prompt_tokens=question.prompt_tokens,
            output_tokens=question.output_tokens,
            token_budget=question.hardware.engine.batched_tokens.value * question.layout.data,
            engines=question.layout.data,
            max_steps=STEPS,
        ),
    )


def _candidate(question: Question, balancer: str, redundancy: float, near: int = 0) -> Candidate:
    """At the concurrency asked for, or at the largest that keeps the SLO, `near` a first guess."""

    def at(concurrency: int) -> Outcome:
        return simulate(_arm(question, balancer, redundancy, concurrency), *question.traffic())

    room, asked = _fits(question, balancer, redundancy), question.concurrency
    slo_us = math.inf if question.slo_tpot_us is None else question.slo_tpot_us
    if asked is None:
        concurrency, made = most_within(slo_us, room, at, near)
    else:
        made = at(asked) if asked <= room else None
        if made is not None and question.slo_tpot_us is not None and misses(made, slo_us):
            made = None
        concurrency = 0 if made is None else asked
    return Candidate(
        balancer=balancer, redundancy=redundancy, concurrency=concurrency, outcome=made
    )
