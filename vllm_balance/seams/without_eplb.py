"""What is said where vLLM's EPLB cannot move a model's experts, and the balancer needs it to."""

from __future__ import annotations

from vllm_balance.errors import BalancerError


def without_eplb(name: str, found: str) -> BalancerError:
    """The error of a balancer that needs vLLM's EPLB.

    Args:
        name: of the balancer.
        found: what stands against EPLB, the end of a sentence.
    """
    return BalancerError(
        f"--moe-balancer {name} needs vLLM's EPLB for redundant or moving experts, and {found}. "
        f"Use --moe-balancer static, or gem or exflow with a map without redundant experts, or "
        f"another checkpoint, or remove --moe-balancer."
    )
