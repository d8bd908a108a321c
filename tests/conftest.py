"""Makes the helpers of tests and ``bench`` importable from any folder.

Neither ``tests`` nor the repository's root may be on sys.path: with one of them there, ``kernels``
would become a top-level package, and transformers probes for a package of that name.
"""

import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

TESTS = Path(__file__).parent
ROOT = TESTS.parent
RUN_FIRST = (
    "test_demo_model.py",
    "distributed",
    "server",
)
"""Files and folders in the order in which they are run, before all others. The first may train the
demo model, on one core; meanwhile the second does without it. Servers take longest, one after the
other, so they begin next, and all else is run beside them."""

# Read when torch loads OpenMP. Two test processes with two threads each on two cores would spend
# more than half of the time spinning until the threads of the other give way. A server's ranks
# have threads of their own: vLLM sets their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts files by RUN_FIRST; the tests of a file keep their order."""

    def turn(item: pytest.Item) -> int:
        found = (i for i, name in enumerate(RUN_FIRST) if item.path.is_relative_to(TESTS / name))
        return next(found, len(RUN_FIRST))

    items.sort(key=turn)


class OneServerAtATime(LoadFileScheduling):
    """Gives files to test processes, and all that start servers to one: two ranks of two servers
    on two cores would spin while those that they wait for have no core."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "server" if Path(file).is_relative_to("tests/server") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> OneServerAtATime:
    return OneServerAtATime(config, log)


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
_load("apart", TESTS / "apart.py")
_load("cases", TESTS / "cases.py")
_load("deployments", TESTS / "deployments.py")
_load("json_places", TESTS / "json_places.py")
_load("measured", TESTS / "measured.py")
_load("moe_configs", TESTS / "moe_configs.py")
_load("tiny_model", TESTS / "tiny_model.py")
_load("serving", TESTS / "server" / "serving.py")
_load("gloo", TESTS / "distributed" / "gloo.py")
