"""Recorded routing: the one file format, checked loading, and batches drawn from it.

A trace is an ``.npz`` file without pickles that holds either of

- ``topk_ids``: integers [tokens, layers, top_k], the logical experts of each token, and optionally
  ``request_id``, ``position`` and ``phase`` (0 prompt or teacher-forced, 1 decode), [tokens];
- ``counts``: integers [steps, layers, experts], pairs of each expert in each step, and optionally
  ``phase`` (0 prefill, 1 decode, 2 both), [steps];

beside the scalars ``num_experts`` and ``top_k`` (may be left out beside ``topk_ids``), and
optionally ``layer_index`` [layers]: which layer of the model each one is (0, 1, 2 ... if it is
missing). Other arrays are ignored. What a server recorded holds the same arrays in chunks;
``recording.py`` describes them and ``recorded.py`` joins them.
"""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vllm_balance import recorded
from vllm_balance.errors import BalancerError
from vllm_balance.recording import Phase

Array = np.ndarray[Any, np.dtype[Any]]
DEFAULT_BATCH = 256
"""Tokens of a batch from a trace of ids where nothing else is asked for."""
_PER_TOKEN = ("request_id", "position", "phase")
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    SyntaxError,
    tokenize.TokenError,
    RuntimeError,
    OverflowError,
    zlib.error,
    zipfile.BadZipFile,
)
"""What numpy and zipfile raise on damaged archives; RuntimeError is an encrypted member."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Recorded routing of one model; exactly one of `topk_ids_TLK` and `counts_NLE` is there."""

    name: str
    num_experts: int
    top_k: int
    layer_index_L: Array
    """Layer of the model that each recorded layer is, [L], rising."""
    topk_ids_TLK: Array | None = None
    counts_NLE: Array | None = None
    """Pairs of each expert in each recorded step, [N, L, E] int32 as they are read."""
    request_id_T: Array | None = None
    position_T: Array | None = None
    phase_T: Array | None = None
    phase_N: Array | None = None
    """What each recorded step was about, a `recording.Phase`, [N]."""

    @property
    def num_layers(self) -> int:
        return len(self.layer_index_L)

    @property
    def num_tokens(self) -> int:
        """Recorded tokens. Of counts: each token is `top_k` pairs in every layer."""
        if self.topk_ids_TLK is not None:
            return len(self.topk_ids_TLK)
        assert self.counts_NLE is not None
        pairs = int(self.counts_NLE.sum(dtype=np.int64))
        return round(pairs / (self.num_layers * self.top_k))

    def phases(self) -> dict[Phase, int]:
        """Recorded tokens, or of counts steps, of each phase that there is; {} if not recorded."""
        phases = self.phase_T if self.topk_ids_TLK is not None else self.phase_N
        if phases is None:
            return {}
        counted = {phase: int((phases == int(phase)).sum()) for phase in Phase}
        return {phase: number for phase, number in counted.items() if number}

    def of_phase(self, phase: Phase) -> Trace:
        """The tokens, or of counts the steps, of one phase alone.

        Raises:
            BalancerError: there are none, or phases were not recorded.
        """
        found = self.phases()
        if phase not in found:
            held = ", ".join(f"{number} {other.name.lower()}" for other, number in found.items())
            what = "steps" if self.topk_ids_TLK is None else "tokens"
            raise BalancerError(
                f"Phase {phase.name.lower()} of trace {self.name} was asked for, and the part of "
                f"it that is looked at has {held or 'no phases'} among its {what}. Ask for a phase "
                f"that is there or for none, or record more."
            )
        phases = self.phase_T if self.topk_ids_TLK is not None else self.phase_N
        assert phases is not None
        return self._only(phases == int(phase))

    def recorded_steps(self, most: int, seed: int) -> Array:
        """Steps of a trace of counts as they were recorded, [N, L, E] int32.

        All of them, or `most` that the seed draws, in recorded order; so phases have their real
        share.
        """
        assert self.counts_NLE is not None
        counts_NLE = self.counts_NLE
        if most < len(counts_NLE):
            drawn = np.random.default_rng(seed).choice(len(counts_NLE), most, replace=False)
            counts_NLE = counts_NLE[np.sort(drawn)]
        return counts_NLE.astype(np.int32, copy=False)

    def steps(self, batch: int, num_steps: int, seed: int) -> Array:
        """Decode-like batches: pairs of each expert, [num_steps, L, E] int32.

        Each batch takes `batch` tokens of as many different requests as there are, one random
        position of each: a continuous batch, not lockstep. Tokens of phase 1 only, if there are
        any. A trace of counts is thinned instead: `batch * top_k` pairs drawn from a recorded step,
        one of decode if there are any.
        """
        random = np.random.default_rng(seed)
        if self.topk_ids_TLK is None:
            return self._thin(batch, num_steps, random, Phase.DECODE)
        allowed = self.tokens_of(Phase.DECODE)
        request = allowed if self.request_id_T is None else self.request_id_T[allowed]
        order = np.argsort(request, kind="stable")
        allowed = allowed[order]
        _, first, sizes = np.unique(request[order], return_index=True, return_counts=True)
        drawn = np.stack([random.permutation(np.resize(random.permutation(len(first)), batch))
                          for _ in range(num_steps)])  # fmt: skip
        offset = (random.random(drawn.shape) * sizes[drawn]).astype(np.int64)
        return self.count(allowed[first[drawn] + offset])

    def prefill_steps(self, batch: int, num_steps: int, seed: int) -> Array:
        """Prefill-like batches: pairs of each expert, [num_steps, L, E] int32.

        Requests are put one behind the other in random order, the row is turned by a random
        number of tokens and cut into batches of `batch` consecutive tokens; again, with another
        order, until there are enough; if there are not more tokens than `batch`, each batch is all
        of them. Tokens of phase 0 only, if there are any. A trace of counts is thinned as in
        `steps`, from steps of prefill if there are any.
        """
        random = np.random.default_rng(seed)
        if self.topk_ids_TLK is None:
            return self._thin(batch, num_steps, random, Phase.PREFILL)
        allowed = self.tokens_of(Phase.PREFILL)
        total = len(allowed)
        size = min(batch, total)
        request = np.zeros(total, int) if self.request_id_T is None else self.request_id_T[allowed]
        order = np.argsort(request, kind="stable")
        parts = np.split(allowed[order], np.flatnonzero(np.diff(request[order])) + 1)
        batches: list[Array] = []
        while len(batches) < num_steps:
            row = np.concatenate([parts[i] for i in random.permutation(len(parts))])
            row = np.roll(row, random.integers(total))
            batches += list(row[: total // size * size].reshape(-1, size))
        return self.count(np.array(batches[:num_steps]))

    def tokens_of(self, phase: Phase) -> Array:
        """Which recorded tokens are of a phase, in recorded order; all of them if none is."""
        assert self.topk_ids_TLK is not None
        if self.phase_T is not None and (self.phase_T == int(phase)).any():
            return np.flatnonzero(self.phase_T == int(phase))
        return np.arange(len(self.topk_ids_TLK))

    def chunks(self, tokens: int) -> Array:
        """Batches of consecutive tokens: [steps, L, E] int32, in recorded order.

        The recorded steps themselves for a trace of counts. A last, shorter chunk is left out
        unless it is the only one.
        """
        if self.topk_ids_TLK is None:
            assert self.counts_NLE is not None
            return self.counts_NLE.astype(np.int32, copy=False)
        total = len(self.topk_ids_TLK)
        size = min(tokens, total)
        return self.count(np.arange(total // size * size).reshape(-1, size))

    def count(self, tokens_NB: Array) -> Array:
        """Pairs of each expert in batches of the given tokens, [N, L, E] int32."""
        assert self.topk_ids_TLK is not None
        counts_NLE = np.empty((len(tokens_NB), self.num_layers, self.num_experts), np.int32)
        layer_base_L1 = np.arange(self.num_layers)[:, None] * self.num_experts
        for step, tokens_B in enumerate(tokens_NB):
            cell_BLK = self.topk_ids_TLK[tokens_B].astype(np.int64) + layer_base_L1
            size = self.num_layers * self.num_experts
            counts_NLE[step] = np.bincount(cell_BLK.ravel(), minlength=size).reshape(
                self.num_layers, self.num_experts
            )
        return counts_NLE

    def split(self, seed: int = 0) -> tuple[Trace, Trace]:
        """Two halves, to fit on one and score on the other.

        By request where there are at least eight, else first and second part in recorded order.

        Raises:
            BalancerError: the trace has a single token or step.
        """
        recorded = self.topk_ids_TLK if self.topk_ids_TLK is not None else self.counts_NLE
        assert recorded is not None
        if len(recorded) < 2:
            raise BalancerError(f"Trace {self.name} has one step; at least two can be split.")
        is_first = np.arange(len(recorded)) < len(recorded) // 2
        if self.request_id_T is not None:
            requests = np.unique(self.request_id_T)
            if len(requests) >= 8:
                shuffled = np.random.default_rng(seed).permutation(requests)
                is_first = np.isin(self.request_id_T, shuffled[: len(requests) // 2])
        return self._only(is_first), self._only(~is_first)

    def _only(self, chosen: Array) -> Trace:
        def take(values: Array | None) -> Array | None:
            return None if values is None else values[chosen]

        return replace(
            self,
            topk_ids_TLK=take(self.topk_ids_TLK),
            counts_NLE=take(self.counts_NLE),
            request_id_T=take(self.request_id_T),
            position_T=take(self.position_T),
            phase_T=take(self.phase_T),
            phase_N=take(self.phase_N),
        )

    def _thin(self, batch: int, num_steps: int, random: np.random.Generator, phase: Phase) -> Array:
        counts_NLE = self.counts_NLE
        assert counts_NLE is not None
        if self.phase_N is not None and (self.phase_N == phase).any():
            counts_NLE = counts_NLE[self.phase_N == phase]
        share_NLE = counts_NLE / np.maximum(counts_NLE.sum(2, keepdims=True), 1)
        share_NLE[share_NLE.sum(2) == 0] = 1 / self.num_experts
        drawn_N = random.integers(0, len(share_NLE), num_steps)
        pairs = batch * self.top_k
        return random.multinomial(pairs, share_NLE[drawn_N]).astype(np.int32)


def load(path: Path) -> Trace:
    """The trace in a file, checked.

    Raises:
        BalancerError: the file is missing, damaged, too large for the memory, or does not hold what
            the format asks for.
    """
    try:
        return _load(path)
    except MemoryError as error:
        raise BalancerError(
            f"Trace {path} needs more memory than there is ({error}). Read it on a machine with "
            f"more, or record less (`max_bytes`). If the file is small, it is damaged: copy or "
            f"record it again."
        ) from error


def _load(path: Path) -> Trace:
    if not path.is_file():
        raise BalancerError(
            f"Trace {path} does not exist or is not a file. Record one on a server with "
            f"`--moe-record FILE` (docs/recording.md), or bring an .npz file (docs/placement.md)."
        )
    try:
        arrays = recorded.read(path)
        held = [] if arrays is None else list(arrays)
        if arrays is None:
            arrays, held = _read_npz(path)
    except BalancerError:
        raise
    except _UNREADABLE as error:
        raise BalancerError(
            f"Trace {path} is not an .npz file that can be read ({type(error).__name__}: {error}); "
            f"it may be cut short. Copy or record it again."
        ) from error
    try:
        return _trace(path.stem, arrays)
    except BalancerError as error:
        raise BalancerError(f"Trace {path} cannot be used: {error} It holds {held}.") from error


def _read_npz(path: Path) -> tuple[dict[str, Array], list[str]]:
    """The arrays that are known, and the names of all."""
    with np.load(path, allow_pickle=False) as archive:
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise BalancerError(f"Trace {path} is a single array; an .npz archive is needed.")
        known = ("topk_ids", "counts", "num_experts", "top_k", "layer_index", *_PER_TOKEN)
        return {name: archive[name] for name in known if name in archive}, archive.files


def save(path: Path, trace: Trace) -> None:
    """Writes a trace, compressed. Raises OSError if the folder is missing or not writable."""
    optional: dict[str, Any] = {
        "topk_ids": trace.topk_ids_TLK,
        "counts": trace.counts_NLE,
        "request_id": trace.request_id_T,
        "position": trace.position_T,
        "phase": trace.phase_N if trace.topk_ids_TLK is None else trace.phase_T,
    }
    np.savez_compressed(
        path,
        num_experts=np.int64(trace.num_experts),
        top_k=np.int64(trace.top_k),
        layer_index=trace.layer_index_L,
        **{name: array for name, array in optional.items() if array is not None},
    )


def _trace(name: str, arrays: dict[str, Array]) -> Trace:
    for key, array in arrays.items():
        if array.dtype.kind not in "iu":
            raise BalancerError(f"{key} has dtype {array.dtype}; integers are needed.")
    if ("topk_ids" in arrays) == ("counts" in arrays):
        raise BalancerError("it needs exactly one of topk_ids and counts.")
    key = "topk_ids" if "topk_ids" in arrays else "counts"
    recorded = arrays[key]
    if key == "topk_ids" and recorded.ndim == 3:
        arrays = {"top_k": np.array(recorded.shape[2]), **arrays}
    num_experts, top_k = _scalar(arrays, "num_experts", 2**20), _scalar(arrays, "top_k", 2**10)
    last = top_k if key == "topk_ids" else num_experts
    if recorded.ndim != 3 or 0 in recorded.shape or recorded.shape[2] != last:
        raise BalancerError(
            f"{key} has the shape {recorded.shape}; needed are three non-empty axes, the last of "
            f"length {last}."
        )
    limit = num_experts - 1 if key == "topk_ids" else 2**31 - 1
    if recorded.min() < 0 or recorded.max() > limit:
        raise BalancerError(
            f"{key} holds {recorded.min()} to {recorded.max()}; allowed are 0 to {limit}."
        )
    if key == "topk_ids":
        sorted_TLK = np.sort(recorded, axis=2)
        if (sorted_TLK[..., 1:] == sorted_TLK[..., :-1]).any():
            raise BalancerError("a token uses one expert twice in a layer.")
    layers_L = arrays.get("layer_index", np.arange(recorded.shape[1])).astype(np.int64)
    rises = layers_L.shape == recorded.shape[1:2] and (layers_L[1:] > layers_L[:-1]).all()
    if not rises or layers_L[0] < 0:
        raise BalancerError("layer_index must rise and have one entry per layer.")
    of_this_kind = _PER_TOKEN if key == "topk_ids" else ("phase",)
    for field in set(of_this_kind) & arrays.keys():
        if arrays[field].shape != recorded.shape[:1]:
            raise BalancerError(f"{field} must have one entry per token or recorded step.")
    per_token = {f"{f}_T": arrays.get(f) if key == "topk_ids" else None for f in _PER_TOKEN}
    return Trace(
        name=name,
        num_experts=num_experts,
        top_k=top_k,
        layer_index_L=layers_L,
        topk_ids_TLK=recorded if key == "topk_ids" else None,
        counts_NLE=recorded.astype(np.int32, copy=False) if key == "counts" else None,
        phase_N=arrays.get("phase") if key == "counts" else None,
        **per_token,
    )


def _scalar(arrays: dict[str, Array], key: str, limit: int) -> int:
    if key not in arrays or arrays[key].ndim != 0:
        raise BalancerError(f"{key} is missing or no single number.")
    value = int(arrays[key])
    if not 1 <= value <= limit:
        raise BalancerError(f"{key} is {value}; allowed are 1 to {limit}.")
    return value
