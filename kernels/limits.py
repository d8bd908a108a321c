"""The largest layers that the GPU kernels take.

One program holds a layer in registers without spilling. Here without Triton, for those who must
know it before anything runs on a GPU.
"""

MAX_EXPERTS = 512
"""Logical experts of a layer; METRO only."""
MAX_PHYSICAL = 1024
"""Physical experts of a layer."""
MAX_RANKS = 64
MAX_PAIRS = 2**20
"""(Token, choice) pairs that METRO's kernel chooses for; larger batches are spread without it."""


def sizes_and_limits(
    balancer: str, *, num_ranks: int, num_experts: int, num_redundant: int
) -> dict[str, tuple[int, int]]:
    """What the kernels of a balancer are asked to take, and the most that they do, by its name.

    Args:
        num_redundant: physical experts of a layer beyond the logical ones.
    """
    sizes = {
        "ranks": (num_ranks, MAX_RANKS),
        "physical experts": (num_experts + num_redundant, MAX_PHYSICAL),
    }
    if balancer == "metro":
        sizes["experts"] = (num_experts, MAX_EXPERTS)
    return sizes
