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


@pytest.mark.parametrize(
    ("kernel", "number"),
    [("choose", 150), ("route", 70), ("record", 100), ("assign", 40), ("eplb_hash", 30)],
)
def test_equal_to_reference(kernel, number, tmp_path):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpreted.py"), kernel, str(number), "0",
         str(tmp_path)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) == number
