"""Records what the routers of one rank choose while it serves, without waiting for anything.

A step's routing gathers in one buffer on the device. Behind the step it is copied, still on the
device, into a block of many steps; a thread takes full blocks (or what there is, every few seconds)
to the host and into the file. If the thread falls behind, steps are left out and counted: serving
never waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from vllm_balance.errors import BalancerError
from vllm_balance.recording import Phase, RecordingFile, RecordSettings, path_of_rank

Array = np.ndarray[Any, np.dtype[Any]]
FLUSH_S = 2.0
"""Seconds after which recorded steps are written at the latest: what a kill can lose."""
BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One forward pass, as the scheduler planned it for this rank."""

    number: int
    """Forward passes of this worker before this one."""
    phase: Phase
    num_tokens: int
    request_id_T: Array | None = None
    """For a recording of ids; so are the next two."""
    position_T: Array | None = None
    phase_T: Array | None = None


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

    @property
    def ids_dtype(self) -> torch.dtype:
        return torch.uint8 if self.num_experts <= 256 else torch.int16


@dataclass(slots=True, kw_only=True)
class _Block:
    """Recorded steps on their way to the file."""

    rows: torch.Tensor
    """int32 [N, L, 1 + E] of steps, or ids [T, L, K] of tokens."""
    used: int = 0
    steps: list[Step] = field(default_factory=list)
    copied: torch.cuda.Event | None = None

    def add(self, step: Step, routed: torch.Tensor) -> None:
        self.rows[self.used : self.used + len(routed)].copy_(routed)
        if self.copied is not None:
            self.copied.record()
        self.used += len(routed)
        self.steps.append(step)

    def clear(self) -> None:
        self.used = 0
        self.steps.clear()


