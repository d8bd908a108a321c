"""The file that a running server records its routing into; ``recorded.py`` reads it.

An ``.npz`` archive that grows by chunks. Members in order: the scalars ``recording`` (version of
this format), ``num_experts``, ``top_k``, ``rank``, ``num_ranks`` and ``layer_index`` [L]; then for
chunk 000000, 000001, ... the members ``NAME.000000`` of either kind:

======== ==============================================================================
counts   ``step``, ``phase`` [N], ``counts`` [N, L, E]: pairs of each expert in each step
ids      ``step``, ``num_tokens`` [N]; ``request_id``, ``position``, ``phase`` [T],
         ``topk_ids`` [T, L, K]: the experts of each token, step after step
======== ==============================================================================

``step`` numbers the forward passes since the worker's start; ``phase`` is 0 prefill, 1 decode,
2 mixed, 3 nothing to do. With data parallelism every rank records its own tokens into a file of its
own; step numbers are equal on all ranks, because their forward passes go in step.

A zip archive has its directory at the end, and a killed server never writes it. So readers find
members by the headers in front of them, and a chunk that is not whole ends the file.
"""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Iterable, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from vllm_balance.documents import folder_problem
from vllm_balance.errors import BalancerError

Array = np.ndarray[Any, np.dtype[Any]]
VERSION = 1
PER_TOKEN = ("request_id", "position", "phase", "topk_ids")
"""Arrays of a chunk of ids that have one entry per token."""
MEMBERS = {
    "counts": ("step", "phase", "counts"),
    "ids": ("step", "num_tokens", *PER_TOKEN),
}
"""Arrays of a chunk."""
What = Literal["counts", "ids"]


class Phase(IntEnum):
    """What a step, or the step of a token, was about."""

    PREFILL = 0
    DECODE = 1
    MIXED = 2
    IDLE = 3
    """A data-parallel rank without tokens."""


class RecordSettings(BaseModel):
    """What to record, and where."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Path
    """A new file; ranks beyond the first write FILE.rank1 and so on beside it."""
    what: What = "counts"
    """Pairs of each expert in each step, or the experts of each token."""
    max_bytes: int = Field(default=256 * 2**20, ge=2**16, le=2**31)
    """Recording stops before a file, one per recording rank, becomes larger."""
    run: str = ""
    """Tells the files of this recording from those of another; made up when it is asked for, unless
    several API servers are asked, each for its own ranks."""


class RecordingFile:
    """A new recording; appended to until it is full or closed.

    Raises:
        BalancerError: the file exists or cannot be made.
    """

    def __init__(self, path: Path, what: What, max_bytes: int, header: Mapping[str, Any]) -> None:
        self._names = MEMBERS[what]
        self._max_bytes = max_bytes
        self._num_chunks = 0
        self._directory_bytes = 128
        try:
            self._file = path.open("xb")
        except OSError as error:
            raise _cannot_make(path, error) from error
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        try:
            for name, value in {"recording": VERSION, **header}.items():
                self._write(f"{name}.npy", _npy(np.asarray(value)))
            self._file.flush()
        except OSError as error:
            for opened in (self._archive, self._file):
                with contextlib.suppress(OSError):
                    opened.close()
            path.unlink(missing_ok=True)
            raise _cannot_make(path, error) from error

    @property
    def num_bytes(self) -> int:
        """Size that the file would have at most if it were closed now."""
        return self._file.tell() + self._directory_bytes

    def append(self, arrays: Mapping[str, Array]) -> bool:
        """Adds a chunk as a whole; False, and nothing changed, if it might exceed the limit."""
        members = {f"{name}.{self._num_chunks:06d}.npy": _npy(arrays[name]) for name in self._names}
        # Deflate adds five bytes to each 16 KiB that it cannot shorten.
        most = sum(len(data) + len(data) // 2**10 + 2 * len(name) + 128
                   for name, data in members.items())  # fmt: skip
        if self.num_bytes + most > self._max_bytes:
            return False
        for name, data in members.items():
            self._write(name, data)
        self._file.flush()
        self._num_chunks += 1
        return True

    def close(self) -> None:
        """Writes the archive's directory, so that ``numpy.load`` opens it too; does nothing after
        that. Raises OSError if the disk fails, and is closed all the same."""
        try:
            self._archive.close()
        finally:
            self._file.close()

    def _write(self, name: str, data: bytes) -> None:
        self._archive.writestr(name, data)
        self._directory_bytes += 46 + len(name)


def _cannot_make(path: Path, error: OSError) -> BalancerError:
    return BalancerError(
        f"The recording {path} cannot be made ({error.strerror}). Name a new file in a folder that "
        f"exists and can be written to."
    )


def path_of_rank(path: Path, rank: int) -> Path:
    """Where a data-parallel rank records: trace.npz, trace.rank1.npz, trace.rank2.npz ..."""
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def require_recordable(path: Path, ranks: Iterable[int]) -> None:
    """Returns if these ranks can record at `path`.

    Raises:
        BalancerError: a file exists, or the folder is missing or cannot be written to.
    """
    problem = folder_problem(path)
    for rank in ranks:
        if path_of_rank(path, rank).exists():
            problem = f"{path_of_rank(path, rank)} exists, and recordings are never overwritten"
    if problem:
        raise BalancerError(
            f"The routing was to be recorded into {path}, but {problem}. Name a new file in a "
            f"folder that exists and can be written to."
        )


def _npy(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
