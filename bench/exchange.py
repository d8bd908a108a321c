"""What it costs that ranks know the global counts: `python -m bench.exchange`.

Processes in a gloo group on this machine, one core each as far as there are cores. For each way of
exchange: extra collectives per layer, bytes a rank sends for them, time of the exchange and of the
whole decision.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from datetime import UTC, datetime
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from rich.console import Console

from bench import command
from bench.provenance import ROOT, provenance
from vllm_balance.balancer import LayerBalancer, new_counters
from vllm_balance.exchange import Way
from vllm_balance.routing import LayerTables
from vllm_balance.routing.metro import MetroRouting
from vllm_balance.types import Placement

RESULTS = ROOT / "bench" / "results" / "exchange.jsonl"
LAYERS = 300
WARM_LAYERS = 30
TOP_K = 8


def exchange(
    tokens_per_rank: int = typer.Option(32, help="Tokens of each rank in a batch."),
    seed: int = 0,
) -> None:
    """Measure all ways with 2 and 4 processes and append rows to bench/results/exchange.jsonl."""
    origin = {"started": datetime.now(UTC).isoformat(), **provenance()}
    for num_ranks in (2, 4):
        for num_experts in (128, 256):
            for way in ("replicated", "after_gather", "all_reduce"):
                row = _measure(way, num_ranks, num_experts, tokens_per_rank, seed) | origin
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                Console().print(row)


def _measure(
    way: Way, num_ranks: int, num_experts: int, tokens_per_rank: int, seed: int
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, way, num_ranks, num_experts, tokens_per_rank, seed)
        mp.spawn(_rank, args=arguments, nprocs=num_ranks)
        with open(f"{folder}/rank0.json") as file:
            times: dict[str, Any] = json.load(file)
    return {
        "run": "exchange",
        "way": way,
        "ranks": num_ranks,
        "experts": num_experts,
        "tokens_per_rank": tokens_per_rank,
        "seed": seed,
        **times,
    }


def _rank(
    rank: int,
    folder: str,
    way: Way,
    num_ranks: int,
    num_experts: int,
    tokens_per_rank: int,
    seed: int,
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=num_ranks
    )
    collectives = 0

    def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal collectives
        collectives += 1
        dist.all_reduce(tensor)
        return tensor

    balancer = _balancer(way, rank, num_ranks, num_experts, all_reduce)
    num_tokens = tokens_per_rank * (1 if way == "all_reduce" else num_ranks)
    batches = _batches(num_tokens, num_experts, seed, own=rank if way == "all_reduce" else 0)
    exchange_us, decide_us = [], []
    for layer in range(LAYERS):
        dist.barrier()
        before = balancer.exchange_ns, balancer.decide_ns
        ids_TK = batches[layer % len(batches)]
        weights_TK = torch.rand(ids_TK.shape)
        if way == "after_gather":
            balancer.after_gather(ids_TK)
        else:
            _, ids_TK = balancer.of_first_rank(weights_TK, ids_TK)
            balancer.in_router(ids_TK, None)
        exchange_us.append((balancer.exchange_ns - before[0]) / 1e3)
        decide_us.append((balancer.decide_ns - before[1]) / 1e3)
    if rank == 0:
        report = {
            "collectives_per_layer": collectives / LAYERS,
            "bytes_per_layer": balancer.exchanged_bytes / LAYERS,
            "exchange_us": statistics.median(exchange_us[WARM_LAYERS:]),
            "decide_us": statistics.median(decide_us[WARM_LAYERS:]),
        }
        with open(f"{folder}/rank0.json", "w") as file:
            json.dump(report, file)
    dist.destroy_process_group()


def _balancer(
    way: Way, rank: int, num_ranks: int, num_experts: int, all_reduce: Any
) -> LayerBalancer:
    """A METRO layer with 1.5 times the experts, replicas as vLLM's EPLB starts."""
    content_P = torch.arange(num_experts * 3 // 2) % num_experts
    placement = Placement.from_physical_to_logical(
        content_P, num_logical=num_experts, num_ranks=num_ranks
    )
    return LayerBalancer(
        layer_name="layer",
        policy=MetroRouting(knee_tokens=float("inf")),
        tables=LayerTables(
            logical_to_physical_ER=placement.logical_to_physical_ER,
            num_replicas_E=placement.num_replicas_E,
            num_ranks=num_ranks,
            num_physical=placement.num_physical,
            load_P=None,
            record_enabled=None,
            counters=new_counters(num_ranks, torch.device("cpu")),
        ),
        way=way,
        rank=rank,
        all_reduce=all_reduce,
    )


def _batches(num_tokens: int, num_experts: int, seed: int, own: int) -> list[torch.Tensor]:
    """Eight batches of Zipf 0.8 routing; the same on ranks that share their tokens."""
    generator = torch.Generator().manual_seed(seed * 1000 + own)
    popularity_E = (torch.arange(num_experts) + 1.0) ** -0.8
    return [
        torch.multinomial(popularity_E.expand(num_tokens, -1), TOP_K, generator=generator).int()
        for _ in range(8)
    ]


if __name__ == "__main__":
    command.main(exchange)
