"""Checks of tensors before their addresses are handed to a kernel."""

from __future__ import annotations

import torch

INTEGERS = (torch.int32, torch.int64)


def require_integers(name: str, tensor: torch.Tensor, *, dim: int) -> None:
    """Returns if the tensor is int32 or int64, has ``dim`` axes and a dense last axis.

    Raises:
        ValueError: otherwise.
    """
    if tensor.dtype not in INTEGERS or tensor.dim() != dim:
        raise ValueError(
            f"{name} must be int32 or int64 with {dim} axes, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}."
        )
    if tensor.numel() and tensor.stride(-1) != 1:
        raise ValueError(f"the last axis of {name} must be dense, got strides {tensor.stride()}.")


def require_dense(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, *, at_least: int, device: torch.device
) -> None:
    """Returns if the tensor is a dense buffer of ``dtype`` on ``device``, long enough.

    Raises:
        ValueError: otherwise.
    """
    if (
        tensor.dtype is not dtype
        or not tensor.is_contiguous()
        or tensor.numel() < at_least
        or tensor.device != device
    ):
        raise ValueError(
            f"{name} must be a contiguous {dtype} tensor of at least {at_least} elements on "
            f"{device}, got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}."
        )


def require_routing_buffers(
    ids_TK: torch.Tensor,
    num_ranks: int,
    num_physical: int,
    load_P: torch.Tensor | None,
    record_enabled: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
    counters: torch.Tensor | None,
    counters_size: int,
) -> None:
    """Returns if ids and the buffers that routing reads and adds to fit together.

    Raises:
        ValueError: otherwise.
    """
    device = ids_TK.device
    require_integers("the expert ids", ids_TK, dim=2)
    if not ids_TK.is_contiguous():
        raise ValueError(f"the expert ids must be contiguous, got strides {ids_TK.stride()}.")
    if num_ranks < 1 or num_physical < 1 or num_physical % num_ranks:
        raise ValueError(
            f"{num_physical} physical experts do not divide over {num_ranks} ranks; "
            f"each rank needs the same number of slots."
        )
    if load_P is not None:
        require_dense("load_P", load_P, torch.int32, at_least=num_physical, device=device)
    if record_enabled is not None:
        require_dense("record_enabled", record_enabled, torch.bool, at_least=1, device=device)
    if num_valid_tokens is not None:
        require_dense("num_valid_tokens", num_valid_tokens, torch.int32, at_least=1, device=device)
    if counters is not None:
        require_dense("counters", counters, torch.int64, at_least=counters_size, device=device)


def require_map(
    ids_TK: torch.Tensor, logical_to_physical_ER: torch.Tensor, num_replicas_E: torch.Tensor
) -> None:
    """Returns if the map of logical to physical experts is well-formed and beside the ids.

    Raises:
        ValueError: otherwise.
    """
    require_integers("logical_to_physical_ER", logical_to_physical_ER, dim=2)
    require_integers("num_replicas_E", num_replicas_E, dim=1)
    if logical_to_physical_ER.shape[0] != num_replicas_E.shape[0]:
        raise ValueError(
            f"logical_to_physical_ER has {logical_to_physical_ER.shape[0]} experts, "
            f"num_replicas_E {num_replicas_E.shape[0]}."
        )
    if logical_to_physical_ER.device != ids_TK.device or num_replicas_E.device != ids_TK.device:
        raise ValueError(
            f"ids on {ids_TK.device}, map on {logical_to_physical_ER.device}, replica counts on "
            f"{num_replicas_E.device}: put all on one device."
        )


def require_out(ids_TK: torch.Tensor, out: torch.Tensor) -> None:
    """Returns if ``out`` can take the physical ids.

    Raises:
        ValueError: otherwise.
    """
    if out.shape != ids_TK.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, the ids {tuple(ids_TK.shape)}.")
    if out.numel() and out.data_ptr() == ids_TK.data_ptr():
        raise ValueError("out must not be the ids themselves: kernels read ids while they write.")
    require_dense("out", out, ids_TK.dtype, at_least=ids_TK.numel(), device=ids_TK.device)


def unsupported_device(operation: str, tensor: torch.Tensor) -> ValueError:
    """The error for a tensor on a device for which there is no kernel."""
    return ValueError(
        f"{operation} has kernels for tensors on cpu (numba) and cuda (Triton), "
        f"got one on {tensor.device.type}. Move the tensors to one of these."
    )
