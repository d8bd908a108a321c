"""What a CPU machine's hardware file needs beside a profile: `python -m bench.machine`.

Three parts, all with every rank busy at once. Matrix products and copies of experts
(`bench/machine_cores.py`). Servers without redundant experts, of one and of two layers, even
routing, small and large batches, short and long prompts: none of them an arm of a published table.
From their time beyond experts and products come the fixed times of a step, of a layer and of a
request, and how fast attention is. Rows: bench/results/machine.jsonl.

With `--write NAME` the rows of this machine and the profile configs/hardware/NAME.profile.json
become configs/hardware/NAME.toml (`bench/machine_file.py`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console

from bench import command, counters, machine_cores, machine_file, real_size_model, speed
from bench.load import Load, send, timed
from bench.provenance import ROOT, provenance
from bench.provenance import machine as this_machine
from bench.server import Arm, Server

RESULTS = ROOT / "bench" / "results" / "machine.jsonl"
LOADS = (
    Load(requests=1, prompt_tokens=8, max_tokens=40),
    Load(requests=4, prompt_tokens=8, max_tokens=40),
    Load(requests=16, prompt_tokens=8, max_tokens=40),
    Load(requests=32, prompt_tokens=8, max_tokens=40),
    Load(requests=64, prompt_tokens=8, max_tokens=40),
    Load(requests=1, prompt_tokens=500, max_tokens=2),
    Load(requests=1, prompt_tokens=1000, max_tokens=2),
)
"""Five to decode and two to prefill."""
REPEATS = 9
"""When the requests of a burst come differs from one to the next."""
COUNTED = ("steps", "activated_worst_rank", "tokens_worst_rank", "experts_us_per_layer")
COUNTED += ("decide_us_per_layer",)
SEED = 7
LAYERS = (1, 2)
Row = dict[str, Any]


def machine(
    ranks: Annotated[int, typer.Option(min=1)] = 2,
    measure: Annotated[bool, typer.Option(help="Measure; else the rows that are there.")] = True,
    servers: Annotated[bool, typer.Option(help="Also measure servers.")] = True,
    write: Annotated[str, typer.Option(help="Then write configs/hardware/NAME.toml.")] = "",
    dtype: Annotated[str, typer.Option(help="Served in; with --write the profile's.")] = "bfloat16",
) -> None:
    """Measure this machine and append rows to bench/results/machine.jsonl."""
    if write:
        dtype = machine_file.profile_of(write).shape.dtype
    if measure:
        _measure(ranks, LAYERS if servers else (), dtype)
    if write:
        rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
        path = machine_file.write(write, [row for row in rows if row["machine"] == this_machine()])
        Console().print(f"Wrote {path.relative_to(ROOT)}.")


def _measure(ranks: int, layers: tuple[int, ...], dtype: str) -> None:
    origin = provenance()
    parts = itertools.chain(
        [machine_cores.products(ranks, dtype), machine_cores.copies(ranks, dtype)],
        (_serve(num_layers, ranks, dtype) for num_layers in layers),
    )
    for rows in parts:
        with RESULTS.open("a") as file:
            for row in rows:
                file.write(json.dumps({**row, **origin}) + "\n")
                Console().print(row)


def _serve(num_layers: int, ranks: int, dtype: str) -> list[Row]:
    """Rows of all loads on one server without redundant experts."""
    model = real_size_model.ensure(num_layers=num_layers, dtype=dtype)
    flags = ["--enforce-eager", "--load-format", "dummy", "--max-model-len", "4096"]
    flags += ["--dtype", dtype]
    flags += ["--max-num-seqs", "64", "--no-enable-prefix-caching"]
    arm = Arm(
        name="static",
        balancer="static",
        settings={"replay": {"zipf": 0.0, "seed": SEED}},
        tensor_parallel=ranks,
        flags=flags,
    )
    rows = []
    with speed.watching(ranks, dtype) as watch, Server(arm, model) as server:
        for load in LOADS:
            send(load, server.url, model, SEED)
            for repeat in range(REPEATS):
                before = _watched(server, watch.before)
                server.reset()
                answered = send(load, server.url, model, SEED)
                timed_rows, counted = timed(load, answered), counters.counted(server.status())
                after = _watched(server, watch.after)
                rows.append(
                    {
                        "run": "machine",
                        "part": "server",
                        "dtype": dtype,
                        "layers": num_layers,
                        "repeat": repeat,
                        **load.model_dump(include={"requests", "prompt_tokens", "max_tokens"}),
                        **{key: timed_rows[key]["p50"] for key in ("tpot_ms", "ttft_ms")},
                        "client_waited_s": timed_rows["client_waited_s"],
                        **{key: counted[key] for key in COUNTED},
                        "machine_speed": [t.model_dump() for t in speed.between(before, after)],
                    }
                )
    return rows


def _watched(server: Server, look: Callable[[], speed.Times]) -> speed.Times:
    """How fast the cores are while the server is stopped."""
    server.suspend()
    found = look()
    server.resume()
    return found


if __name__ == "__main__":
    command.main(machine)
