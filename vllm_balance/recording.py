"""The file that a running server records its routing into, and what a reader makes of it.

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

A zip archive has its directory at the end, and a killed server never writes it. So members are
found by the headers in front of them, and a chunk that is not whole ends the file.
"""

from __future__ import annotations

import functools
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from vllm_balance.errors import BalancerError

Array = np.ndarray[Any, np.dtype[Any]]
VERSION = 1
PER_TOKEN = ("request_id", "position", "phase", "topk_ids")
"""Arrays of a chunk of ids that have one entry per token."""
_MEMBERS = {
    "counts": ("step", "phase", "counts"),
    "ids": ("step", "num_tokens", *PER_TOKEN),
}
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_SIGNATURE = b"PK\x03\x04"


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
    what: Literal["counts", "ids"] = "counts"
    """Pairs of each expert in each step, or the experts of each token."""
    max_bytes: int = Field(default=256 * 2**20, ge=2**16, le=2**31)
    """Recording stops before a file, one per recording rank, becomes larger."""


class RecordingFile:
    """A new recording; appended to until it is full or closed.

    Raises:
        BalancerError: the file exists or cannot be made.
    """

    def __init__(
        self, path: Path, what: Literal["counts", "ids"], max_bytes: int, header: Mapping[str, Any]
    ) -> None:
        self._names = _MEMBERS[what]
        self._max_bytes = max_bytes
        self._num_chunks = 0
        self._directory_bytes = 128
        try:
            self._file = path.open("xb")
        except OSError as error:
            raise BalancerError(
                f"The recording {path} cannot be made ({error.strerror}). Name a new file in a "
                f"folder that exists and can be written to."
            ) from error
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        for name, value in {"recording": VERSION, **header}.items():
            self._write(f"{name}.npy", _npy(np.asarray(value)))
        self._file.flush()

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
        """Writes the archive's directory, so that ``numpy.load`` opens it too."""
        self._archive.close()
        self._file.close()

    def _write(self, name: str, data: bytes) -> None:
        self._archive.writestr(name, data)
        self._directory_bytes += 46 + len(name)


def path_of_rank(path: Path, rank: int) -> Path:
    """Where a data-parallel rank records: trace.npz, trace.rank1.npz, trace.rank2.npz ..."""
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def require_new(path: Path, num_files: int) -> None:
    """Returns if `num_files` ranks can record at `path`.

    Raises:
        BalancerError: a file exists, or the folder is missing or cannot be written to.
    """
    problem = None
    if not path.parent.is_dir():
        problem = f"the folder {path.parent} does not exist"
    elif not os.access(path.parent, os.W_OK | os.X_OK):
        problem = f"the folder {path.parent} cannot be written to"
    for rank in range(num_files):
        if path_of_rank(path, rank).exists():
            problem = f"{path_of_rank(path, rank)} exists, and recordings are never overwritten"
    if problem:
        raise BalancerError(
            f"The routing was to be recorded into {path}, but {problem}. Name a new file in a "
            f"folder that exists and can be written to."
        )


def read(path: Path) -> dict[str, Array] | None:
    """The arrays of a recorded trace, all ranks together; None if the file is no recording.

    `counts` [N, L, E] with `phase` [N], or `topk_ids` [T, L, K] with `request_id`, `position` and
    `phase` [T]; and num_experts, top_k, layer_index. Steps that not all ranks hold are left out.

    Raises:
        BalancerError: a rank's file is missing, damaged, or of another recording.
    """
    first = _arrays(path)
    if first is None:
        return None
    if int(first["rank"]) != 0:
        raise BalancerError(
            f"Trace {path} is the part of rank {int(first['rank'])} in a recording of "
            f"{int(first['num_ranks'])} ranks. Name the file of rank 0; the others are found."
        )
    parts = [first]
    for rank in range(1, int(first["num_ranks"])):
        other = path_of_rank(path, rank)
        part = _arrays(other) if other.is_file() else None
        if part is None or part.keys() != first.keys() or int(part["rank"]) != rank:
            raise BalancerError(
                f"Trace {path} was recorded by {len(parts)} ranks or more, and {other} is missing "
                f"or not of this recording. Put the files of all ranks into one folder."
            )
        parts.append(part)
    return _merge(parts)


