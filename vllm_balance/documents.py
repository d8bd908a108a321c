"""A versioned file: written whole or not at all, read whole or refused with the reason."""

from __future__ import annotations

import os
import tempfile
import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_balance.errors import RAISED, BalancerError


class Document(BaseModel):
    """What every such file has in common: no unknown keys, no NaN, no silent conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


DocumentT = TypeVar("DocumentT", bound=Document)


def read(path: Path, kind: type[DocumentT], what: str, made_by: str) -> DocumentT:
    """The checked content of a file.

    Args:
        what: names it in messages, e.g. "profile".
        made_by: the command that makes one.

    Raises:
        BalancerError: the file is missing, damaged, of another version, or holds a wrong value.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BalancerError(
            f"The {what} {path} cannot be read: {error.strerror}. Name a file that was made by "
            f"`{made_by}`, or make one with it."
        ) from error
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise BalancerError(
            f"{path} is no usable {what}. {explain(error)} Make it anew with `{made_by}`, or use "
            f"the file as it was written."
        ) from error


def read_toml(path: Path, kind: type[DocumentT], what: str) -> DocumentT:
    """As `read`, of a TOML file that people write. Raises BalancerError as `read` does."""
    try:
        return kind.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise BalancerError(f"The {what} {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BalancerError(f"{path} is no TOML file: {error}.") from error
    except ValidationError as error:
        raise BalancerError(f"{path} is no usable {what}. {explain(error)}") from error


def write(path: Path, document: Document) -> None:
    """Puts the file in place in one step; a reader never sees half of it.

    Raises:
        BalancerError: the folder is missing or not writable.
    """
    write_text(path, document.model_dump_json(indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Puts a text file in place in one step, or leaves what was there.

    Raises:
        BalancerError: the folder is missing or not writable, or the disk is full.
    """
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
        ) as file:
            try:
                file.write(text)
                file.flush()
                Path(file.name).chmod(0o644)
                Path(file.name).replace(path)
            finally:
                Path(file.name).unlink(missing_ok=True)
    except OSError as error:
        raise BalancerError(
            f"{path} cannot be written: {error.strerror}. Name a file in a folder that can be "
            f"written to and has room."
        ) from error


def folder_problem(path: Path) -> str | None:
    """Why no file can be made at `path`, as far as its folder says; None if one can."""
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist"
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return f"the folder {path.parent} cannot be written to"
    return None


def require_writable(path: Path) -> None:
    """Returns if a file can be put at `path`, in place of one if there is one; for a look before
    long work.

    Raises:
        BalancerError: the folder is missing or cannot be written to, or `path` is a folder.
    """
    problem = f"{path} is a folder" if path.is_dir() else folder_problem(path)
    if problem is not None:
        raise BalancerError(
            f"The result was to be written to {path}, but {problem}. Name a file in a folder that "
            f"exists and can be written to."
        )


def require_new(path: Path, what: str, force: bool, more: str = "") -> None:
    """Returns if a `what` can be put at `path` and none is lost that way; before long work.

    Args:
        force: what is there may be replaced.
        more: what else to do, the rest of the message's last sentence.

    Raises:
        BalancerError: a file is there, or as `require_writable` does.
    """
    require_writable(path)
    if path.exists() and not force:
        raise BalancerError(
            f"The {what} was to be written to {path}, and there is a file: servers and other files "
            f"may refer to it. Name a new one with --output, or replace it with --force{more}."
        )


def expanded(path: str | Path) -> Path:
    """The path with `~` and `~user` as the folder that they stand for.

    Raises:
        BalancerError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise BalancerError(
            f"{path} begins with the folder of a user that this machine does not have. Name the "
            f"file by its full path."
        ) from error


def explain(error: ValidationError) -> str:
    """The first three complaints, each in a sentence, values cut short."""
    parts = []
    for item in error.errors(include_url=False)[:3]:
        where = ".".join(str(part) for part in item["loc"])
        found = "" if item["type"] in ("missing", "json_invalid") else f" (it is {item['input']!r})"
        found = found if len(found) < 60 else found[:56] + "...)"
        said = item["msg"].removeprefix(RAISED)
        parts.append(f"{f'`{where}`' if where else 'The file'}{found}: {said}.")
    more = error.error_count() - len(parts)
    return " ".join(parts) + (f" And {more} more." if more > 0 else "")
