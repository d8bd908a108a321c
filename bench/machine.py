"""What a CPU machine's hardware file needs beside a profile: `python -m bench.machine`.

Two parts, both with every rank busy at once. Dense matrix products of Qwen3-30B-A3B's attention and
head: their time for 1 to 2,048 tokens. Servers without redundant experts, of one and of two layers,
even routing, small and large batches, short and long prompts: none of them an arm of a published
table. From their time beyond experts and products come the fixed times of a step and of a layer,
and how fast attention is. Rows: bench/results/machine.jsonl.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import statistics
import time
from typing import Annotated, Any

import typer
from rich.console import Console

from bench import counters, real_size_model
from bench.load import Load, send, timed
from bench.provenance import ROOT, provenance
from bench.server import Arm, Server

RESULTS = ROOT / "bench" / "results" / "machine.jsonl"
PRODUCTS = {"qkv": (2560, 2048), "output": (2048, 2048), "router": (128, 2048)}
"""Rows and columns on one of two tensor-parallel ranks."""
TOKENS = (1, 8, 32, 128, 512, 2048)
LOADS = (
    Load(requests=4, prompt_tokens=8, max_tokens=40),
    Load(requests=32, prompt_tokens=8, max_tokens=40),
    Load(requests=1, prompt_tokens=500, max_tokens=2),
    Load(requests=1, prompt_tokens=1000, max_tokens=2),
)
"""Two to decode and two to prefill."""
REPEATS = 3
COUNTED = ("steps", "activated_worst_rank", "tokens_worst_rank", "experts_us_per_layer")
SEED = 7
LAYERS = (1, 2)
SECONDS = 0.4
Row = dict[str, Any]


def machine(
    ranks: Annotated[int, typer.Option(min=1)] = 2,
    servers: Annotated[bool, typer.Option(help="Also measure servers.")] = True,
) -> None:
    """Measure this machine and append rows to bench/results/machine.jsonl."""
    rows = _products(ranks)
    for num_layers in LAYERS if servers else ():
        rows += _serve(num_layers, ranks)
    origin = provenance()
    with RESULTS.open("a") as file:
        for row in rows:
            file.write(json.dumps({**row, **origin}) + "\n")
            Console().print(row)


def _products(ranks: int) -> list[Row]:
    """Median time of each product on every rank, all ranks at once."""
    cores = sorted(os.sched_getaffinity(0))[:ranks]
    barrier, answers = multiprocessing.Barrier(ranks), multiprocessing.Queue()
    processes = [
        multiprocessing.Process(target=_products_of_rank, args=(core, barrier, answers))
        for core in cores
    ]
    for process in processes:
        process.start()
    times = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return [
        {
            "run": "machine",
            "part": "product",
            "product": name,
            "tokens": tokens,
            "time_us": [rank[f"{name} {tokens}"] for rank in times],
        }
        for name in PRODUCTS
        for tokens in TOKENS
    ]


def _products_of_rank(core: int, barrier: Any, answers: Any) -> None:
    import torch

    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    found = {}
    for name, (rows, columns) in PRODUCTS.items():
        weights = [torch.randn(rows, columns).bfloat16() for _ in range(6)]
        for tokens in TOKENS:
            hidden = torch.randn(tokens, columns).bfloat16()
            barrier.wait()
            times: list[float] = []
            while len(times) < 5 or sum(times) < SECONDS:
                start = time.perf_counter()
                torch.nn.functional.linear(hidden, weights[len(times) % len(weights)])
                times.append(time.perf_counter() - start)
            found[f"{name} {tokens}"] = 1e6 * statistics.median(times)
    answers.put(found)


def _serve(num_layers: int, ranks: int) -> list[Row]:
    """Rows of all loads on one server without redundant experts."""
    model = real_size_model.ensure(num_layers=num_layers)
    flags = ["--enforce-eager", "--load-format", "dummy", "--max-model-len", "4096"]
    flags += ["--max-num-seqs", "32", "--no-enable-prefix-caching"]
    arm = Arm(
        name="static",
        balancer="static",
        settings={"replay": {"zipf": 0.0, "seed": SEED}},
        tensor_parallel=ranks,
        flags=flags,
    )
    rows = []
    with Server(arm, model) as server:
        for load, repeat in itertools.product(LOADS, range(-1, REPEATS)):
            server.reset()
            answered = send(load, server.url, model, SEED)
            if repeat < 0:
                continue
            timed_rows, counted = timed(load, answered), counters.counted(server.status())
            rows.append(
                {
                    "run": "machine",
                    "part": "server",
                    "layers": num_layers,
                    "repeat": repeat,
                    **load.model_dump(include={"requests", "prompt_tokens", "max_tokens"}),
                    **{key: timed_rows[key]["p50"] for key in ("tpot_ms", "ttft_ms")},
                    **{key: counted[key] for key in COUNTED},
                }
            )
    return rows


if __name__ == "__main__":
    typer.run(machine)
