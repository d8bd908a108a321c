"""What importing the kernels loads: numba before a vLLM worker has registered its Triton overrides
breaks the worker, so it may come in with the first call only."""

from __future__ import annotations

import shutil
from pathlib import Path

from apart import require_success_apart

CHECK = """
import sys
import torch
before = set(sys.modules)
from vllm_balance.kernels import assign, eplb_hash, local_pairs, metro, rebalance, record
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not loaded & {"numba", "triton", "scipy", "vllm"}, loaded
expert = torch.zeros(1, 1, dtype=torch.int32)
slots = assign.assign(expert, torch.ones(1, 1, dtype=torch.int32), expert)
assert slots.tolist() == [[0]] and "numba" in sys.modules and "triton" not in sys.modules
"""


def test_numba_is_loaded_by_the_first_call():
    require_success_apart(CHECK)


def test_cache_key_covers_all_kernel_sources(tmp_path):
    """An entry compiled from other sources of a stage in another file is not found again."""
    from vllm_balance.kernels import numba_memory
    from vllm_balance.kernels.metro import numba_cpu
    from vllm_balance.kernels.numba_cache import _digest

    folder = Path(numba_memory.__file__).parent
    index = Path(numba_cpu._choose._cache._cache_file._index_path)
    assert _digest(folder)[:16] in index.name

    same, changed = (Path(shutil.copytree(folder, tmp_path / name)) for name in "ab")
    helper = changed / "metro" / "choice_cpu.py"
    helper.write_text(helper.read_text().replace("\n", "\n# another line\n", 1))
    assert _digest(same) == _digest(folder) != _digest(changed)
