"""Skewed routing for tests and benchmarks: placements and batches, all from a seed.

Nothing here reads a file. ``place`` uses a plain copy of the popular experts; benchmarks fit
vLLM's own EPLB placement instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_balance.kernels.assign import even_split
from vllm_balance.routing import RoutingPolicy
from vllm_balance.types import Demand, Placement

EVEN = ("eplb", "gem", "exflow")
"""Policies that spread an expert over its replicas, where it has some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One layer and one batch."""

    placement: Placement
    topk_ids_TK: np.ndarray
    """int32 [T, K]; -1 marks pairs that are no pair."""
    num_valid_tokens: int | None

    @property
    def table_ER(self) -> np.ndarray:
        return self.placement.logical_to_physical_ER.numpy()

    @property
    def num_replicas_E(self) -> np.ndarray:
        return self.placement.num_replicas_E.numpy()


def planned(policy: RoutingPolicy, tokens_E: torch.Tensor, placement: Placement) -> torch.Tensor:
    """Tokens for each replica, [E, R] int32, that a policy must give: by its plan, or for one that
    has none all to the first replica, or evenly, as vLLM's hash does on average."""
    if policy.counts_decide:
        return policy.plan(Demand(tokens_E=tokens_E), placement).split_ER
    table_ER = placement.logical_to_physical_ER
    if policy.name in EVEN:
        return even_split(tokens_E, placement.num_replicas_E, table_ER.shape[1])
    first_ER = torch.zeros(table_ER.shape, dtype=torch.int32)
    first_ER[:, 0] = tokens_E
    return first_ER


def popularity(num_experts: int, skew: float, rng: np.random.Generator) -> np.ndarray:
    """Zipf weights in random order, float64 [E], summing to 1; ``skew`` 0 is uniform."""
    weights_E = 1.0 / np.arange(1, num_experts + 1) ** skew
    return rng.permutation(weights_E / weights_E.sum())


def draw_topk(
    num_tokens: int, top_k: int, weights_E: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Distinct experts per token drawn by weight (Gumbel top-k), int32 [T, K]."""
    noise_TE = rng.gumbel(size=(num_tokens, len(weights_E))) + np.log(weights_E)
    return np.argsort(-noise_TE, axis=1)[:, :top_k].astype(np.int32)


def place(
    weights_E: np.ndarray, num_physical: int, num_ranks: int, rng: np.random.Generator
) -> Placement:
    """Replicas to the most loaded slots first (as EPLB does), slots shuffled over the ranks.

    Replicas of one expert may share a rank, as they may under EPLB.
    """
    num_experts = len(weights_E)
    replicas_E = np.ones(num_experts, np.int64)
    for _ in range(num_physical - num_experts):
        replicas_E[np.argmax(weights_E / replicas_E)] += 1
    slots_P = rng.permutation(np.repeat(np.arange(num_experts), replicas_E))
    return Placement.from_physical_to_logical(
        torch.from_numpy(slots_P), num_logical=num_experts, num_ranks=num_ranks
    )


def random_case(seed: int, *, max_experts: int = 64, max_tokens: int = 64) -> Case:
    """Any shape: odd sizes, no tokens, one expert, all tokens to one expert, padding, -1 ids."""
    rng = np.random.default_rng(seed)
    num_ranks = int(rng.choice([1, 2, 3, 4, 5, 8, 16, 32, 64]))
    num_experts = int(rng.integers(1, max_experts + 1))
    least = -(-num_experts // num_ranks)
    slots = int(rng.integers(least, 2 * least + 2))
    weights_E = popularity(num_experts, float(rng.choice([0.0, 0.8, 1.5])), rng)
    shuffled_E = rng.permutation(weights_E) if rng.random() < 0.3 else weights_E
    placement = place(shuffled_E, slots * num_ranks, num_ranks, rng)
    num_tokens = int(rng.integers(0, max_tokens + 1)) if rng.random() < 0.9 else 0
    top_k = int(rng.integers(1, min(8, num_experts) + 1))
    ids_TK = draw_topk(num_tokens, top_k, weights_E, rng)
    kind = rng.random()
    if kind < 0.1:
        ids_TK[:] = rng.integers(num_experts)
    elif kind < 0.4:
        ids_TK[rng.random(ids_TK.shape) < 0.2] = -1
    valid = int(rng.integers(0, num_tokens + 1)) if rng.random() < 0.5 else None
    return Case(placement=placement, topk_ids_TK=ids_TK, num_valid_tokens=valid)


def bounded_replicas(case: Case, most: int) -> bool:
    """Whether no expert has more than ``most`` replicas."""
    return int(case.num_replicas_E.max()) <= most
