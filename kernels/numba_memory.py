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
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from .numba_cache import kept

jit = numba.njit(nogil=True)
"""A stage: compiled into the entries that call it, without the GIL."""


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
def float32_at(address, size):
    """Array [size] of float32 over the memory at ``address``."""
    return carray(_pointer(address), (size,), np.float32)


@jit
def uint8_at(address, size):
    """Array [size] of uint8 (one per torch.bool) over the memory at ``address``."""
    return carray(_pointer(address), (size,), np.uint8)


def _element(builder, address, index, bits):
    """Pointer to an integer of an array of them."""
    pointer = builder.inttoptr(address, ir.IntType(bits).as_pointer())
    return builder.gep(pointer, [index])


def _access(bits):
    """Reads and writes element ``index`` of the integers of that size at ``address``, as int64."""

    @intrinsic
    def load(typing_context, address, index):
        def generate(context, builder, signature, arguments):
            value = builder.load(_element(builder, *arguments, bits))
            return value if bits == 64 else builder.sext(value, ir.IntType(64))

        return types.int64(types.int64, types.int64), generate

    @intrinsic
    def store(typing_context, address, index, value):
        def generate(context, builder, signature, arguments):
            *place, value = arguments
            value = value if bits == 64 else builder.trunc(value, ir.IntType(bits))
            builder.store(value, _element(builder, *place, bits))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), generate

    return load, store


_load_32, _store_32 = _access(32)
_load_64, _store_64 = _access(64)


@jit
def ints_at(address, is_wide):
    """Integers of int64 (``is_wide``) or int32 over the memory at ``address``: see get and put.

    No arrays: numba would count references at every access."""
    return address, is_wide


@jit
def get(ints, i):
    """Element i of what ``ints_at`` returned, as int64."""
    return _load_64(ints[0], i) if ints[1] else _load_32(ints[0], i)


@jit
def put(ints, i, value):
    """Write element i of what ``ints_at`` returned."""
    if ints[1]:
        _store_64(ints[0], i, value)
    else:
        _store_32(ints[0], i, value)


@jit
def num_valid_pairs(address, num_pairs, top_k):
    """Pairs in front of the padding: all of them if there is no count at ``address`` (zero)."""
    if address == 0:
        return num_pairs
    return min(max(np.int64(int32_at(address, 1)[0]) * top_k, 0), num_pairs)
