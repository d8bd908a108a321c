"""Run files, configs/runs/NAME.toml: one table each. What they may hold is in docs/benchmarks.md.

A file with `base = "OTHER.toml"` is that file with changes: its tables are laid over the other's,
key by key.
"""

from __future__ import annotations

import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.provenance import NO_BF16, ROOT, config_hash
from bench.real_size_model import Shape
from vllm_balance.errors import BalancerError, unknown

FOLDER = ROOT / "configs" / "runs"
KEYS = (
    *("title", "seed", "model", "serve", "load", "loads", "warm", "replay", "arms", "eplb"),
    *("in_turns", "one_server", "cases", "slow", "slow_rank", "place"),
)
"""Keys and tables of a run file."""
ELSEWHERE = {"recordings": "bench.recorder", "phases": "bench.recovery"}
"""Tables of run files that have a benchmark of their own."""
Settings = dict[str, Any]


def read(file: Path) -> Settings:
    """The settings of a run file, its base's below its own."""
    return _settings(file.name, lambda name: (file.parent / name).read_text())


def checked(file: Path) -> Settings:
    """The same of a file that `bench.run` measures.

    Raises:
        BalancerError: it is no TOML, holds a key that nothing reads, or another benchmark has it.
    """
    try:
        settings = read(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise BalancerError(f"Run file {file} cannot be read: {error}.") from error
    for key, command in ELSEWHERE.items():
        if key in settings:
            raise BalancerError(f"Run file {file} has [{key}]: `python -m {command}` measures it.")
    for key in settings:
        if key not in KEYS:
            raise BalancerError(f"Run file {file}: {unknown('key', key, KEYS)}")
    if settings.get("one_server"):
        _require_placements(file, settings)
    return settings


def _require_placements(file: Path, settings: Settings) -> None:
    """Raises BalancerError if one server cannot be all arms in turn."""
    placed = [arm for arm in settings["arms"].values() if "place" in arm]
    others = [{key: arm[key] for key in arm if key != "place"} for arm in placed]
    alike = len(placed) == len(settings["arms"]) and all(each == others[0] for each in others)
    if not (alike and settings.get("in_turns") and "online" in others[0]):
        raise BalancerError(
            f"Run file {file}: `one_server` moves one server from the placement of one arm to that "
            f"of the next. It needs `in_turns = true`, and arms that have `place` and `online` and "
            f"differ in `place` only."
        )


def suits(file: Path, machine: str) -> bool:
    """Whether a run file is meant for a machine, which is named as rows name it: on a CPU without
    16-bit units bfloat16 products of attention hide the experts."""
    dtype = checked(file)["model"].get("dtype", Shape().dtype)
    return dtype == "float32" or NO_BF16 not in machine


def replays_recording(file: Path) -> bool:
    """Whether a run file needs a recorded trace; the demo model's is made."""
    return checked(file)["replay"].get("trace", "demo") != "demo"


def with_hash(name: str, digest: str) -> Settings:
    """The settings that rows of configs/runs/NAME.toml were made with: the present ones, or those
    of the commit with their hash.

    Raises:
        LookupError: no committed version has this hash.
    """
    for settings in _versions(f"{name}.toml"):
        if config_hash(settings) == digest:
            return settings
    raise LookupError(f"No version of configs/runs/{name}.toml has the hash {digest} of its rows.")


def _settings(name: str, text_of: Callable[[str], str]) -> Settings:
    own = tomllib.loads(text_of(name))
    base = own.pop("base", None)
    return own if base is None else _laid_over(_settings(base, text_of), own)


def _laid_over(below: Settings, above: Settings) -> Settings:
    both = {
        key: _laid_over(below[key], value)
        for key, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return below | above | both


def _versions(name: str) -> Iterator[Settings]:
    """The settings of the tree as it is, then of each commit that changed the file or its base."""
    yield read(FOLDER / name)
    git, folder = ["git", "-C", str(ROOT)], FOLDER.relative_to(ROOT).as_posix()
    base = tomllib.loads((FOLDER / name).read_text()).get("base", name)
    paths = [f"{folder}/{each}" for each in (name, base)]
    log = subprocess.run(
        [*git, "log", "--format=%h", "--", *paths], capture_output=True, text=True, check=True
    )
    for commit in log.stdout.split():

        def committed(each: str, commit: str = commit) -> str:
            return subprocess.run(
                [*git, "show", f"{commit}:{folder}/{each}"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout

        try:
            yield _settings(name, committed)
        except subprocess.CalledProcessError:
            return  # before the file was there
