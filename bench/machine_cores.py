"""What the cores of a machine do alone, every rank busy at once: matrix products, and copies.

Dense products of Qwen3-30B-A3B's attention and router: their time for 1 to 2,048 tokens. Copies of
one of its experts from a store to a slot, both in buffers that no cache holds, as a fetch is.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

PRODUCTS = {"qkv": (2560, 2048), "output": (2048, 2048), "router": (128, 2048)}
"""Rows and columns on one of two tensor-parallel ranks."""
TOKENS = (1, 8, 32, 128, 512, 2048)
EXPERT = (3, 2048, 768)
"""Weights of an expert."""
EXPERTS = 32
"""In each of the two buffers of a rank, 300 MB in bfloat16."""
STRIDE = 7
"""Experts between one that is copied and the next, so that nothing is read ahead."""
SECONDS = 0.4
Row = dict[str, Any]


def products(ranks: int, dtype: str) -> list[Row]:
    """Rows of each product and number of tokens: median time on every rank, us."""
    times = _on_every_rank(ranks, _products, dtype)
    return [
        {
            "run": "machine",
            "part": "product",
            "dtype": dtype,
            "product": name,
            "tokens": tokens,
            "time_us": [rank[f"{name} {tokens}"] for rank in times],
        }
        for name in PRODUCTS
        for tokens in TOKENS
    ]


def copies(ranks: int, dtype: str) -> list[Row]:
    """The row of an expert's copy: its bytes, and the median time on every rank, us."""
    times = _on_every_rank(ranks, _copies, dtype)
    num_bytes = int(times[0]["bytes"])
    time_us = [rank["copy"] for rank in times]
    row = {"run": "machine", "part": "copy", "dtype": dtype, "bytes": num_bytes}
    return [{**row, "time_us": time_us}]


def _on_every_rank(
    ranks: int, work: Callable[[Callable[[], Any], str], dict[str, float]], dtype: str
) -> list[dict[str, float]]:
    """What `work` returns on each core; it calls its argument before it measures something."""
    cores = sorted(os.sched_getaffinity(0))[:ranks]
    barrier, answers = multiprocessing.Barrier(ranks), multiprocessing.Queue()
    processes = [
        multiprocessing.Process(target=_of_rank, args=(core, work, dtype, barrier, answers))
        for core in cores
    ]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def _of_rank(core: int, work: Callable[..., Any], dtype: str, barrier: Any, answers: Any) -> None:
    import torch

    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    answers.put(work(barrier.wait, dtype))


def _products(together: Callable[[], Any], dtype: str) -> dict[str, float]:
    import torch

    found, kind = {}, getattr(torch, dtype)
    for name, (rows, columns) in PRODUCTS.items():
        weights = [torch.randn(rows, columns).to(kind) for _ in range(6)]
        for tokens in TOKENS:
            hidden = torch.randn(tokens, columns).to(kind)
            together()
            found[f"{name} {tokens}"] = _median_us(
                lambda turn, weights=weights, hidden=hidden: torch.nn.functional.linear(
                    hidden, weights[turn % len(weights)]
                )
            )
    return found


def _copies(together: Callable[[], Any], dtype: str) -> dict[str, float]:
    import torch

    from vllm_balance.experts.huge_pages import gather_into_huge_pages

    kind = getattr(torch, dtype)
    store, slots = (torch.ones(EXPERTS, *EXPERT, dtype=kind) for _ in range(2))
    # A server's slots are there too.
    gather_into_huge_pages([slots])
    together()
    copy_us = _median_us(partial(_copy, store, slots))
    return {"copy": copy_us, "bytes": float(store[0].nbytes)}


def _copy(store: Any, slots: Any, turn: int) -> None:
    place = turn * STRIDE % EXPERTS
    slots[place].copy_(store[place])


def _median_us(call: Callable[[int], Any]) -> float:
    """Median time of a call, which gets its number."""
    times: list[float] = []
    while len(times) < 5 or sum(times) < SECONDS:
        start = time.perf_counter()
        call(len(times))
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)
