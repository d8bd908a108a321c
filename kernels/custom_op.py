"""Registers operations with PyTorch, so that torch.compile and CUDA graphs see one opaque call."""

from __future__ import annotations

from collections.abc import Callable

import torch

NAMESPACE = "vllm_balance"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(
    schema: str, run: Callable[..., object], fake: Callable[..., object]
) -> Callable[..., object]:
    """The registered operation, callable under torch.compile.

    Args:
        schema: name and arguments in PyTorch's schema language, mutated ones marked ``Tensor(a!)``.
        run: what executes on CPU and CUDA tensors.
        fake: returns outputs with the right shapes and dtypes, without data.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
