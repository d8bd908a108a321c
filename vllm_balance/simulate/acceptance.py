"""What a server with the plugin would refuse, so that nothing is advised which cannot be had."""

from __future__ import annotations

from vllm_balance.deployment import MAX_REDUNDANT
from vllm_balance.errors import BalancerError
from vllm_balance.kernels.limits import sizes_and_limits
from vllm_balance.routing import FETCHING
from vllm_balance.simulate.hardware import Hardware
from vllm_balance.simulate.layout import Layout
from vllm_balance.simulate.models import Model

VLLM = "vLLM 0.32"


def require_served(model: Model, layout: Layout) -> None:
    """Returns if vLLM has the model, and each rank would hold as many of its experts.

    Raises:
        BalancerError: it has not, or they do not divide.
    """
    if model.support == "no model":
        raise BalancerError(
            f"{VLLM} has no model of the architecture {model.architecture}, so that no server of "
            f"{model.name} can be planned. The file is for comparing the simulator with what was "
            f"published. Choose a model that vLLM serves."
        )
    experts, ranks = model.num_experts.value, layout.num_ranks
    if experts % ranks:
        fitting = [str(n) for n in range(2, ranks) if experts % n == 0] or [str(experts)]
        raise BalancerError(
            f"{model.name} has {experts} experts, and {ranks} ranks were asked for, which would "
            f"hold different numbers of them; only equal ones are simulated. Use --data or "
            f"--tensor with one of {', '.join(fitting)}."
        )


def refusal(
    model: Model, hardware: Hardware, layout: Layout, balancer: str, num_redundant: int
) -> str | None:
    """Why a server would refuse a balancer, as a clause; None if it would not.

    Args:
        num_redundant: redundant experts or dynamic slots of a layer, over all ranks.
    """
    if balancer == "static":
        return None
    needs_eplb = balancer != "gem" or num_redundant > 0
    if needs_eplb and model.support in ("no eplb", "no map"):
        return (
            f"{VLLM} does not support EPLB for {model.architecture}, which redundant and moving "
            f"experts need"
        )
    if balancer == "gem" and model.support == "no map":
        return f"{VLLM} loads all experts of {model.architecture} at once; no map can place them"
    if balancer in FETCHING and (reason := _no_fetching(hardware, layout)):
        return reason
    if num_redundant > MAX_REDUNDANT:
        return (
            f"vLLM's EPLB takes {MAX_REDUNDANT:,} redundant experts and here are {num_redundant:,}"
        )
    if hardware.experts == "together":
        return _beyond_kernels(model, layout, balancer, num_redundant)
    return None


def _no_fetching(hardware: Hardware, layout: Layout) -> str | None:
    if hardware.host is None:
        return f"the file of {hardware.name} has no [host] link to fetch experts over"
    if layout.num_ranks > (layout.ranks_per_node or hardware.ranks_per_node.value):
        return "experts are fetched from one host store, and the ranks are on several machines"
    return None


def _beyond_kernels(model: Model, layout: Layout, balancer: str, num_redundant: int) -> str | None:
    """What is more than the GPU kernels take."""
    sizes = sizes_and_limits(
        balancer,
        num_ranks=layout.num_ranks,
        num_experts=model.num_experts.value,
        num_redundant=num_redundant,
    )
    for what, (size, most) in sizes.items():
        if size > most:
            return f"its GPU kernels take {most:,} {what} and here are {size:,}"
    return None
