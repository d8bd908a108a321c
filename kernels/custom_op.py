"""Registers operations with PyTorch, so that torch.compile and CUDA graphs see one opaque call.

In a server the whole MoE layer is such a call already. This is for code that calls the kernels from
a model of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import library

from .tensor_checks import require_out

NAMESPACE = "vllm_balance"
_fragment = library.Library(NAMESPACE, "FRAGMENT")


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
    _fragment.define(schema)
    for key in ("CPU", "CUDA"):
        _fragment.impl(name, run, key)
    library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_fragment)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def call(
    op: Callable[..., torch.Tensor],
    run: Callable[..., torch.Tensor],
    arguments: tuple[object, ...],
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Slots of the pairs, in ``out`` if given: by the registered operation while compiling, else
    directly.

    Args:
        op: what ``register`` returned; allocates its output.
        run: the same with a last argument for the output, or None.
        arguments: checked arguments of both, the ids first.

    Raises:
        ValueError: ``out`` cannot take the slots.
    """
    if torch.compiler.is_compiling():
        slots = op(*arguments)
        return slots if out is None else out.copy_(slots)
    if out is not None:
        ids: torch.Tensor = arguments[0]
        require_out(ids, out)
    return run(*arguments, out)
