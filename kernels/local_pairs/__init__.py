"""The pairs of a batch that one rank computes, where a kernel knows only its own experts; on CPU.

vLLM's CPU experts take local expert ids and no map; on GPUs they take global ids.
"""

from __future__ import annotations

import torch

from ..tensor_checks import require_dense, require_integers

__all__ = ["select"]


def select(
    topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor, local_P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The N pairs whose expert this rank holds, in token order.

    Args:
        topk_ids_TK: slot of each pair, int32 or int64 [T, K] contiguous. An id that is no slot (-1)
            is nobody's.
        topk_weights_TK: float32 [T, K] contiguous.
        local_P: local expert of each slot, int32 [P]; below 0 where another rank holds it.

    Returns:
        Token of each pair, int64 [N], not falling; its local expert, int32 [N]; its weight, float32
        [N]; and the first pair of each token, int64 [T].

    Raises:
        ValueError: a tensor has the wrong dtype, shape or device.
    """
    require_integers("the slots", topk_ids_TK, dim=2)
    if not topk_ids_TK.is_contiguous() or topk_weights_TK.shape != topk_ids_TK.shape:
        raise ValueError(
            f"slots and weights must be contiguous and [T, K] alike, got "
            f"{tuple(topk_ids_TK.shape)} and {tuple(topk_weights_TK.shape)}."
        )
    if not topk_ids_TK.is_cpu:
        raise ValueError(f"local_pairs takes tensors on the CPU, got {topk_ids_TK.device.type}.")
    device, num_pairs = topk_ids_TK.device, topk_ids_TK.numel()
    require_dense("weights", topk_weights_TK, torch.float32, at_least=num_pairs, device=device)
    require_dense("local_P", local_P, torch.int32, at_least=0, device=device)
    from .numba_cpu import select as backend

    token_N = torch.empty(num_pairs, dtype=torch.int64)
    expert_N = torch.empty(num_pairs, dtype=torch.int32)
    weight_N = torch.empty(num_pairs, dtype=torch.float32)
    first_T = torch.empty(len(topk_ids_TK), dtype=torch.int64)
    found = backend(topk_ids_TK, topk_weights_TK, local_P, (token_N, expert_N, weight_N, first_T))
    return token_N[:found], expert_N[:found], weight_N[:found], first_T
