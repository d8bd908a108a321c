"""The steady state of a load: its scheduler alone until nothing drifts, then typical steps of it.

All requests ask for the same, and each that ends is followed by the next, so that counts tell all:
how many prompts were finished in each step says who decodes, how far, and when the next one comes.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np

from vllm_balance.simulate.steps import NO_WINDOW, Load, Steps, cache_use

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
    own = load.output_tokens - 1 + math.ceil(load.prompt_tokens / load.token_budget)
    tokens = load.concurrency * (load.prompt_tokens + load.output_tokens - 1)
    return max(own, math.ceil(tokens / load.token_budget))


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
        self.queue = deque(-(wait * (waiting - 1 - place)) // waiting for place in range(waiting))
        """Steps in which the requests came that wait."""
        self.head = 0
        """Computed tokens of the first one's prompt."""
        self.rows: list[tuple[int, ...]] = []
        """Decoding requests, prompt tokens and finished prompts of each step, and what prompts
        attend to and read, without and with the window."""
        self.answered: list[tuple[int, int]] = []
        """Steps in which each request came and got its first token."""

    def step(self) -> None:
        """Advances by one step."""
        now = len(self.rows)
        ended = self.finished[now]
        self.decoding += self.finished[-1] - ended
        self.queue.extend([now] * ended)
        prompts, chunks = self._take(now, self.load.token_budget - self.decoding)
        self.finished.append(prompts)
        far, near = (cache_use(chunks, window) for window in (NO_WINDOW, self.window))
        added = sum(added for _, added in chunks)
        self.rows.append((self.decoding, added, prompts, *far, *near))

    def _take(self, now: int, room: int) -> tuple[int, list[tuple[int, int]]]:
        """Finished prompts, and (tokens before, tokens) of each chunk that there is room for."""
        prompt, chunks, prompts = self.load.prompt_tokens, [], 0
        while room and self.queue:
            added = min(room, prompt - self.head)
            chunks.append((self.head, added))
            room -= added
            self.head += added
            if self.head == prompt:
                self.answered.append((self.queue.popleft(), now))
                self.head = 0
                prompts += 1
        return prompts, chunks

    def columns(self, start: int) -> Array:
        """Rows of `Steps` from a step on, [M, 7]."""
        decode_M, prefill_M, prompts_M, *used = np.array(self.rows[start:], np.int64).T
        own = [self._decoding_reads(start, window) for window in (NO_WINDOW, self.window)]
        attended_M, reads_M, window_attended_M, window_reads_M = used
        return np.stack(
            [
                decode_M,
                prefill_M,
                decode_M + prompts_M,
                attended_M + own[0],
                reads_M + own[0],
                window_attended_M + own[1],
                window_reads_M + own[1],
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


def _typical(load: Load, rows_M7: Array, arrived_R: Array, first_R: Array) -> Steps:
    """Groups of alike steps, each simulated as its mean, in the order in which they first come."""
    like_M = _groups(rows_M7, load.max_steps)
    times_N = np.bincount(like_M)
    mean_7N = np.stack([np.bincount(like_M, column_M) / times_N for column_M in rows_M7.T])
    return Steps(
        decode_N=mean_7N[0],
        prefill_N=mean_7N[1],
        sampled_N=mean_7N[2],
        attended_N=mean_7N[3],
        reads_N=mean_7N[4],
        window_attended_N=mean_7N[5],
        window_reads_N=mean_7N[6],
        like_M=like_M,
        arrived_R=arrived_R,
        first_R=first_R,
    )


def _groups(rows_M7: Array, most: int) -> Array:
    """A number below `most` for each step: steps with prompts and steps without apart, and of each
    kind those with similar numbers of tokens together.

    A kind, and a group of it, is as large as its part of the steps and of the tokens, halved.
    """
    if most == 1:
        return np.zeros(len(rows_M7), np.int64)
    tokens_M = rows_M7[:, 0] + rows_M7[:, 1]
    part_M = (1 / len(tokens_M) + tokens_M / tokens_M.sum()) / 2
    prompts_M = rows_M7[:, 1] > 0
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
