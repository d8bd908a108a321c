"""Records what the routers of one rank choose while it serves, without waiting for anything.

A step's routing gathers in one buffer on the device; behind the step a :class:`StepWriter` takes it
from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_balance import documents
from vllm_balance.errors import BalancerError
from vllm_balance.recording import Phase, RecordingFile, RecordSettings, What, path_of_rank
from vllm_balance.step_writer import BLOCK_BYTES, Step, StepWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedModel:
    """What a recording says about the model, and which part of the ranks' tokens this is."""

    num_experts: int
    top_k: int
    layer_index: tuple[int, ...]
    rank: int
    num_ranks: int
    """Ranks that record, each its own tokens."""
    max_step_tokens: int
    device: torch.device

    def step_buffer(self, what: What) -> torch.Tensor:
        """Zeros for the routing of one step.

        Counts: int32 [1, L, 1 + E], column 0 for padding. Ids: [max_step_tokens, L, K].
        """
        num_layers = len(self.layer_index)
        if what == "counts":
            shape = (1, num_layers, 1 + self.num_experts)
            return torch.zeros(shape, dtype=torch.int32, device=self.device)
        dtype = torch.uint8 if self.num_experts <= 256 else torch.int16
        shape = (self.max_step_tokens, num_layers, self.top_k)
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def header(self) -> dict[str, Any]:
        """The scalars and the layers at the front of a file."""
        return {
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "rank": self.rank,
            "num_ranks": self.num_ranks,
            "layer_index": np.array(self.layer_index, np.int64),
        }


class Recorder:
    """The recorder of one rank. :meth:`add` is called by every layer, the rest by the worker."""

    def __init__(
        self,
        model: RecordedModel,
        *,
        captured: What | None = None,
        graphs: bool = False,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Args: captured: what to record from the start, so that CUDA graphs contain it.
        graphs: CUDA graphs are used; then nothing else can be recorded later.
        """
        self.model = model
        self._captured, self._graphs, self._log = captured, graphs, log
        self._routed = None if captured is None else model.step_buffer(captured)
        self._writer: StepWriter | None = None
        self._serving_ns = 0

    @property
    def is_recording(self) -> bool:
        return self._writer is not None and self._writer.is_writing

    @property
    def wants_tokens(self) -> bool:
        """Whether steps must come with their tokens' requests, positions and phases."""
        return self._writer is not None and self._writer.settings.what == "ids"

    def start(self, settings: RecordSettings) -> None:
        """Opens a new file and records from the next step on.

        Raises:
            BalancerError: it records already, the file cannot be made, or CUDA graphs were
                captured without what is asked for.
        """
        if self._writer is not None and self._writer.is_writing:
            raise BalancerError(
                f"A recording into {self._writer.settings.file} is running. Stop it first."
            )
        if self._graphs and settings.what != self._captured:
            raise BalancerError(
                f"The server's CUDA graphs were captured without recording {settings.what}. Start "
                f"it with --moe-record (and `what` in `record`), or with --enforce-eager."
            )
        path = path_of_rank(documents.expanded(settings.file).absolute(), self.model.rank)
        settings = settings.model_copy(update={"file": path})
        if self._captured != settings.what or self._routed is None:
            self._captured, self._routed = settings.what, self.model.step_buffer(settings.what)
        self._serving_ns = 0
        row = self._routed[0]
        num_rows = min(BLOCK_BYTES, settings.max_bytes // 8) // (row.numel() * row.element_size())
        file = RecordingFile(
            path, settings.what, settings.max_bytes, {**self.model.header(), "run": settings.run}
        )
        with ExitStack() as undo:
            undo.callback(path.unlink)
            undo.callback(file.close)
            self._writer = StepWriter(
                file, settings, row=row, num_rows=max(num_rows, len(self._routed)), log=self._log
            )
            undo.pop_all()

    def stop(self) -> None:
        """Writes what is there and closes the file; nothing happens if it does not record."""
        if self._writer is not None:
            self._writer.stop()

    def cancel(self) -> None:
        """Ends a recording as if it had not been started: without its file."""
        if self._writer is not None:
            self._writer.stop()
            self._writer.settings.file.unlink(missing_ok=True)
            self._writer = None

    def status(self) -> dict[str, Any]:
        """State and extent of the recording, the last one if it ended."""
        if self._writer is None:
            return {"state": "off"}
        return {**self._writer.status(), "serving_us": self._serving_ns / 1e3}

    def add(
        self, layer: int, topk_ids_TK: torch.Tensor, num_valid_tokens: torch.Tensor | None
    ) -> None:
        """Adds one layer's routing to the step's buffer: no host sync, fixed addresses.

        Args:
            layer: index among the MoE layers.
            topk_ids_TK: logical ids of this rank's tokens; below 0 for padding.
            num_valid_tokens: one element: rows from here on are padding. None: no such rows.
        """
        routed = self._routed
        if routed is None or not (self._graphs or self.is_recording):
            return
        start = time.perf_counter_ns()
        _gather(routed, layer, topk_ids_TK, num_valid_tokens)
        self._serving_ns += time.perf_counter_ns() - start

    def begin_step(self) -> None:
        """Forgets what dummy batches left behind; before the forward pass."""
        start = time.perf_counter_ns()
        if self._routed is not None and not self.wants_tokens:
            self._routed.zero_()
        self._serving_ns += time.perf_counter_ns() - start

    def end_step(self, step: Step) -> None:
        """Takes the step that was launched last, or drops it if the writer is behind."""
        if self._writer is None or self._routed is None:
            return
        start = time.perf_counter_ns()
        if step.phase == Phase.IDLE:
            self._routed.zero_()
        self._writer.put(step, self._routed[: step.num_tokens if self.wants_tokens else 1])
        self._serving_ns += time.perf_counter_ns() - start


def _gather(
    routed: torch.Tensor,
    layer: int,
    topk_ids_TK: torch.Tensor,
    num_valid_tokens: torch.Tensor | None,
) -> None:
    """Adds a layer's ids to a step's buffer of either kind."""
    if routed.dtype != torch.int32:
        ids_TK = topk_ids_TK[: len(routed)]
        routed[: len(ids_TK), layer].copy_(ids_TK)
        return
    bin_N = topk_ids_TK.reshape(-1).long().clamp(min=-1) + 1
    if num_valid_tokens is not None:
        token_N = torch.arange(len(bin_N), device=bin_N.device) // topk_ids_TK.shape[1]
        bin_N = torch.where(token_N < num_valid_tokens, bin_N, 0)
    routed[0, layer].index_add_(0, bin_N, torch.ones_like(bin_N, dtype=torch.int32))
