"""Wrong values in every place of a JSON file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

Path = tuple[str | int, ...]

WRONG = [None, "x", -1, math.nan, math.inf, True, [], {}, {"a": 1}, 10**400]
"""Python's json writes NaN, Infinity and numbers of any size, and reads them again."""


def places(value: Any, path: Path = ()) -> Iterator[Path]:
    """Every place in a JSON value, the whole first."""
    yield path
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    for key in keys:
        yield from places(value[key], (*path, key))


def keys(value: Any) -> list[Path]:
    """Every place that is a key of an object."""
    return [path for path in places(value) if path and isinstance(path[-1], str)]


def put(value: Any, path: Path, new: Any) -> Any:
    """A JSON value with something else in one place."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = put(value[path[0]], path[1:], new)
    return copy


def without(value: Any, path: Path) -> Any:
    """A JSON value that lacks one key."""
    owner = at(value, path[:-1])
    return put(value, path[:-1], {key: part for key, part in owner.items() if key != path[-1]})


def beside(value: Any, path: Path, name: str) -> Any:
    """A JSON value with one more key in the object of this one."""
    return put(value, path[:-1], at(value, path[:-1]) | {name: 1})


def at(value: Any, path: Path) -> Any:
    """What is in one place of a JSON value."""
    for key in path:
        value = value[key]
    return value
