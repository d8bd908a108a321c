"""The steady state of a load: its scheduler alone until nothing drifts, then typical steps of it.

All requests ask for the same, and each that ends is followed by the next, so that counts tell all:
how many prompts were finished in each step says who decodes, how far, and when the next one comes.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_balance.simulate.steps import COLUMNS, NO_WINDOW, Load, Steps, cache_use

Array = np.ndarray[Any, np.dtype[Any]]
MAX_CYCLE_STEPS = 2**14
"""Of a cycle, in which every request goes around once; a longer cycle is cut."""
MAX_CYCLES = 6
DRIFT = 0.01
"""Relative difference of the tokens that come out of two cycles up to which nothing drifts."""


def steady(load: Load, window: int, random: np.random.Generator) -> Steps:
    """At most `max_steps` typical steps of a cycle of the steady state."""
    state = _Scheduler(load, window, random)
    length = min(cycle_steps(load), MAX_CYCLE_STEPS)
    before = math.inf
    for _ in range(MAX_CYCLES):
        start = len(state.rows)
        for _ in range(length):
            state.step()
        came = sum(decode + prompts for decode, _, prompts, *_ in state.rows[start:])
        if abs(came - before) <= DRIFT * came:
            break
        before = came
    return _typical(load, state.columns(start), *state.requests(start))


def cycle_steps(load: Load) -> int:
    """Steps in which every request goes around once: its own, or more if all have to wait."""
    own = load.output_tokens - 1 + math.ceil(load.prompt_tokens / load.engine_budget)
    tokens = load.concurrency * (load.prompt_tokens + load.output_tokens - 1)
    return max(own, math.ceil(tokens / load.token_budget))


@dataclass(slots=True)
class _Waiting:
    """A request without its first token."""

    came: int
    """The step in which it came."""
    computed: int = 0
    """Tokens of its prompt."""
    engine: int | None = None
    """The one that has begun it."""


class _Scheduler:
    """Begins with as many decoding requests as the steady state has, at random places of their
    answers; the others wait, the first of them longest."""

    def __init__(self, load: Load, window: int, random: np.random.Generator) -> None:
        self.load, self.window = load, window
        output, cycle = load.output_tokens, cycle_steps(load)
        decoding = min(load.concurrency, round(load.concurrency * (output - 1) / cycle))
        ages = random.integers(1, output, decoding) if decoding else np.empty(0, np.int64)
        # Prompts finished in each step, from `output` steps before the first one on.
        self.finished: list[int] = np.bincount(output - ages, minlength=output).tolist()
        self.decoding = decoding - self.finished[-1]
        waiting = load.concurrency - decoding
        wait = cycle - output
        came = (-(wait * (waiting - 1 - place)) // waiting for place in range(waiting))
        self.queue = deque(_Waiting(step) for step in came)
        self.rows: list[tuple[int, ...]] = []
        """Decoding requests, prompt tokens and finished prompts of each step; of the engine with
        most prompt tokens how many, and what they attend to and read, without and with the
        window."""
        self.answered: list[tuple[int, int]] = []
        """Steps in which each request came and got its first token."""

    def step(self) -> None:
        """Advances by one step."""
        now = len(self.rows)
        ended = self.finished[now]
        self.decoding += self.finished[-1] - ended
        self.queue.extend(_Waiting(now) for _ in range(ended))
        chunks_D, prompts = self._take(now)
        self.finished.append(prompts)
        chunks = [chunk for own in chunks_D for chunk in own]
        own = max(chunks_D, key=lambda own: sum(added for _, added in own))
        far, near = (cache_use(own, window) for window in (NO_WINDOW, self.window))
        tokens, most = (sum(added for _, added in each) for each in (chunks, own))
        self.rows.append((self.decoding, tokens, prompts, most, *far, *near))

    def _take(self, now: int) -> tuple[list[list[tuple[int, int]]], int]:
        """(tokens before, tokens) of each chunk of a prompt that each engine has room for, first
        come first served; finished prompts.

        An engine keeps a prompt that it has begun; others go to the engine with most room.
        """
        load = self.load
        room_D = [load.engine_budget - math.ceil(self.decoding / load.engines)] * load.engines
        chunks_D: list[list[tuple[int, int]]] = [[] for _ in room_D]
        begun, prompts = [], 0
        while self.queue:
            engine = self.queue[0].engine
            if engine is None:
                engine = room_D.index(max(room_D))
                if room_D[engine] <= 0:
                    break
            waiting = self.queue.popleft()
            added = min(max(room_D[engine], 0), load.prompt_tokens - waiting.computed)
            if added:
                chunks_D[engine].append((waiting.computed, added))
            room_D[engine] -= added
            waiting.engine, waiting.computed = engine, waiting.computed + added
            if waiting.computed == load.prompt_tokens:
                self.answered.append((waiting.came, now))
                prompts += 1
            else:
                begun.append(waiting)
        self.queue.extendleft(reversed(begun))
        return chunks_D, prompts

    def columns(self, start: int) -> Array:
        """Columns of `Steps` from a step on, [M, 9], in the order of COLUMNS."""
        decode_M, prefill_M, prompts_M, most_M, *used = np.array(self.rows[start:], np.int64).T
        attended_M, reads_M, window_attended_M, window_reads_M = used
        # Decoding requests of all ages are on every engine.
        share_M = np.ceil(decode_M / self.load.engines) / np.maximum(decode_M, 1)
        far_M, near_M = (
            share_M * self._decoding_reads(start, window) for window in (NO_WINDOW, self.window)
        )
        return np.stack(
            [
                decode_M,
                prefill_M,
                decode_M + prompts_M,
                most_M,
                attended_M + far_M,
                attended_M,
                reads_M + far_M,
                window_attended_M + near_M,
                window_reads_M + near_M,
            ],
            axis=1,
        )

    def _decoding_reads(self, start: int, window: int) -> Array:
        """Cached tokens that decoding requests read, and attend to, in each step from `start`, [M].

        Of a request whose prompt was finished k steps ago: prompt + k, at most the window.
        """
        prompt, output = self.load.prompt_tokens, self.load.output_tokens
        finished_T = np.array(self.finished, np.int64)
        step_T = np.arange(len(finished_T))
        count_T = np.concatenate([[0], np.cumsum(finished_T)])
        place_T = np.concatenate([[0], np.cumsum(finished_T * step_T)])
        now_M = step_T[output + start :]
        growing = min(max(window - prompt, 0), output - 1)
        young_M = count_T[now_M] - count_T[now_M - growing]
        place_M = place_T[now_M] - place_T[now_M - growing]
        old_M = count_T[now_M - growing] - count_T[now_M - output + 1]
        return np.asarray((prompt + now_M) * young_M - place_M + window * old_M)

    def requests(self, start: int) -> tuple[Array, Array]:
        """Steps, from `start` on, in which requests came and got their first token, two [R]."""
        found = [each for each in self.answered if each[1] >= start]
        arrived_R, first_R = np.array(found, np.int64).reshape(-1, 2).T - start
        return arrived_R, first_R


def _typical(load: Load, rows_M9: Array, arrived_R: Array, first_R: Array) -> Steps:
    """Groups of alike steps, each simulated as its mean, in the order in which they first come."""
    like_M = _groups(rows_M9, load.max_steps)
    times_N = np.bincount(like_M)
    means = (np.bincount(like_M, column_M) / times_N for column_M in rows_M9.T)
    return Steps(
        **dict(zip(COLUMNS, means, strict=True)),
        like_M=like_M,
        arrived_R=arrived_R,
        first_R=first_R,
        last_R=first_R + load.output_tokens - 1,
    )


def _groups(rows_M9: Array, most: int) -> Array:
    """A number below `most` for each step: steps with prompts and steps without apart, and of each
    kind those with similar numbers of tokens together.

    A kind, and a group of it, is as large as its part of the steps and of the tokens, halved.
    """
    if most == 1:
        return np.zeros(len(rows_M9), np.int64)
    tokens_M = rows_M9[:, 0] + rows_M9[:, 1]
    part_M = (1 / len(tokens_M) + tokens_M / tokens_M.sum()) / 2
    prompts_M = rows_M9[:, 1] > 0
    first = round(most * part_M[prompts_M].sum())
    if prompts_M.any() and not prompts_M.all():
        first = min(max(first, 1), most - 1)
    group_M = np.zeros(len(tokens_M), np.int64)
    for own_M, groups, offset in ((prompts_M, first, 0), (~prompts_M, most - first, first)):
        order = np.flatnonzero(own_M)
        order = order[np.argsort(tokens_M[order], kind="stable")]
        middle = np.cumsum(part_M[order]) - part_M[order] / 2
        share = middle / part_M[order].sum()
        group_M[order] = offset + np.minimum((share * groups).astype(np.int64), groups - 1)
    _, begin_N, like_M = np.unique(group_M, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(begin_N))[like_M]
