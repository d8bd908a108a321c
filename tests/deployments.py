"""Deployments to check settings against, and what a refusal must look like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vllm_balance.deployment import Deployment
from vllm_balance.errors import BalancerError


def deployment(**changes: Any) -> Deployment:
    """Two CPU ranks with plenty of memory that serve 3 MoE layers of 128 experts."""
    facts = {
        "model": "some/model",
        "num_experts": 128,
        "num_moe_layers": 3,
        "expert_bytes": 1000,
        "num_ranks": 2,
        "enable_expert_parallel": True,
        "free_bytes": 2**40,
        "ranks_sharing_memory": 2,
        "free_host_bytes": 2**40,
        "on_cpu": True,
        "is_eager": False,
        "one_machine": True,
    }
    return Deployment(**(facts | changes))


def refusal(call: Callable[..., Any], *arguments: Any) -> str:
    """The one paragraph that the call raises."""
    with pytest.raises(BalancerError) as raised:
        call(*arguments)
    text = str(raised.value)
    assert "\n" not in text and text.endswith(".")
    return text
