"""The experts that tokens ask for: a seeded skew, or the tokens of a recorded trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from vllm_balance.errors import BalancerError
from vllm_balance.recording import Phase
from vllm_balance.replay import Replay
from vllm_balance.replay_rows import ReplaySettings, draw_from_counts
from vllm_balance.simulate.models import Model
from vllm_balance.traces import Trace

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(slots=True, kw_only=True)
class Traffic:
    """Rows of distinct experts for every simulated layer, handed out in order, over and over."""

    name: str
    num_experts: int
    decode_LNK: Array
    """int32: rows of decoding tokens."""
    prefill_LNK: Array
    """int32: rows of prompt tokens, those of a request one behind the other."""
    _position: list[int] = field(default_factory=lambda: [0, 0])

    @property
    def num_layers(self) -> int:
        return len(self.decode_LNK)

    @property
    def top_k(self) -> int:
        return self.decode_LNK.shape[2]

    def fresh(self) -> Traffic:
        """The same traffic from its beginning; the rows are shared."""
        return replace(self, _position=[0, 0])

    def batch(self, num_decode: int, num_prefill: int) -> torch.Tensor:
        """The next tokens' experts in all layers, int32 [L, tokens, K], decoding ones first."""
        parts = []
        for which, (rows_LNK, count) in enumerate(
            ((self.decode_LNK, num_decode), (self.prefill_LNK, num_prefill))
        ):
            length, start = rows_LNK.shape[1], self._position[which]
            parts.append(np.take(rows_LNK, np.arange(start, start + count) % length, axis=1))
            self._position[which] = (start + count) % length
        return torch.from_numpy(np.concatenate(parts, axis=1))

    def history(self, tokens_N2: Array) -> Array:
        """Counts of the next batches, to place experts by: int32 [N, L, E].

        tokens_N2: decoding tokens and prompt tokens of each batch.
        """
        size = self.num_layers * self.num_experts
        base_L11 = np.arange(self.num_layers)[:, None, None] * self.num_experts
        counts_NLE = np.empty((len(tokens_N2), self.num_layers, self.num_experts), np.int32)
        for step, (decode, prefill) in enumerate(tokens_N2.tolist()):
            cells = (self.batch(decode, prefill).numpy() + base_L11).ravel()
            counts_NLE[step] = np.bincount(cells, minlength=size).reshape(counts_NLE.shape[1:])
        return counts_NLE


@dataclass(slots=True, kw_only=True)
class Changing(Traffic):
    """Traffic whose popular experts are others after so many batches, as a server replays it: every
    batch takes the next rows, whether its tokens decode or not."""

    make: Callable[[], Replay]
    """What is replayed, from its beginning."""
    _replay: Replay = field(init=False)

    def __post_init__(self) -> None:
        self._replay = self.make()

    def fresh(self) -> Traffic:
        """The same traffic from its beginning."""
        return replace(self)

    def batch(self, num_decode: int, num_prefill: int) -> torch.Tensor:
        """The next tokens' experts in all layers, int32 [L, tokens, K]."""
        tokens = num_decode + num_prefill
        return torch.stack([self._replay.rows(layer, tokens) for layer in range(self.num_layers)])


def skewed(settings: ReplaySettings, model: Model, num_layers: int, rank: int = 0) -> Traffic:
    """What `replay` makes a server serve, a skew or a trace: the same rows, in the same order.

    Another rank draws other tokens from the same distributions: to place experts by, without
    knowing the tokens that are served.

    Raises ValueError if the skew does not fit the model.
    """
    make = partial(
        Replay,
        settings,
        num_layers=num_layers,
        num_experts=model.num_experts.value,
        top_k=model.top_k.value,
        rank=rank,
    )
    replay = make()
    rows_LNK = np.stack([replay.rows(layer, settings.rows).numpy() for layer in range(num_layers)])
    parts: dict[str, Any] = {
        "name": _name(settings),
        "num_experts": model.num_experts.value,
        "decode_LNK": rows_LNK,
        "prefill_LNK": rows_LNK,
    }
    return Changing(make=make, **parts) if settings.change_every else Traffic(**parts)


