"""Will a balancer help here: candidates simulated on one traffic, compared, and a plain answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from vllm_balance.errors import BalancerError
from vllm_balance.profiles import Profile
from vllm_balance.simulate.hardware import Hardware
from vllm_balance.simulate.layout import Layout
from vllm_balance.simulate.memory import most_requests
from vllm_balance.simulate.models import Model
from vllm_balance.simulate.outcome import Outcome
from vllm_balance.simulate.run import Arm, simulate
from vllm_balance.simulate.serving import Load
from vllm_balance.simulate.traffic import Traffic

REDUNDANCIES = (1.125, 1.25, 1.5)
CANDIDATES = (
    ("static", 1.0),
    *((name, ratio) for name in ("eplb", "first_copy", "metro") for ratio in REDUNDANCIES),
)
FETCHING_CANDIDATES = (("harmoeny", 1.125), ("harmoeny", 1.25))
"""Where experts can be fetched from host memory; the ratio counts dynamic slots."""
STEPS = 16
"""Simulated steps per candidate and concurrency."""
TRIES = 7
"""Concurrencies tried to find the largest that keeps an SLO."""
ALIKE = 0.01
"""Relative throughput up to which memory decides."""
MOST = 4096
"""Requests in flight up to which a throughput is looked for."""


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
    concurrency: int
    """0: it does not fit in memory, or misses the SLO with the least batch."""
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
    best: Candidate
    gain: float
    """Relative throughput of the best over static; without an SLO, at equal requests in flight."""
    error: float
    """Half width of the band around the gain."""

    @property
    def worth_it(self) -> bool:
        """Whether the gain is positive at the lower end of its band."""
        return self.best.balancer != "static" and self.gain > self.error


def advise(question: Question, error: float) -> Advice:
    """Simulates every candidate.

    Raises:
        BalancerError: neither a concurrency nor an SLO was given, or not even static can serve.
    """
    if question.concurrency is None and question.slo_tpot_us is None:
        raise BalancerError("Give the requests in flight, or an SLO for TPOT, or both.")
    found = tuple(_candidate(question, *each) for each in candidates(question))
    base = found[0]
    if base.outcome is None:
        raise BalancerError(_cannot_serve(question))
    best = _cheapest_of_the_best(found)
    gain = best.tokens_per_s / base.tokens_per_s - 1
    return Advice(candidates=found, best=best, gain=gain, error=error)


def _cheapest_of_the_best(found: tuple[Candidate, ...]) -> Candidate:
    """Least memory among those that are as fast as the fastest, but for ALIKE."""
    most = max(candidate.tokens_per_s for candidate in found)
    close = [each for each in found if each.tokens_per_s >= (1 - ALIKE) * most]
    return min(close, key=lambda each: (each.redundant_bytes, -each.tokens_per_s))


def candidates(question: Question) -> tuple[tuple[str, float], ...]:
    """Balancers and redundancies that this deployment could use."""
    even = question.model.num_experts.value % question.layout.num_ranks == 0
    if question.hardware.host is None or not even:
        return CANDIDATES
    return CANDIDATES + FETCHING_CANDIDATES


def _cannot_serve(question: Question) -> str:
    fits = _fits(question, "static", 1.0)
    ranks, name = question.layout.num_ranks, question.hardware.name
    if not fits:
        return (
            f"{question.model.name} takes {question.model.weight_bytes / 1e9:.0f} GB, which do not "
            f"fit on {ranks} ranks of {name}. Use more ranks or a smaller number format."
        )
    return (
        f"{question.model.name} on {ranks} ranks of {name} misses the SLO even without balancing "
        f"and with the least batch (room for {fits} requests). Relax it or use faster hardware."
    )


def _fits(question: Question, balancer: str, redundancy: float) -> int:
    tokens = question.prompt_tokens + question.output_tokens
    redundant = _arm(question, balancer, redundancy, 1).num_redundant
    return most_requests(question.model, question.hardware, question.layout, redundant, tokens)


def _arm(question: Question, balancer: str, redundancy: float, concurrency: int) -> Arm:
    return Arm(
        model=question.model,
        hardware=question.hardware,
        profile=question.profile,
        layout=question.layout,
        balancer=balancer,
        redundancy=redundancy,
        load=Load(
            concurrency=concurrency,
            prompt_tokens=question.prompt_tokens,
            output_tokens=question.output_tokens,
            token_budget=max(2048 * question.layout.data, 2 * concurrency),
            max_steps=STEPS,
        ),
    )


def _candidate(question: Question, balancer: str, redundancy: float) -> Candidate:
    """At the concurrency asked for, or at the largest that keeps the SLO."""

    def at(concurrency: int) -> Candidate:
        arm = _arm(question, balancer, redundancy, concurrency)
        made = simulate(arm, *question.traffic())
        late = question.slo_tpot_us is not None and made.tpot_us > question.slo_tpot_us
        return replace(none, concurrency=concurrency, outcome=None if late else made)

    none = Candidate(balancer=balancer, redundancy=redundancy, concurrency=0, outcome=None)
    room = _fits(question, balancer, redundancy)
    if question.concurrency is not None:
        return at(question.concurrency) if question.concurrency <= room else none
    high, best = min(room, MOST), none
    if high < 1:
        return none
    low = 0
    tried = high
    for _ in range(TRIES):
        found = at(tried)
        if found.outcome is None:
            high = tried
        else:
            low, best = tried, found
        if low >= high or high - low <= 1:
            break
        tried = max(low + 1, round((max(low, 1) * high) ** 0.5))
    return best
