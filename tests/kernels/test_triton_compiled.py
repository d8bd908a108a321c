"""The kernels as compiled for real GPUs: no spills, little shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECK = """
from bench import metro_gpu, sass
from vllm_balance.kernels.metro.triton_gpu import block_sizes
from vllm_balance.kernels.record import triton_gpu as record_triton

# Experts, columns, ranks. These two have most to hold, with 255 registers and with 128.
LARGE = ((256, 8, 64), (512, 8, 64))
CASES = {80: LARGE, 90: ((128, 8, 2), *LARGE), 100: LARGE}
for capability, shape in ((c, shape) for c, shapes in CASES.items() for shape in shapes):
    sizes = block_sizes(*shape)
    kernel = metro_gpu.compile_route(capability, sizes)
    found = sass.resources(kernel.asm["cubin"])
    print(capability, shape, found, kernel.metadata.shared)
    assert found["stack"] == 0 and found["local"] == 0, "spills"
    assert found["reg"] * 32 * sizes["num_warps"] <= 65536, "does not fit one multiprocessor"
    assert kernel.metadata.shared + found["shared"] < 48 * 1024
    blocks = sass.read_blocks(kernel.asm["cubin"], metro_gpu.STAGES)
    opcodes = [opcode for block in blocks for opcode, _, _ in block.instructions]
    assert len(opcodes) > 1000 and not any(code.startswith(("LDL", "STL")) for code in opcodes)
    assert {"claim", "search", "place", "shift"} <= {stage for b in blocks for stage in b.stages}
    recording = record_triton.rank_blocks(1024, 64) | {"num_warps": 8}
    absent = {"HAS_COUNTED": False, "counted": None, "HAS_LOAD": True, "HAS_RECORD": True}
    for made in (
        metro_gpu.compile_kernel(record_triton.record_kernel, capability, recording | absent
            | {"HAS_VALID": True, "PB": 1024, "BLOCK": record_triton.BLOCK_PAIRS}),
        metro_gpu.compile_kernel(record_triton.record_split_kernel, capability, recording
            | {"HAS_REGIME": True, "EB": 1024}),
    ):
        found = sass.resources(made.asm["cubin"])
        assert found["stack"] == 0 and found["local"] == 0, ("recording spills", found)
print("compiled")
"""


@pytest.mark.timeout(600)
def test_no_spills_and_little_shared_memory():
    """In a process of its own: Triton must not be loaded in interpreter mode here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECK],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("compiled\n")
