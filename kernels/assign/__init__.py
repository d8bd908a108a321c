"""General assignment: any split of an expert's tokens over its replicas, pair by pair.

The n-th occurrence of an expert in global token order goes to the replica whose cumulative split
covers n, so every rank that knows the split and the number of occurrences on the ranks before it
decides the same without communication.
"""

from __future__ import annotations

import torch

from ..custom_op import call, register
from ..tensor_checks import (
    require_dense,
    require_integers,
    require_routing_buffers,
    unsupported_device,
)

__all__ = ["assign", "even_split"]


def even_split(tokens_E: torch.Tensor, num_replicas_E: torch.Tensor, R: int) -> torch.Tensor:
    """Tokens per replica, int32 [E, R]: n // r each, the remainder to replicas in turn.

    The first replica to get one more is ``(e + n // r) % r``: it differs from expert to expert and
    from batch to batch, so that no replica is favoured by its number. Any device.
    """
    tokens = tokens_E.to(torch.int32)[:, None]
    replicas = num_replicas_E.to(torch.int32).clamp(min=1)[:, None]
    base, rest = tokens // replicas, tokens % replicas
    experts = torch.arange(tokens_E.shape[0], dtype=torch.int32, device=tokens_E.device)[:, None]
    columns = torch.arange(R, dtype=torch.int32, device=tokens_E.device)[None]
    extra = (columns - experts - base) % replicas < rest
    return torch.where(columns < replicas, base + extra, 0).to(torch.int32)


def _run(
    topk_ids: torch.Tensor,
    split: torch.Tensor,
    logical_to_physical: torch.Tensor,
    offset: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if topk_ids.is_cpu:
        from .numba_cpu import assign as backend
    elif topk_ids.is_cuda:
        from .triton_gpu import assign as backend
    else:
        raise unsupported_device("assign", topk_ids)
    out = torch.empty_like(topk_ids) if out is None else out
    backend(topk_ids, split, logical_to_physical, offset, num_valid_tokens, out)
    return out


_op = register(
    "assign(Tensor topk_ids, Tensor split, Tensor logical_to_physical, Tensor? offset, "
    "Tensor? num_valid_tokens) -> Tensor",
    _run,
    lambda topk_ids, *_: torch.empty_like(topk_ids),
)


def assign(
    topk_ids_TK: torch.Tensor,
    split_ER: torch.Tensor,
    logical_to_physical_ER: torch.Tensor,
    offset_E: torch.Tensor | None = None,
    num_valid_tokens: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Slot of each pair, [T, K] with the dtype of the ids; -1 where the id is no expert.

    Args:
        topk_ids_TK: logical expert ids, int32 or int64 [T, K] contiguous.
        split_ER: tokens of each expert for each replica in the global batch, int32 [E, R]; not
            negative, zero where there is no replica.
        logical_to_physical_ER: slots, int32 or int64 [E, R or wider], last axis dense, -1 behind
            the last replica.
        offset_E: occurrences of each expert on the ranks before this one, int32 or int64 [E];
            None: this rank sees the batch from its first token on.
        num_valid_tokens: int32, one element: rows from here on are padding. They use up no share
            and go to the expert's first replica with a share, without one to its first replica.
        out: [T, K] of the ids' dtype, not the ids themselves; allocated if None.

    Occurrences behind the end of an expert's split go to its last replica with a share.

    Raises:
        ValueError: a tensor has the wrong dtype, shape or device.
    """
    device = topk_ids_TK.device
    require_routing_buffers(topk_ids_TK, 1, 1, None, None, num_valid_tokens, None, 0)
    require_integers("logical_to_physical_ER", logical_to_physical_ER, dim=2)
    require_integers("split_ER", split_ER, dim=2)
    num_experts, num_columns = split_ER.shape
    if (
        split_ER.dtype is not torch.int32
        or logical_to_physical_ER.shape[0] != num_experts
        or logical_to_physical_ER.shape[1] < num_columns
        or not num_columns
        or logical_to_physical_ER.device != device
        or split_ER.device != device
    ):
        raise ValueError(
            f"split_ER must be int32 [E, R] and logical_to_physical_ER [E, R or wider] on "
            f"{device}; got {split_ER.dtype} {tuple(split_ER.shape)} on {split_ER.device} and "
            f"{tuple(logical_to_physical_ER.shape)} on {logical_to_physical_ER.device}."
        )
    if offset_E is not None:
        require_integers("offset_E", offset_E, dim=1)
        require_dense("offset_E", offset_E, offset_E.dtype, at_least=num_experts, device=device)
    arguments = (topk_ids_TK, split_ER, logical_to_physical_ER, offset_E, num_valid_tokens)
    return call(_op, _run, arguments, out)
