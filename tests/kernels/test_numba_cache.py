"""Compiled kernels are kept on disk; where they cannot be, that is said once and nothing else."""

import logging
from pathlib import Path

import pytest

from vllm_balance.kernels import numba_cache

FOLDER = Path(numba_cache.__file__).parent


def double(number):
    return 2 * number


@pytest.fixture
def said(monkeypatch):
    """Warnings of the cache, of which vLLM's logger passes none to the root logger."""
    lines: list[str] = []
    logger = logging.getLogger(f"vllm.{numba_cache.__name__}")
    monkeypatch.setattr(logger, "warning", lambda text, *values: lines.append(text % values))
    numba_cache._warn_of_no_cache.cache_clear()
    yield lines
    numba_cache._warn_of_no_cache.cache_clear()


def test_without_a_folder_to_write_to_every_process_compiles_and_says_so_once(monkeypatch, said):
    impl = numba_cache.FunctionCache._impl_class
    monkeypatch.setattr(impl, "_locator_classes", [])
    for _ in range(2):
        assert numba_cache.kept(double, FOLDER)(4) == 8
    (line,) = said
    assert "no folder" in line and "NUMBA_CACHE_DIR" in line


def test_another_failure_of_numba_is_not_swallowed(monkeypatch):
    def fails(self, function, folder):
        raise RuntimeError("cannot cache a lambda")

    monkeypatch.setattr(numba_cache._SourcesCache, "__init__", fails)
    with pytest.raises(RuntimeError, match="lambda"):
        numba_cache.kept(double, FOLDER)


def test_a_full_disk_is_said_once_and_costs_time_only(monkeypatch, said):
    def save(self, sig, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(numba_cache.FunctionCache, "save_overload", save)
    compiled = numba_cache.kept(double, FOLDER)
    assert (compiled(4), compiled(0.5)) == (8, 1.0)
    (line,) = said
    assert "(No space left on device)" in line and "NUMBA_CACHE_DIR" in line
