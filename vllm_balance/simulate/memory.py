"""What a deployment has room for: weights, redundant experts, and so many requests."""

from __future__ import annotations

from vllm_balance.simulate.hardware import Hardware
from vllm_balance.simulate.layout import Layout
from vllm_balance.simulate.models import Model

USABLE = 0.92
"""vLLM's default --gpu-memory-utilization."""


def weight_bytes(model: Model, layout: Layout, num_redundant: int) -> float:
    """Weights on one rank: its experts, and its part of everything else."""
    experts = (model.num_experts.value + num_redundant) / layout.num_ranks
    own = experts * model.num_moe_layers * model.expert_bytes
    whole = model.num_layers.value * model.replicated_weights * model.dense_weight.value
    return own + whole + (model.dense_bytes - whole) / layout.tensor


def has_room_for_weights(model: Model, hardware: Hardware, layout: Layout) -> bool:
    """Whether the weights, without redundant experts, leave any memory."""
    return weight_bytes(model, layout, 0) < USABLE * hardware.memory.value


def most_requests(
    model: Model, hardware: Hardware, layout: Layout, num_redundant: int, tokens: int
) -> int:
    """Requests of `tokens` tokens whose cache fits, over all ranks; 0 if weights do not fit.

    What activations, CUDA graphs and communication buffers take is not known here.
    """
    free = USABLE * hardware.memory.value - weight_bytes(model, layout, num_redundant)
    split = 1 if model.latent else min(layout.tensor, max(model.num_kv_heads.value, 1))
    each = model.cache_bytes(tokens) / split
    return layout.data * max(0, int(free / each))


def most_in_flight(
    model: Model, hardware: Hardware, layout: Layout, num_redundant: int, tokens: int
) -> int:
    """Requests of `tokens` tokens that fit and that vLLM's engines run at once, over all ranks."""
    fit = most_requests(model, hardware, layout, num_redundant, tokens)
    return min(fit, hardware.engine.sequences.value * layout.data)
