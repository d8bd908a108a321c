"""The METRO kernel as compiled for real GPUs: no spills, little shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECK = """
import sys
from bench import metro_gpu, sass
from vllm_balance.kernels.metro.triton_gpu import block_sizes

for experts, columns, ranks in ((128, 4, 2), (256, 8, 32), (256, 8, 64), (512, 8, 64)):
    sizes = block_sizes(experts, columns, ranks)
    kernel = metro_gpu.compile_route(int(sys.argv[1]), sizes)
    found = sass.resources(kernel.asm["cubin"])
    print(experts, ranks, found, kernel.metadata.shared)
    assert found["stack"] == 0 and found["local"] == 0, "spills"
    assert found["reg"] * 32 * sizes["num_warps"] <= 65536, "does not fit one multiprocessor"
    assert kernel.metadata.shared + found["shared"] < 48 * 1024
    blocks = sass.read_blocks(kernel.asm["cubin"], metro_gpu.STAGES)
    opcodes = [opcode for block in blocks for opcode, _, _ in block.instructions]
    assert len(opcodes) > 1000 and not any(code.startswith(("LDL", "STL")) for code in opcodes)
    assert {"claim", "search", "place", "shift"} <= {stage for b in blocks for stage in b.stages}
print("compiled")
"""


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_no_spills_and_little_shared_memory(capability):
    """In a process of its own: Triton must not be loaded in interpreter mode here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECK, str(capability)],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("compiled\n")
