"""Takes recorded steps from the device to a file, in a thread of its own.

Steps are copied, still on the device, into a block of many; the thread takes full blocks to the
host and appends them to the file. What there is it takes after a few seconds, or as soon as no more
steps come: behind a SIGTERM vLLM kills its workers without waiting for them, so a server that has
answered its last request must have everything in its file. There are two blocks. If the thread
falls behind, steps are left out and counted: serving never waits.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from vllm_balance.recording import Phase, RecordingFile, RecordSettings

Array = np.ndarray[Any, np.dtype[Any]]
FLUSH_S = 2.0
"""Seconds after which recorded steps are written at the latest: what a kill under load can lose."""
LOOK_S = 0.25
"""Seconds between looks whether steps with tokens still come; if not, what is there is written. A
step that takes longer is a chunk of its own."""
BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One forward pass, as the scheduler planned it for this rank."""

    number: int
    """Forward passes of this worker up to this one, which is counted."""
    phase: Phase
    num_tokens: int
    request_id_T: Array | None = None
    """For a recording of ids; so are the next two."""
    position_T: Array | None = None
    phase_T: Array | None = None


@dataclass(slots=True, kw_only=True)
class _Block:
    """Recorded steps on their way to the file."""

    rows: torch.Tensor
    """int32 [N, L, 1 + E] of steps, or ids [T, L, K] of tokens."""
    copied: torch.cuda.Event | None
    used: int = 0
    steps: list[Step] = field(default_factory=list)

    def add(self, step: Step, routed: torch.Tensor) -> None:
        self.rows[self.used : self.used + len(routed)].copy_(routed)
        if self.copied is not None:
            self.copied.record()
        self.used += len(routed)
        self.steps.append(step)

    def on_host(self, stream: torch.cuda.Stream | None) -> Array:
        """The used rows; on CPU a view of them."""
        rows = self.rows[: self.used]
        if stream is not None and self.copied is not None:
            with torch.cuda.stream(stream):
                stream.wait_event(self.copied)
                rows = rows.cpu()
        return np.asarray(rows.numpy())

    def clear(self) -> None:
        self.used = 0
        self.steps.clear()