def _npy(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _arrays(path: Path) -> dict[str, Array] | None:
    """The header and the joined chunks of one rank's file; None if it is no recording."""
    with path.open("rb") as file:
        start = file.read(_LOCAL_HEADER.size + len("recording.npy"))
        if not (start.startswith(_SIGNATURE) and start.endswith(b"recording.npy")):
            return None
        data = start + file.read()
    header: dict[str, Array] = {}
    chunks: dict[str, list[Array]] = {}
    for name, raw in _members(path, data):
        array = np.load(io.BytesIO(raw), allow_pickle=False)
        key, _, chunk = name.removesuffix(".npy").partition(".")
        if chunk:
            chunks.setdefault(key, []).append(array)
        else:
            header[key] = array
    if int(header["recording"]) != VERSION:
        raise BalancerError(
            f"Trace {path} has the recording format {int(header['recording'])}; this version of "
            f"vllm-balance reads format {VERSION}."
        )
    kind = "ids" if "num_tokens" in chunks else "counts"
    whole = min((len(chunks.get(name, ())) for name in _MEMBERS[kind]), default=0)
    if whole == 0:
        raise BalancerError(
            f"Trace {path} holds no whole step: nothing was recorded before it ended."
        )
    joined = {name: np.concatenate(chunks[name][:whole]) for name in _MEMBERS[kind]}
    return {**header, **joined}


def _members(path: Path, data: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of each whole member, in order.

    Raises:
        BalancerError: a member is whole but not what was written.
    """
    at = 0
    while data.startswith(_SIGNATURE, at) and at + _LOCAL_HEADER.size <= len(data):
        _, _, _, _, _, _, crc, packed, _, name_len, extra_len = _LOCAL_HEADER.unpack_from(data, at)
        name_at = at + _LOCAL_HEADER.size
        start = name_at + name_len + extra_len
        at = start + packed
        if packed == 0 or at > len(data):
            return  # the sizes are filled in last
        try:
            raw = zlib.decompress(data[start:at], -zlib.MAX_WBITS)
            damage = "its checksum is wrong" if zlib.crc32(raw) != crc else None
        except zlib.error as error:
            damage = str(error)
        if damage:
            name = data[name_at : name_at + name_len].decode(errors="replace")
            raise BalancerError(
                f"Trace {path} is damaged at byte {start} ({name}: {damage}). Record it again."
            )
        yield data[name_at : name_at + name_len].decode(), raw


def _merge(parts: list[dict[str, Array]]) -> dict[str, Array]:
    """One recording from those of all ranks: counts are summed, tokens put one behind the other."""
    common_N = functools.reduce(np.intersect1d, [part["step"] for part in parts])
    header = {key: parts[0][key] for key in ("num_experts", "top_k", "layer_index")}
    if "counts" in parts[0]:
        return header | _sum_counts(parts, common_N)
    return header | _join_tokens(parts, common_N)


def _sum_counts(parts: list[dict[str, Array]], common_N: Array) -> dict[str, Array]:
    chosen = [np.isin(part["step"], common_N) for part in parts]
    counts_NLE = np.zeros((len(common_N), *parts[0]["counts"].shape[1:]), np.int64)
    for part, rows in zip(parts, chosen, strict=True):
        counts_NLE += part["counts"][rows]
    phase_SN = np.stack([part["phase"][rows] for part, rows in zip(parts, chosen, strict=True)])
    phase_N = _phase_of_steps(phase_SN)
    busy_N = phase_N != Phase.IDLE
    return {"counts": counts_NLE[busy_N], "phase": phase_N[busy_N]}


def _join_tokens(parts: list[dict[str, Array]], common_N: Array) -> dict[str, Array]:
    for rank, part in enumerate(parts):
        part["step_T"] = np.repeat(part["step"], part["num_tokens"])
        part["request_id"] = part["request_id"] * len(parts) + rank
    joined = {name: np.concatenate([p[name] for p in parts]) for name in ("step_T", *PER_TOKEN)}
    order = np.argsort(joined["step_T"], kind="stable")
    order = order[np.isin(joined["step_T"][order], common_N)]
    return {name: joined[name][order] for name in PER_TOKEN}


def _phase_of_steps(phase_SN: Array) -> Array:
    """The phase of each step over all ranks: their common one, else mixed; idle ranks aside."""
    idle_SN = phase_SN == Phase.IDLE
    low_N = np.where(idle_SN, Phase.IDLE, phase_SN).min(0)
    high_N = np.where(idle_SN, 0, phase_SN).max(0)
    same_N = (low_N == high_N) | (low_N == Phase.IDLE)
    return np.where(same_N, low_N, Phase.MIXED).astype(np.uint8)