def _name(settings: ReplaySettings) -> str:
    if settings.trace is not None:
        return settings.trace.stem
    if settings.hot is not None:
        return f"hot {settings.hot.fraction:g}"
    return f"zipf {settings.zipf:g}"


def recorded(trace: Trace, model: Model, num_layers: int, seed: int, rows: int = 16384) -> Traffic:
    """Tokens of a trace: decoding ones at random, prompts whole, requests in random order.

    Of a trace of counts each token draws its experts from a random step, as `replay` does: decoding
    ones from steps of decode, those of prompts from steps of prefill, if there are any.
    The layers are from all over the trace, or its own over and over if it has fewer.

    Raises BalancerError if the trace is of a model of another shape.
    """
    shape = (model.num_experts.value, model.top_k.value)
    if (trace.num_experts, trace.top_k) != shape:
        raise BalancerError(
            f"Trace {trace.name} has {trace.num_experts} experts and top-{trace.top_k}, "
            f"{model.name} has {shape[0]} and top-{shape[1]}. Both must be of one model."
        )
    last = int(trace.layer_index_L[-1])
    if last >= model.num_layers.value:
        raise BalancerError(
            f"Trace {trace.name} has layers up to {last}, and {model.name} has "
            f"{model.num_layers.value} layers. Both must be of one model."
        )
    random = np.random.default_rng(seed)
    layers_L = spread_layers(trace.num_layers, num_layers)
    if trace.topk_ids_TLK is None:
        decode_LNK, prefill_LNK = (
            draw_from_counts(_counts_of(trace, phase), layers_L, rows, trace.top_k, random)
            for phase in (Phase.DECODE, Phase.PREFILL)
        )
    else:
        drawn = random.choice(trace.tokens_of(Phase.DECODE), rows)
        decode_LNK = _rows(trace, drawn, layers_L)
        prefill_LNK = _rows(trace, _in_requests(trace, random)[:rows], layers_L)
    return Traffic(
        name=trace.name,
        num_experts=trace.num_experts,
        decode_LNK=decode_LNK,
        prefill_LNK=prefill_LNK,
    )


def spread_layers(there: int, taken: int) -> Array:
    """So many of the layers that are there, from all over them, or all over and over, [taken]."""
    if taken > there:
        return np.arange(taken) % there
    return np.linspace(0, there, taken, endpoint=False, dtype=int) + there // (2 * taken)


def _counts_of(trace: Trace, phase: Phase) -> Array:
    """Counts of the recorded steps of a phase, [N, L, E]; of all steps if none is."""
    assert trace.counts_NLE is not None
    if trace.phase_N is not None and (trace.phase_N == int(phase)).any():
        return trace.counts_NLE[trace.phase_N == int(phase)]
    return trace.counts_NLE


def _in_requests(trace: Trace, random: np.random.Generator) -> Array:
    """Prompt tokens of a trace: requests, which may have any numbers, whole and in random order."""
    prompts = trace.tokens_of(Phase.PREFILL)
    if trace.request_id_T is None:
        return prompts
    numbers_R, index_T = np.unique(trace.request_id_T[prompts], return_inverse=True)
    place_R = np.empty(len(numbers_R), np.int64)
    place_R[random.permutation(len(numbers_R))] = np.arange(len(numbers_R))
    return prompts[np.argsort(place_R[index_T], kind="stable")]


def _rows(trace: Trace, tokens_N: Array, layers_L: Array) -> Array:
    assert trace.topk_ids_TLK is not None
    rows_NLK = trace.topk_ids_TLK[tokens_N][:, layers_L]
    return np.ascontiguousarray(rows_NLK.transpose(1, 0, 2).astype(np.int32))