class StepWriter:
    """Writes into `file` from now on, until it is stopped or the file is full."""

    def __init__(
        self,
        file: RecordingFile,
        settings: RecordSettings,
        *,
        row: torch.Tensor,
        num_rows: int,
        log: Callable[[str], None],
    ) -> None:
        """Args: row: what one step (counts) or token (ids) takes, [L, 1 + E] or [L, K].
        num_rows: of them in a block; the largest step must fit.
        """
        self.settings = settings
        self._log = log
        self._state: Literal["recording", "stopped", "full", "failed"] = "recording"
        self._reason: str | None = None
        self._num_put = self._num_steps = self._num_tokens = self._dropped_steps = 0
        self._num_bytes = file.num_bytes
        self._writing_ns = 0
        self._changed = threading.Condition()
        self._filling, *self._free = [_new_block(row, num_rows) for _ in range(2)]
        self._full: list[_Block] = []
        self._thread = threading.Thread(
            target=self._write, args=(file, row.device), name="moe-recorder", daemon=True
        )
        self._thread.start()

    @property
    def is_writing(self) -> bool:
        return self._state == "recording"

    def put(self, step: Step, routed: torch.Tensor) -> None:
        """Takes a step with its rows, [1, L, 1 + E] or [T, L, K]; does nothing after the end."""
        with self._changed:
            if not self.is_writing:
                return
            self._num_put += 1
            has_room = self._filling.used + len(routed) <= len(self._filling.rows)
            if has_room or self._hand_over():
                self._filling.add(step, routed)
            else:
                self._dropped_steps += 1

    def stop(self) -> None:
        """Writes what is there and closes the file; does nothing after the end."""
        with self._changed:
            if self.is_writing:
                self._state = "stopped"
            self._changed.notify()
        self._thread.join()

    def status(self) -> dict[str, Any]:
        """State, why it is full or failed, and what is in the file so far."""
        return {
            "state": self._state,
            "reason": self._reason,
            "file": str(self.settings.file),
            "what": self.settings.what,
            "steps": self._num_steps,
            "tokens": self._num_tokens,
            "dropped_steps": self._dropped_steps,
            "bytes": self._num_bytes,
            "max_bytes": self.settings.max_bytes,
            "writing_us": self._writing_ns / 1e3,
        }

    def _hand_over(self) -> bool:
        """Gives the filled block to the thread; False if there is no free one to go on with."""
        if not self._free:
            return False
        self._full.append(self._filling)
        self._filling = self._free.pop()
        self._changed.notify()
        return True

    def _write(self, file: RecordingFile, device: torch.device) -> None:
        try:
            stream: torch.cuda.Stream | None = None
            if device.type == "cuda":
                # A thread begins on GPU 0, where it would make a context of its own.
                torch.cuda.set_device(device)
                stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            while (block := self._next_block()) is not None:
                if not file.append(self._chunk(block, stream)):
                    self._end("full", f"reached its limit of {self.settings.max_bytes:,} bytes")
                    break
                with self._changed:
                    self._num_bytes = file.num_bytes
                    self._writing_ns = time.thread_time_ns()
                    self._num_steps += len(block.steps)
                    self._num_tokens += sum(step.num_tokens for step in block.steps)
                    block.clear()
                    self._free.append(block)
            file.close()
        except (OSError, RuntimeError, ValueError, MemoryError) as error:
            self._end("failed", f"could not be written ({type(error).__name__}: {error})")
        finally:
            with contextlib.suppress(OSError, ValueError):
                file.close()

    def _next_block(self) -> _Block | None:
        """The next block with steps in it; None when the recording has ended."""
        flush_at, num_seen = time.monotonic() + FLUSH_S, 0
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._full or not self.is_writing, LOOK_S)
                # Data-parallel ranks take steps without tokens behind their last request.
                num_busy = sum(step.phase != Phase.IDLE for step in self._filling.steps)
                is_late = time.monotonic() + LOOK_S > flush_at
                due = num_busy == num_seen or is_late or not self.is_writing
                if self._filling.steps and due and not self._full:
                    self._hand_over()
                if self._full:
                    return self._full.pop(0)
                if not self.is_writing:
                    return None
                num_seen = num_busy

    def _chunk(self, block: _Block, stream: torch.cuda.Stream | None) -> dict[str, Array]:
        """The arrays of a chunk of the file."""
        steps, rows = block.steps, block.on_host(stream)
        chunk = {"step": np.array([step.number for step in steps], np.int64)}
        if self.settings.what == "counts":
            counts_NLE = rows[..., 1:]
            small = counts_NLE.max(initial=0) < 2**16
            chunk["counts"] = counts_NLE.astype(np.uint16 if small else np.int32)
            chunk["phase"] = np.array([step.phase for step in steps], np.uint8)
            return chunk
        chunk["topk_ids"] = rows
        chunk["num_tokens"] = np.array([step.num_tokens for step in steps], np.int32)
        for name, dtype in (("request_id", np.int64), ("position", np.int32), ("phase", np.uint8)):
            parts = [p for step in steps if (p := getattr(step, f"{name}_T")) is not None]
            chunk[name] = np.concatenate([np.empty(0, dtype), *parts]).astype(dtype)
        return chunk

    def _end(self, state: Literal["full", "failed"], why: str) -> None:
        """Nothing is written any more, nor what is in the blocks."""
        with self._changed:
            self._state, self._reason = state, why
            self._dropped_steps = self._num_put - self._num_steps
        self._log(f"The recording {self.settings.file} {why}; recording stopped.")


def _new_block(row: torch.Tensor, num_rows: int) -> _Block:
    rows = row.new_zeros((num_rows, *row.shape))
    copied = torch.cuda.Event() if rows.is_cuda else None  # type: ignore[no-untyped-call]
    return _Block(rows=rows, copied=copied)
