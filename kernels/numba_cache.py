"""numba's cache on disk for code that spans files. Import this inside a call: it imports numba."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache


class _SourcesCache(FunctionCache):
    """Keyed by all sources of a folder instead of the function's file alone: compiled code holds
    that of functions in other files and must not outlive them."""

    def __init__(self, function, folder):
        super().__init__(function)
        self._sources = _digest(folder)

    def _index_key(self, signature, codegen):
        return (*super()._index_key(signature, codegen), self._sources)


@cache
def _digest(folder):
    files = sorted(folder.glob("**/*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def kept(function: Callable, folder: Path, **options: Any) -> Callable:
    """The function compiled, and kept in numba's caches until a file of `folder` changes.

    Where no such directory can be written every process compiles anew.
    """
    dispatcher = numba.njit(**options)(function)
    try:
        dispatcher._cache = _SourcesCache(function, folder)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
    return dispatcher
