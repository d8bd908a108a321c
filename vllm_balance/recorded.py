"""Reads what a server recorded (``recording.py``), also what a killed one left, over all ranks."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vllm_balance.errors import BalancerError
from vllm_balance.recording import MEMBERS, PER_TOKEN, VERSION, Phase, path_of_rank

Array = np.ndarray[Any, np.dtype[Any]]
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_SIGNATURE = b"PK\x03\x04"
_INT = "iu"
"""Kinds of dtype that are whole numbers."""
_DEEP = ("counts", "topk_ids")
"""Arrays of a chunk with more than one axis."""


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
        if part is None or int(part["rank"]) != rank or not _of_one_recording(first, part):
            raise BalancerError(
                f"Trace {path} was recorded by {len(parts)} ranks or more, and {other} is missing "
                f"or not of this recording. Put the files of all ranks into one folder."
            )
        parts.append(part)
    return _merge(parts)


def _of_one_recording(first: dict[str, Array], other: dict[str, Array]) -> bool:
    """Whether the files of two ranks belong together, by their headers."""
    same = ("num_experts", "top_k", "num_ranks", "layer_index", "run")
    return first.keys() == other.keys() and all(
        np.array_equal(first[key], other[key]) for key in same if key in first
    )


def _arrays(path: Path) -> dict[str, Array] | None:
    """The header and the joined chunks of one rank's file; None if it is no recording."""
    with path.open("rb") as file:
        start = file.read(_LOCAL_HEADER.size + len("recording.npy"))
        if not (start.startswith(_SIGNATURE) and start.endswith(b"recording.npy")):
            return None
    header, chunks = _header_and_chunks(path)
    _require_numbers(path, header)
    if int(header["recording"]) != VERSION:
        raise BalancerError(
            f"Trace {path} has the recording format {int(header['recording'])}; this version of "
            f"vllm-balance reads format {VERSION}."
        )
    kind = "ids" if "num_tokens" in chunks else "counts"
    whole = min((len(chunks.get(name, ())) for name in MEMBERS[kind]), default=0)
    if whole == 0:
        raise BalancerError(
            f"Trace {path} holds no whole step: nothing was recorded before it ended."
        )
    joined = {name: np.concatenate(chunks.pop(name)[:whole]) for name in MEMBERS[kind]}
    _require_lengths(path, joined)
    return {**header, **joined}


def _require_numbers(path: Path, header: dict[str, Array]) -> None:
    """Raises BalancerError unless the header tells the format and the ranks, in a number each."""
    for name in ("recording", "rank", "num_ranks"):
        found = header.get(name)
        if found is None or found.ndim or found.dtype.kind not in _INT:
            raise BalancerError(
                f"Trace {path} is damaged: {name} in its header is missing or no whole number. "
                f"Copy or record it again."
            )


def _require_lengths(path: Path, joined: dict[str, Array]) -> None:
    """Raises BalancerError unless there is one entry for each step, and one for each token, and
    all are whole numbers."""
    odd = [
        f"{name} {array.dtype}" for name, array in joined.items() if array.dtype.kind not in _INT
    ]
    if odd:
        raise BalancerError(
            f"Trace {path} is damaged: it holds {', '.join(odd)}, and whole numbers are needed. "
            f"Copy or record it again."
        )
    of_tokens = PER_TOKEN if "num_tokens" in joined else ()
    length = {name: array.shape[:1] for name, array in joined.items()}
    steps = {length[name] for name in joined if name not in of_tokens}
    tokens = {length[name] for name in of_tokens}
    if of_tokens:
        tokens.add((int(joined["num_tokens"].sum()),))
    flat = all(array.ndim == 1 for name, array in joined.items() if name not in _DEEP)
    if len(steps) > 1 or len(tokens) > 1 or not flat:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in joined.items())
        raise BalancerError(
            f"Trace {path} is damaged: it holds {shapes}, and needed is one entry for each step "
            f"and, of ids, one for each of its tokens. Copy or record it again."
        )


def _header_and_chunks(path: Path) -> tuple[dict[str, Array], dict[str, list[Array]]]:
    """The arrays in front of the chunks by name, and those of each chunk in order."""
    header: dict[str, Array] = {}
    chunks: dict[str, list[Array]] = {}
    for name, raw in _members(path, path.read_bytes()):
        array = np.lib.format.read_array(  # type: ignore[no-untyped-call]
            io.BytesIO(raw), allow_pickle=False
        )
        key, _, chunk = name.removesuffix(".npy").partition(".")
        if chunk:
            chunks.setdefault(key, []).append(array)
        else:
            header[key] = array
    return header, chunks


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
    phase_SN = np.stack([part["phase"][rows] for part, rows in zip(parts, chosen, strict=True)])
    counts_NLE = _only(parts[0]["counts"], chosen[0])
    if len(parts) > 1:
        most = sum(int(part["counts"].max(initial=0)) for part in parts)
        counts_NLE = counts_NLE.astype(np.int32 if most < 2**31 else np.int64)
    for part, rows in zip(parts[1:], chosen[1:], strict=True):
        counts_NLE += _only(part["counts"], rows)
    phase_N = _phase_of_steps(phase_SN)
    busy_N = phase_N != Phase.IDLE
    return {"counts": _only(counts_NLE, busy_N), "phase": phase_N[busy_N]}


def _only(values: Array, rows_N: Array) -> Array:
    """The chosen rows; the array itself if all are, for it may fill half of the memory."""
    return values if rows_N.all() else values[rows_N]


def _join_tokens(parts: list[dict[str, Array]], common_N: Array) -> dict[str, Array]:
    if len(parts) == 1:
        return {name: parts[0][name] for name in PER_TOKEN}
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
