"""Code that needs a Python of its own, because it asks what is imported."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def require_success_apart(code: str) -> None:
    """Runs the code with the repository importable; its assertions are the test's."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
