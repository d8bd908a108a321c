"""Expert weights in pages of 2 MiB: fewer address translations while a core streams them."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterable

import torch

HUGE_PAGE_BYTES = 2 << 20
PIECE_BYTES = 16 * HUGE_PAGE_BYTES
"""Bytes that one madvise call covers."""
ROUNDS = 3
"""Attempts to collapse a piece before it is left as it is."""
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25
"""Linux 6.1 and later; refused with EINVAL before."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def ask_for_huge_pages(tensor: torch.Tensor) -> None:
    """Pages that are first touched from now on may be huge, where the system allows it."""
    for first, last in _pieces(tensor):
        _advise(first, last, _MADV_HUGEPAGE)


def gather_into_huge_pages(tensors: Iterable[torch.Tensor]) -> int:
    """Moves memory that is in use already into huge pages, in place.

    The system does so by itself only where ``transparent_hugepage`` is ``always``. It refuses where
    there is not enough unfragmented memory, and gives up the rest of what it was asked for in one
    call: so it is asked for piece by piece, and for refused pieces again.

    Args:
        tensors: contiguous CPU tensors; those smaller than a huge page are left alone.

    Returns:
        Bytes of the pieces that the system moved or that lay in huge pages already: whole huge
        pages, at most those that lie entirely inside a tensor.
    """
    left = []
    for tensor in tensors:
        if tensor.nbytes >= HUGE_PAGE_BYTES:
            ask_for_huge_pages(tensor)
            left += _pieces(tensor)
    asked = sum(last - first for first, last in left)
    for _ in range(ROUNDS):
        left = [piece for piece in left if not _advise(*piece, _MADV_COLLAPSE)]
    return asked - sum(last - first for first, last in left)


def _pieces(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """(first, last) address of the tensor's huge pages, cut where PIECE_BYTES divide them."""
    first = -(-tensor.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    last = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    cuts = range((first // PIECE_BYTES + 1) * PIECE_BYTES, last, PIECE_BYTES)
    return list(itertools.pairwise([first, *cuts, last])) if last > first else []


def _advise(first: int, last: int, advice: int) -> bool:
    """Whether the system follows the advice for all these pages."""
    return _libc.madvise(first, last - first, advice) == 0
