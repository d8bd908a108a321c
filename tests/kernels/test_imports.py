"""What importing the kernels loads: numba before a vLLM worker has registered its Triton overrides
breaks the worker, so it may come in with the first call only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHECK = """
import sys
import torch
before = set(sys.modules)
from vllm_balance.kernels import assign, eplb_hash, metro, rebalance, record
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not loaded & {"numba", "triton", "scipy", "vllm"}, loaded
expert = torch.zeros(1, 1, dtype=torch.int32)
slots = assign.assign(expert, torch.ones(1, 1, dtype=torch.int32), expert)
assert slots.tolist() == [[0]] and "numba" in sys.modules and "triton" not in sys.modules
"""


def test_numba_is_loaded_by_the_first_call():
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_cache_key_covers_all_kernel_sources(tmp_path, monkeypatch):
    """An entry compiled from other sources of a stage in another file is not found again."""
    from vllm_balance.kernels import numba_memory
    from vllm_balance.kernels.metro import numba_cpu

    cache = numba_cpu._choose._cache
    codegen = numba_cpu._choose.targetctx.codegen()
    before = cache._index_key("signature", codegen)
    monkeypatch.setattr(numba_memory, "_SOURCES", "changed")
    assert cache._index_key("signature", codegen) != before
