"""numba's cache on disk for code that spans files. Import this inside a call: it imports numba."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile


class _SourcesCache(FunctionCache):
    """Files of its own for each state of all sources of a folder: compiled code holds that of
    functions in other files and must not outlive them."""

    def __init__(self, function, folder):
        super().__init__(function)
        # In the names, not in the index alone: numba writes the index first, and a process that
        # ends before the code is written would leave it pointing at a file of older sources.
        self._cache_file = IndexDataCacheFile(
            cache_path=self._cache_path,
            filename_base=f"{self._impl.filename_base}-{_digest(folder)[:16]}",
            source_stamp=self._impl.locator.get_source_stamp(),
        )

    def save_overload(self, sig, data):
        # A full disk costs the next start its time, not this one its life.
        with suppress(OSError):
            super().save_overload(sig, data)


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
