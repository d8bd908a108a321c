"""Files of the catalogue by name: configs/hardware and configs/models, linked into the package."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

from vllm_balance import documents
from vllm_balance.documents import Document
from vllm_balance.errors import BalancerError

Kind = Literal["hardware", "model"]
DocumentT = TypeVar("DocumentT", bound=Document)


def folder(kind: Kind) -> Path:
    """Where the files of a kind are."""
    return Path(__file__).parent / f"{kind}_files"


def names(kind: Kind) -> list[str]:
    """Names that `find` takes, sorted."""
    return sorted(file.stem for file in folder(kind).glob("*.toml"))


def find(kind: Kind, name: str, document: type[DocumentT]) -> tuple[DocumentT, Path]:
    """The checked content of a file and where it is; `name` is of the catalogue, or a path.

    Raises:
        BalancerError: there is no such file, or it is no usable one.
    """
    path = Path(name)
    if path.suffix != ".toml":
        path = folder(kind) / f"{name}.toml"
    if not path.is_file():
        raise BalancerError(
            f"There is no {kind} file {name!r}. Give a path to a .toml file, or one of "
            f"{', '.join(names(kind))}."
        )
    return documents.read_toml(path, document, f"{kind} file"), path