class Recorder:
    """The recorder of one rank. :meth:`add` is called by every layer, the rest by the worker."""

    def __init__(
        self,
        model: RecordedModel,
        *,
        captured: Literal["counts", "ids"] | None = None,
        graphs: bool = False,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Args: captured: what to record from the start, so that CUDA graphs contain it.
        graphs: CUDA graphs are used; then nothing else can be recorded later.
        """
        self.model = model
        self._captured, self._graphs, self._log = captured, graphs, log
        self._routed: torch.Tensor | None = None
        if captured is not None:
            self._routed = self._step_buffer(captured)
        self._settings: RecordSettings | None = None
        self._state = "off"
        self._num_steps = self._num_tokens = self._dropped_steps = self._num_bytes = 0
        self._changed = threading.Condition()
        self._filling: _Block | None = None
        self._full: list[_Block] = []
        self._free: list[_Block] = []
        self._writer: threading.Thread | None = None

    @property
    def is_recording(self) -> bool:
        return self._state == "recording"

    @property
    def wants_tokens(self) -> bool:
        """Whether the next step must come with its tokens' requests and positions."""
        return self._settings is not None and self._settings.what == "ids"

    def start(self, settings: RecordSettings) -> None:
        """Opens a new file and records from the next step on.

        Raises:
            BalancerError: it records already, the file cannot be made, or CUDA graphs were
                captured without what is asked for.
        """
        if self.is_recording:
            assert self._settings is not None
            raise BalancerError(
                f"A recording into {self._settings.file} is running. Stop it first."
            )
        if self._graphs and settings.what != self._captured:
            raise BalancerError(
                f"The server's CUDA graphs were captured without recording {settings.what}. Start "
                f"it with --moe-record (and `what` in `record`), or with --enforce-eager."
            )
        model = self.model
        header = {
            "num_experts": model.num_experts,
            "top_k": model.top_k,
            "rank": model.rank,
            "num_ranks": model.num_ranks,
            "layer_index": np.array(model.layer_index, np.int64),
        }
        path = path_of_rank(settings.file.expanduser().absolute(), model.rank)
        file = RecordingFile(path, settings.what, settings.max_bytes, header)
        self._settings = settings.model_copy(update={"file": path})
        self._num_steps = self._num_tokens = self._dropped_steps = 0
        self._num_bytes = file.num_bytes
        if self._captured != settings.what:
            self._routed = self._step_buffer(settings.what)
        self._filling, self._full = self._block(settings), []
        self._free = [self._block(settings)]
        self._state = "recording"
        self._writer = threading.Thread(
            target=self._write, args=(file,), name="moe-recorder", daemon=True
        )
        self._writer.start()

    def stop(self) -> None:
        """Writes what is there and closes the file; nothing happens if it does not record."""
        with self._changed:
            if self.is_recording:
                self._state = "stopped"
            self._changed.notify()
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def status(self) -> dict[str, Any]:
        """State and extent of the recording, the last one if it ended."""
        if self._settings is None:
            return {"state": self._state}
        return {
            "state": self._state,
            "file": str(self._settings.file),
            "what": self._settings.what,
            "steps": self._num_steps,
            "tokens": self._num_tokens,
            "dropped_steps": self._dropped_steps,
            "bytes": self._num_bytes,
            "max_bytes": self._settings.max_bytes,
        }

    def add(
        self, layer: int, topk_ids_TK: torch.Tensor, num_valid_tokens: torch.Tensor | None
    ) -> None:
        """Adds one layer's routing to the step's buffer: no host sync, fixed addresses.

        Args:
            layer: index among the MoE layers.
            topk_ids_TK: logical ids of this rank's tokens; -1 for padding.
            num_valid_tokens: one element: rows from here on are padding. None: no such rows.
        """
        routed = self._routed
        if routed is None:
            return
        if routed.dtype != torch.int32:
            ids_TK = topk_ids_TK[: len(routed)]
            routed[: len(ids_TK), layer].copy_(ids_TK)
            return
        bin_N = topk_ids_TK.reshape(-1).long() + 1
        if num_valid_tokens is not None:
            token_N = torch.arange(len(bin_N), device=bin_N.device) // topk_ids_TK.shape[1]
            bin_N = torch.where(token_N < num_valid_tokens, bin_N, 0)
        routed[0, layer].index_add_(0, bin_N, torch.ones_like(bin_N, dtype=torch.int32))

    def begin_step(self) -> None:
        """Forgets what dummy batches left behind; before the forward pass."""
        routed = self._routed
        if routed is not None and not self.wants_tokens:
            routed.zero_()

    def end_step(self, step: Step) -> None:
        """Takes the step that was launched last, or drops it if the writer is behind."""
        with self._changed:
            block, routed = self._filling, self._routed
            if block is None or routed is None or not self.is_recording:
                return
            num_rows = step.num_tokens if self.wants_tokens else 1
            if block.used + num_rows > len(block.rows) and not self._hand_over():
                self._dropped_steps += 1
                return
            block = self._filling
            assert block is not None
            if step.phase == Phase.IDLE:
                routed.zero_()
            block.add(step, routed[:num_rows])

    def _hand_over(self) -> bool:
        """Gives the filled block to the writer; False if there is no free one to go on with."""
        if not self._free:
            return False
        assert self._filling is not None
        self._full.append(self._filling)
        self._filling = self._free.pop()
        self._changed.notify()
        return True

    def _step_buffer(self, what: str) -> torch.Tensor:
        model = self.model
        num_layers, device = len(model.layer_index), model.device
        if what == "counts":
            # Column 0 takes the padding.
            shape = (1, num_layers, 1 + model.num_experts)
            return torch.zeros(shape, dtype=torch.int32, device=device)
        shape = (model.max_step_tokens, num_layers, model.top_k)
        return torch.zeros(shape, dtype=model.ids_dtype, device=device)

    def _block(self, settings: RecordSettings) -> _Block:
        """An empty block: small against the limit, and with room for the largest step."""
        assert self._routed is not None
        row = self._routed[0]
        row_bytes = row.numel() * row.element_size()
        num_rows = min(BLOCK_BYTES, settings.max_bytes // 8) // row_bytes
        if settings.what == "ids":
            num_rows = max(num_rows, self.model.max_step_tokens)
        rows = row.new_zeros((max(num_rows, 1), *row.shape))
        copied = torch.cuda.Event() if rows.is_cuda else None  # type: ignore[no-untyped-call]
        return _Block(rows=rows, copied=copied)

    def _write(self, file: RecordingFile) -> None:
        """The writer's thread: blocks to chunks, until the recording ends or the file is full."""
        stream = None
        if self.model.device.type == "cuda":
            stream = torch.cuda.Stream(self.model.device)  # type: ignore[no-untyped-call]
        try:
            while (block := self._next_block()) is not None:
                if not file.append(self._chunk(block, stream)):
                    self._end("full", f"reached its limit of {self._limit():,} bytes")
                    break
                self._num_bytes = file.num_bytes
                with self._changed:
                    self._num_steps += len(block.steps)
                    self._num_tokens += sum(step.num_tokens for step in block.steps)
                    block.clear()
                    self._free.append(block)
            file.close()
        except OSError as error:
            self._end("failed", f"could not be written: {error}")
        self._filling, self._full, self._free = None, [], []
        if not self._graphs:
            self._routed = None

    def _next_block(self) -> _Block | None:
        """The next block with steps in it; None when the recording has ended."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._full or not self.is_recording, FLUSH_S)
                if not self._full and self._filling and self._filling.steps and self._free:
                    self._hand_over()
                if self._full:
                    return self._full.pop(0)
                if not self.is_recording:
                    return None

    def _chunk(self, block: _Block, stream: torch.cuda.Stream | None) -> dict[str, Array]:
        """The arrays of a chunk of the file, on the host."""
        rows = block.rows[: block.used]
        if stream is not None and block.copied is not None:
            with torch.cuda.stream(stream):
                stream.wait_event(block.copied)
                rows = rows.cpu()
        host = rows.numpy()
        steps = block.steps
        chunk: dict[str, Array] = {"step": np.array([step.number for step in steps], np.int64)}
        if not self.wants_tokens:
            counts_NLE = host[..., 1:]
            small = counts_NLE.max(initial=0) < 2**16
            chunk["counts"] = counts_NLE.astype(np.uint16 if small else np.int32)
            chunk["phase"] = np.array([step.phase for step in steps], np.uint8)
            return chunk
        chunk["topk_ids"] = host
        chunk["num_tokens"] = np.array([step.num_tokens for step in steps], np.int32)
        for name, dtype in (("request_id", np.int64), ("position", np.int32), ("phase", np.uint8)):
            parts = [p for step in steps if (p := getattr(step, f"{name}_T")) is not None]
            chunk[name] = np.concatenate([np.empty(0, dtype), *parts]).astype(dtype)
        return chunk

    def _limit(self) -> int:
        assert self._settings is not None
        return self._settings.max_bytes

    def _end(self, state: str, why: str) -> None:
        with self._changed:
            self._state = state
        assert self._settings is not None
        self._log(f"The recording {self._settings.file} {why}; recording stopped.")
