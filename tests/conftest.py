"""Makes the helpers of tests and ``bench`` importable from any folder.

Neither ``tests`` nor the repository's root may be on sys.path: with one of them there, ``kernels``
would become a top-level package, and transformers probes for a package of that name.
"""

import importlib.util
import sys
import types
from pathlib import Path

from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent
ROOT = TESTS.parent

settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


def _load(name: str, file: Path) -> None:
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, TESTS)]
if "bench" not in sys.modules:
    sys.modules["bench"] = types.ModuleType("bench")
    sys.modules["bench"].__path__ = [str(ROOT / "bench")]
_load("cases", TESTS / "cases.py")
_load("deployments", TESTS / "deployments.py")
_load("measured", TESTS / "measured.py")
_load("serving", TESTS / "server" / "serving.py")
_load("gloo", TESTS / "distributed" / "gloo.py")
