"""Makes tests/cases.py importable as ``cases`` without putting any folder on sys.path: with the
repository root there, ``kernels`` would become a top-level package, which transformers probes for.
"""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("cases", Path(__file__).parents[1] / "cases.py")
cases = importlib.util.module_from_spec(_spec)
sys.modules["cases"] = cases
_spec.loader.exec_module(cases)
