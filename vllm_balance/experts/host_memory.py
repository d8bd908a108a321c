"""Memory of this machine that may still be taken, a container's limit considered."""

from __future__ import annotations

from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
_FILES = (
    ("memory.max", "memory.current", "memory.stat", ""),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_",
    ),
)
"""Limit, usage, statistics and the prefix of their keys: of version 2, then of version 1."""


def available_bytes(cgroups: Path = CGROUPS) -> int:
    """Bytes that new memory may take without swapping or an end by the kernel; caches can go."""
    import psutil

    free = int(psutil.virtual_memory().available)
    left = _left_in_cgroup(cgroups)
    return free if left is None else max(0, min(free, left))


def _left_in_cgroup(cgroups: Path) -> int | None:
    """What the limit of this cgroup leaves; None if there is no limit or none can be read."""
    for limit, usage, statistics, prefix in _FILES:
        try:
            most = int((cgroups / limit).read_text())
            used = int((cgroups / usage).read_text())
            lines = (cgroups / statistics).read_text().splitlines()
        except (OSError, ValueError):  # "max": no limit
            continue
        counted = dict(line.split(maxsplit=1) for line in lines if line)
        cached = sum(int(counted.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        return most - used + cached
    return None
