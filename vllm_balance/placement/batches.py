"""Which batches of a trace experts are placed by.

GEM minimises a sum over the steps of a trace (arXiv 2605.19945). A trace of counts holds the steps,
so they are taken as they were recorded; one of ids holds tokens, from which batches are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_balance.errors import BalancerError
from vllm_balance.placement.policy import Array
from vllm_balance.recording import Phase
from vllm_balance.trace_summary import main_phase
from vllm_balance.traces import DEFAULT_BATCH, Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """How batches are taken from a trace, or from a half of it."""

    batch: int | None
    """Tokens; None: of counts the recorded steps as they are, of ids DEFAULT_BATCH."""
    steps: int
    """How many, at most."""
    phase: Phase | None
    """PREFILL or DECODE; None: of counts all steps, of ids and with `batch` those of decode."""
    prefill_batch: int | None
    """Tokens of as many batches of prefill beside the others."""
    seed: int

    def of(self, trace: Trace) -> Array:
        """Pairs of each expert, [N, L, E] int32.

        Raises:
            BalancerError: a batch of prefill would be all tokens of the trace, every time; batches
                of prefill were asked for beside recorded steps; or no step of the phase was
                recorded.
        """
        if not self._as_recorded(trace):
            return np.concatenate([self._drawn(trace, *kind) for kind in self._kinds()])
        if self.prefill_batch is not None:
            raise BalancerError(
                f"--prefill-batch {self.prefill_batch} was given without --batch, and trace "
                f"{trace.name} holds counts, whose recorded steps are taken as they are, those of "
                f"prefill in their real share. Leave it out, or give --batch too, so that batches "
                f"of both sizes are drawn."
            )
        return self._part(trace).recorded_steps(self.steps, self.seed)

    def described(self, trace: Trace) -> str:
        """What `of` gives, in words."""
        if not self._as_recorded(trace):
            return " and ".join(self._in_words(*kind) for kind in self._kinds())
        part = self._part(trace)
        assert part.counts_NLE is not None
        total = len(part.counts_NLE)
        phases = ", ".join(f"{n} {phase.name.lower()}" for phase, n in part.phases().items())
        return f"{min(self.steps, total)} of {total} recorded steps{phases and f' ({phases})'}"

    def to_tell_kinds(self, trace: Trace, batches_NLE: Array) -> tuple[Array, str]:
        """Steps that show which experts are consistent and which temporal; and them in words.

        Of counts all recorded steps of one phase, the one with the most if none was asked for; of
        ids the first kind of batch of `batches_NLE`, which `of` gave.
        """
        if trace.counts_NLE is None:
            return batches_NLE[: self.steps], self._in_words(*self._kinds()[0])
        phases = trace.phases()
        chosen = self.phase if self.phase in phases else main_phase(trace)
        steps_NLE = (trace if chosen is None else trace.of_phase(chosen)).chunks(1)
        of_phase = "" if chosen is None else f" of {chosen.name.lower()}"
        return steps_NLE, f"{len(steps_NLE)} recorded steps{of_phase}"

    def _as_recorded(self, trace: Trace) -> bool:
        return self.batch is None and trace.counts_NLE is not None

    def _part(self, trace: Trace) -> Trace:
        return trace if self.phase is None else trace.of_phase(self.phase)

    def _kinds(self) -> list[tuple[int, Phase]]:
        """Tokens and phase of each kind of batch that is drawn."""
        found = [(self.batch or DEFAULT_BATCH, Phase.DECODE if self.phase is None else self.phase)]
        if self.prefill_batch is not None:
            found.append((self.prefill_batch, Phase.PREFILL))
        return found

    def _in_words(self, tokens: int, phase: Phase) -> str:
        return f"{self.steps} batches of {tokens} tokens of {phase.name.lower()}"

    def _drawn(self, trace: Trace, tokens: int, phase: Phase) -> Array:
        if phase == Phase.DECODE:
            return trace.steps(tokens, self.steps, self.seed)
        is_of_ids = trace.topk_ids_TLK is not None
        if is_of_ids and tokens >= (held := len(trace.tokens_of(phase))):
            raise BalancerError(
                f"Batches of prefill of {tokens} consecutive tokens were asked for, and a half of "
                f"trace {trace.name} holds {held} of prompts, so that all batches would be one and "
                f"the same. Allowed are fewer than {held}: lower --batch or --prefill-batch, or "
                f"record more."
            )
        return trace.prefill_steps(tokens, self.steps, self.seed)
