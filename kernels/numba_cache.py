"""numba's cache on disk for code that spans files. Import this inside a call: it imports numba."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile


class _SourcesCache(FunctionCache):
    """Files of its own for each state of all sources of a folder and of types.py: compiled code
    holds that of functions in other files and must not outlive them."""

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
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn_of_no_cache(error.strerror or str(error))


@cache
def _warn_of_no_cache(reason: str) -> None:
    """Says once why the next process has to compile anew; vLLM shows what its loggers are told."""
    logging.getLogger(f"vllm.{__name__}").warning(
        "Compiled kernels cannot be kept on disk (%s), so every process of every start compiles "
        "them anew, which takes about 10 s. Set NUMBA_CACHE_DIR to a folder that can be written "
        "to and has room.",
        reason,
    )


@cache
def _digest(folder):
    # Compiled code holds numbers of types.py, too: those of the outcomes of a schedule.
    types = Path(find_spec("vllm_balance.types").origin)
    files = [*sorted(folder.glob("**/*.py")), types]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def kept(function: Callable, folder: Path, **options: Any) -> Callable:
    """The function compiled, and kept in numba's caches until a file of `folder` changes.

    Where no such directory can be written every process compiles anew, and says so.
    """
    dispatcher = numba.njit(**options)(function)
    try:
        dispatcher._cache = _SourcesCache(function, folder)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        _warn_of_no_cache("no folder for them can be written to")
    return dispatcher
