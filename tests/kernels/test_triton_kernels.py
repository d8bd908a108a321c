"""The Triton kernels equal their references to the last integer (in Triton's interpreter).

More cases: ``TRITON_INTERPRET=1 python tests/kernels/interpreted.py choose 20000 0 /tmp``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


NUMBERS = {"choose": 150, "route": 70, "split": 50, "record": 100, "assign": 40, "eplb_hash": 30}
"""Random cases of each kernel."""


@pytest.mark.timeout(600)
def test_equal_to_reference(tmp_path):
    """In one process, since Triton takes as long to load as some kernels to be compared."""
    numbers = ",".join(map(str, NUMBERS.values()))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpreted.py"), ",".join(NUMBERS), numbers,
         "0", str(tmp_path)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel, number in NUMBERS.items():
        assert f"{kernel} {number}\n" in done.stdout
