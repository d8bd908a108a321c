"""What every rank knows of every other: a collective of vLLM's CPU groups."""

from __future__ import annotations

from typing import Any

import torch


def from_all_ranks(group: Any, own: Any) -> list[Any]:
    """What each rank of a vLLM group passes, in the order of ranks; a collective."""
    found: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(found, own, group=group.cpu_group)
    return found
