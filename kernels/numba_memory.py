"""Tensors inside numba kernels, passed as addresses.

Handing numba an array costs about 1 us for ``Tensor.numpy()`` and 0.1 us for unboxing, per tensor
and call; an address costs 0.06 us. The caller checks dtype, contiguity and sizes before it passes
one, and holds the tensor while the kernel runs. Import this module (it imports numba) only inside
the first call of a kernel: numba must not be loaded before a vLLM worker has registered its
Triton overrides.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from .numba_cache import kept

jit = numba.njit(nogil=True)
"""A stage: compiled into the entries that call it, without the GIL."""
inline = numba.njit(nogil=True, inline="always")


def entry(function: Callable) -> Callable:
    """What Python calls: compiled without the GIL, kept on disk until a kernel's source changes."""
    return kept(function, Path(__file__).parent, nogil=True)


@intrinsic
def _pointer(typing_context, address):
    """The address (an integer) as a void pointer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@jit
def int32_at(address, size):
    """Array [size] of int32 over the memory at ``address``."""
    return carray(_pointer(address), (size,), np.int32)


@jit
def int64_at(address, size):
    """Array [size] of int64 over the memory at ``address``."""
    return carray(_pointer(address), (size,), np.int64)


@jit
def uint8_at(address, size):
    """Array [size] of uint8 (one per torch.bool) over the memory at ``address``."""
    return carray(_pointer(address), (size,), np.uint8)


@jit
def ints_at(address, size, is_wide):
    """Integers of int64 (``is_wide``) or int32 over the memory at ``address``: see get and put."""
    return int32_at(address, size), int64_at(address, size), is_wide


@inline
def get(ints, i):
    """Element i of what ``ints_at`` returned, as int64."""
    return ints[1][i] if ints[2] else np.int64(ints[0][i])


@inline
def put(ints, i, value):
    """Write element i of what ``ints_at`` returned."""
    if ints[2]:
        ints[1][i] = value
    else:
        ints[0][i] = value


@jit
def num_valid_pairs(address, num_pairs, top_k):
    """Pairs in front of the padding: all of them if there is no count at ``address`` (zero)."""
    if address == 0:
        return num_pairs
    return min(max(np.int64(int32_at(address, 1)[0]) * top_k, 0), num_pairs)
