"""Every kernel compiles for GPUs with and without each of its optional arguments.

The interpreter does not show this: it meets a flag as a Python bool, the compiler as a constant.
An assignment turns that into a tensor, and a branch over an absent argument is compiled after all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILE = """
import sys
from itertools import product
from bench.metro_gpu import compile_kernel
from vllm_balance.kernels.assign.triton_gpu import assign_kernel
from vllm_balance.kernels.metro.triton_gpu import (
    BLOCK_PAIRS, block_sizes, choose_kernel, route_kernel, split_kernel,
)
from vllm_balance.kernels.record.triton_gpu import (
    count_kernel, record_kernel, record_split_kernel,
)

ARGUMENT = {
    "HAS_LOAD": "load",
    "HAS_RECORD": "record_enabled",
    "HAS_VALID": "valid",
    "HAS_OFFSET": "offset",
    "HAS_COUNTED": "counted",
    "HAS_REGIME": "regime",
}

def variants(*flags):
    for values in product((True, False), repeat=len(flags)):
        chosen = dict(zip(flags, values))
        yield chosen | {ARGUMENT[flag]: None for flag, given in chosen.items() if not given}

sizes = block_sizes(32, 2, 2)
recorded = ("HAS_LOAD", "HAS_RECORD", "HAS_VALID")
ranks = {"SB": 2, "SC": 2, "num_warps": 8}
blocks = {"BINS": 32, "BLOCK": BLOCK_PAIRS, "BLOCKS": 4, "num_warps": 8}
plan = {
    count_kernel: (blocks, ("HAS_RECORD", "HAS_VALID")),
    record_kernel: (ranks | {"PB": 32, "BLOCK": BLOCK_PAIRS}, ("HAS_COUNTED", *recorded)),
    record_split_kernel: (ranks | {"EB": 32}, ("HAS_REGIME",)),
    assign_kernel: ({"RB": 2, "BLOCK": BLOCK_PAIRS, "num_warps": 4}, ("HAS_OFFSET", "HAS_VALID")),
    choose_kernel: (sizes, ()),
    split_kernel: (sizes, ()),
    route_kernel: (sizes | {"BLOCK": BLOCK_PAIRS}, recorded),
}
MAPPING = (assign_kernel, route_kernel)
capability, compiled = int(sys.argv[1]), 0
for kernel, (settings, flags) in plan.items():
    # What an argument's absence changes is in front of what differs between GPUs.
    whole = dict.fromkeys(flags, True)
    for chosen in variants(*flags) if capability == 90 else [whole]:
        made = compile_kernel(kernel, capability, settings | chosen)
        assert made.asm["cubin"], (kernel, chosen)
        compiled += 1
    if "ids" in kernel.arg_names:
        # As DeepEP's dispatch has them; what maps them gives out the same type.
        wide = {"ids": "*i64"} | ({"out": "*i64"} if kernel in MAPPING else {})
        assert compile_kernel(kernel, capability, settings | whole, **wide).asm["cubin"], kernel
        compiled += 1
print(compiled)
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("capability", "variants"),
    [(80, 7 + 4), (90, 4 + 16 + 2 + 4 + 1 + 1 + 8 + 4), (100, 7 + 4)],
)
def test_every_kernel_compiles_with_and_without_its_optional_arguments(capability, variants):
    """In a process of its own: Triton must not be loaded in interpreter mode here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(capability)],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) == variants
