"""What a recording costs while serving: `python -m bench.recorder`.

One server, and bursts of requests that alternate between no recording, counts and ids, there and
back, so that a drift of the machine hits all alike. Recordings start and stop over HTTP between the
bursts. Rows are JSON lines in bench/results/recorder.jsonl; `started` is the same in all rows of a
run, and in no other's. A run that was ended continues with the next burst, on a fresh server.
"""

from __future__ import annotations

import random
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from bench import client, command, markdown, real_size_model, run_files
from bench.ended_run import append, unfinished
from bench.provenance import ROOT, config_hash, harness, provenance, sources
from bench.server import Arm, Server
from bench.starts import Start, arm_of
from vllm_balance import traces
from vllm_balance.own_benchmarks.recorder import Burst, table

RUN = run_files.FOLDER / "recorder.toml"
RESULTS = ROOT / "bench" / "results" / "recorder.jsonl"
console = Console()


def recorder() -> None:
    """Append one row per burst to bench/results/recorder.jsonl and print the table."""
    settings = run_files.read(RUN)
    model = real_size_model.ensure(**settings["model"])
    load, order = settings["load"], settings["recordings"]["order"]
    bursts = list(enumerate(order * settings["recordings"]["rounds"]))
    prompts = prompts_of(load, settings["seed"])
    origin = {"run": RUN.stem, "title": settings["title"], "seed": settings["seed"]}
    origin |= {"config_hash": config_hash(settings)}
    origin |= {"sources": sources(), "harness": harness(), **provenance()}
    rows = unfinished(RESULTS, origin, [position for position, _ in bursts])
    origin["started"] = rows[0]["started"] if rows else datetime.now(UTC).isoformat()
    number = rows[-1]["server"] + 1 if rows else 0
    with Server(static_arm(settings), model) as server, tempfile.TemporaryDirectory() as to:
        for _ in range(2):
            client.send(server.url, str(model), prompts, max_tokens=load["warm_tokens"])
        for position, what in bursts[len(rows) :]:
            file = Path(to) / f"{position}.npz"
            found = _burst(server, str(model), prompts, load["max_tokens"], what, file)
            rows.append(origin | {"position": position, "arm": what, "server": number} | found)
            append(RESULTS, rows[-1:])
            console.print(rows[-1])
    console.print(markdown.written(table([Burst.model_validate(row) for row in rows])))


def static_arm(settings: dict[str, Any]) -> Arm:
    """The one server of the run file."""
    start = Start(
        position=0, group=0, arm="static", case="", settings=settings, factors=(1.0,), loads={}
    )
    return arm_of(start)


def prompts_of(load: dict[str, Any], seed: int) -> list[str]:
    """The prompts of a load, drawn with a seed."""
    words = ("list", "value", "module", "returns", "object", "string", "file", "name", "type")
    pick = random.Random(seed)
    return [
        " ".join(pick.choice(words) for _ in range(load["prompt_words"]))
        for _ in range(load["requests"])
    ]


def _burst(
    server: Server, model: str, prompts: list[str], max_tokens: int, what: str, file: Path
) -> dict[str, Any]:
    """Times of one burst, and what was recorded of it.

    Raises:
        RuntimeError: the recording does not hold what the balancer counted.
    """
    server.reset()
    if what != "off":
        _post(server, "start", {"file": str(file), "what": what})
    answers = client.send(server.url, model, prompts, max_tokens=max_tokens)
    row: dict[str, Any] = {
        "tpot_ms": answers.tpot_ms,
        "tokens_per_s": answers.tokens_per_s,
        "seconds": answers.seconds,
    }
    if what == "off":
        return row
    state = _post(server, "stop", None)[0]
    recorded, counted = int(traces.load(file).chunks(1).sum()), server.status()[0]["pairs"]
    if state["dropped_steps"] == 0 and recorded != counted:
        raise RuntimeError(f"{recorded} pairs were recorded and {counted} were routed.")
    kept = ("steps", "tokens", "dropped_steps", "bytes", "serving_us", "writing_us")
    return row | {key: state[key] for key in kept}


def _post(server: Server, action: str, body: dict[str, str] | None) -> list[dict[str, Any]]:
    url = f"{server.url}/moe_balancer/record/{action}"
    ranks: list[dict[str, Any]] = (
        httpx.post(url, json=body, timeout=60).raise_for_status().json()["ranks"]
    )
    return ranks


if __name__ == "__main__":
    command.main(recorder)
