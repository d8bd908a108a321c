"""The recorder in a worker: which forward passes are steps, and what they are about."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from vllm_balance.balancer import LayerBalancer
from vllm_balance.errors import BalancerError
from vllm_balance.recorder import RecordedModel, Recorder
from vllm_balance.recording import Phase, RecordSettings
from vllm_balance.seams.combinations import is_pooling
from vllm_balance.step_writer import Step


class RecordingWorker:
    """Mixed in front of a vLLM worker class: tells the recorder where steps begin and end.

    With tensor parallelism every rank routes all tokens and the first one records; with data
    parallelism each records its own. Profiling and warm-up do not count as steps.
    """

    recorder: Recorder | None = None
    _record_from_start: RecordSettings | None = None
    _forwards: int = 0
    _requests: dict[str, int]
    """Numbers of the requests seen while recording ids."""
    _num_requests: int = 0
    _asked_by: str = ""
    """Who asked for the recording, see :meth:`moe_record_start`."""

    def attach_recorder(
        self,
        vllm_config: Any,
        runners: list[Any],
        layers: list[LayerBalancer],
        settings: RecordSettings | None,
    ) -> None:
        """Makes the recorder, which starts behind the warm-up if there are settings."""
        from vllm.model_executor.models.utils import extract_layer_index

        first, moe = layers[0], runners[0].moe_config
        shares_tokens = first.way == "replicated"
        if shares_tokens and first.rank != 0:
            return
        from vllm.config import CUDAGraphMode
        from vllm.logger import init_logger

        self._requests = {}
        self._record_from_start = settings
        self.recorder = Recorder(
            RecordedModel(
                num_experts=first.tables.num_logical,
                top_k=moe.experts_per_token,
                layer_index=tuple(extract_layer_index(runner.layer_name) for runner in runners),
                rank=0 if shares_tokens else first.rank,
                num_ranks=1 if shares_tokens else first.tables.num_ranks,
                max_step_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
                device=first.tables.counters.device,
            ),
            captured=None if settings is None else settings.what,
            graphs=vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE,
            log=init_logger(f"vllm.{__name__}").warning,
        )
        for index, layer in enumerate(layers):
            layer.record = partial(self.recorder.add, index)

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()  # type: ignore[misc]
        if self.recorder is not None and self._record_from_start is not None:
            self.recorder.start(self._record_from_start)
        return times

    def execute_model(self, scheduler_output: Any) -> Any:
        if not scheduler_output.total_num_scheduled_tokens:
            return super().execute_model(scheduler_output)  # type: ignore[misc]
        self._forwards += 1
        recorder = self.recorder
        if recorder is None or not recorder.is_recording:
            return super().execute_model(scheduler_output)  # type: ignore[misc]
        recorder.begin_step()
        output = super().execute_model(scheduler_output)  # type: ignore[misc]
        recorder.end_step(self._step(scheduler_output, with_tokens=recorder.wants_tokens))
        return output

    def execute_dummy_batch(self) -> None:
        """A data-parallel rank without requests: a step of no tokens."""
        self._forwards += 1
        super().execute_dummy_batch()  # type: ignore[misc]
        if self.recorder is not None and self.recorder.is_recording:
            self.recorder.end_step(Step(number=self._forwards, phase=Phase.IDLE, num_tokens=0))

    def shutdown(self) -> None:
        if self.recorder is not None:
            self.recorder.stop()
        super().shutdown()  # type: ignore[misc]

    def moe_record_start(
        self, settings: dict[str, Any], asked_by: str = ""
    ) -> dict[str, Any] | None:
        """Starts a recording; for ``collective_rpc``. The state, or the reason under ``error``.

        Args:
            asked_by: who may take it back with :meth:`moe_record_cancel`.
        """
        if self.recorder is None:
            return None
        try:
            asked = RecordSettings.model_validate(settings)
            if asked.what == "ids" and is_pooling(self.model_config):  # type: ignore[attr-defined]
                raise BalancerError(
                    "Of a pooling model `counts` can be recorded, not `ids`: its runner does not "
                    "tell whose tokens a step's rows were. Leave `what` out."
                )
            self.recorder.start(asked)
        except (BalancerError, OSError, RuntimeError, ValueError) as error:
            return {"error": str(error)}
        self._requests, self._asked_by = {}, asked_by
        return self.recorder.status()

    def moe_record_cancel(self, asked_by: str) -> None:
        """Ends a recording that `asked_by` started, if it runs here, and removes its file."""
        if self.recorder is not None and asked_by == self._asked_by:
            self.recorder.cancel()

    def moe_record_stop(self) -> dict[str, Any] | None:
        """Ends the recording and closes its file; for ``collective_rpc``."""
        if self.recorder is not None:
            self.recorder.stop()
        return self.moe_record_status()

    def moe_record_status(self) -> dict[str, Any] | None:
        """What this rank recorded; None on ranks whose tokens another one records."""
        return None if self.recorder is None else self.recorder.status()

    def _step(self, scheduler_output: Any, *, with_tokens: bool) -> Step:
        request_ids = list(scheduler_output.num_scheduled_tokens)
        if with_tokens:
            request_ids = self._in_order(request_ids)
        num_tokens_R = [scheduler_output.num_scheduled_tokens[r] for r in request_ids]
        decoding = _decoding(scheduler_output)
        phase_R = [int(request in decoding) for request in request_ids]
        phase = Phase(phase_R[0]) if len(set(phase_R)) == 1 else Phase.MIXED
        step = Step(
            number=self._forwards,
            phase=phase,
            num_tokens=scheduler_output.total_num_scheduled_tokens,
        )
        if not with_tokens:
            return step
        computed = _num_computed(scheduler_output)
        start_R = np.array([computed[request] for request in request_ids])
        first_token_R = np.cumsum(num_tokens_R) - num_tokens_R
        return replace(
            step,
            request_id_T=np.repeat(self._numbers(scheduler_output, request_ids), num_tokens_R),
            position_T=np.arange(step.num_tokens)
            + np.repeat(start_R - first_token_R, num_tokens_R),
            phase_T=np.repeat(phase_R, num_tokens_R),
        )

    def _in_order(self, request_ids: list[str]) -> list[str]:
        """The requests of a step in the order of their tokens."""
        runner = self.model_runner  # type: ignore[attr-defined]
        # vLLM's second model runner keeps it with the step.
        batch = getattr(runner.execute_model_state, "input_batch", None) or runner.input_batch
        scheduled = set(request_ids)
        return [request for request in batch.req_ids if request in scheduled]

    def _numbers(self, scheduler_output: Any, request_ids: list[str]) -> list[int]:
        """A number for each request, which it keeps as long as it lives."""
        for request in scheduler_output.finished_req_ids:
            self._requests.pop(request, None)
        for request in request_ids:
            if request not in self._requests:
                self._requests[request] = self._num_requests
                self._num_requests += 1
        return [self._requests[request] for request in request_ids]


def _decoding(scheduler_output: Any) -> set[str]:
    """Requests of a step that compute the token they generated last, and nothing else: those that
    were preempted compute their prompt and what they generated anew."""
    cached = scheduler_output.scheduled_cached_reqs
    return {
        request
        for request in cached.req_ids
        if not cached.is_context_phase(request)
        and scheduler_output.num_scheduled_tokens[request] == 1
    }


def _num_computed(scheduler_output: Any) -> dict[str, int]:
    """Tokens of each request of a step that were computed before it."""
    cached = scheduler_output.scheduled_cached_reqs
    new = {request.req_id: request.num_computed_tokens
           for request in scheduler_output.scheduled_new_reqs}  # fmt: skip
    return new | dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
