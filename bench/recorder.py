"""What a recording costs while serving: `python -m bench.recorder`.

One server, and bursts of requests that alternate between no recording, counts and ids, there and
back, so that a drift of the machine hits all alike. Recordings start and stop over HTTP between the
bursts. Rows are JSON lines in bench/results/recorder.jsonl.
"""

from __future__ import annotations

import statistics
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import httpx
import typer
from rich.console import Console

from bench import client, real_size_model
from bench.provenance import ROOT, config_hash, provenance
from bench.run import append, arm_of, prompts_of
from bench.server import Server
from vllm_balance import traces

RUN = ROOT / "configs" / "runs" / "recorder.toml"
console = Console()


def recorder() -> None:
    """Append one row per burst to bench/results/recorder.jsonl and print the ratios."""
    settings = tomllib.loads(RUN.read_text())
    model = real_size_model.ensure(**settings["model"])
    load, order = settings["load"], settings["recordings"]["order"]
    prompts = prompts_of(load, settings["seed"])
    rows: list[dict[str, Any]] = []
    with Server(arm_of("static", settings), model) as server, tempfile.TemporaryDirectory() as to:
        for _ in range(2):
            client.send(server.url, str(model), prompts, max_tokens=load["warm_tokens"])
        for position, what in enumerate(order * settings["recordings"]["rounds"]):
            file = Path(to) / f"{position}.npz"
            rows.append(
                {"position": position, "arm": what}
                | _burst(server, str(model), prompts, load["max_tokens"], what, file)
            )
            console.print(rows[-1])
    origin = {"run": RUN.stem, "config_hash": config_hash(settings), "seed": settings["seed"]}
    for row in rows:
        append(ROOT / "bench" / "results" / "recorder.jsonl", origin | row | provenance())
    _print_ratios(rows)


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
    row: dict[str, Any] = {"tpot_ms": answers.tpot_ms, "tokens_per_s": answers.tokens_per_s}
    if what == "off":
        return row
    state = _post(server, "stop", None)[0]
    recorded, counted = int(traces.load(file).chunks(1).sum()), server.status()[0]["pairs"]
    if state["dropped_steps"] == 0 and recorded != counted:
        raise RuntimeError(f"{recorded} pairs were recorded and {counted} were routed.")
    return row | {key: state[key] for key in ("steps", "tokens", "dropped_steps", "bytes")}


def _post(server: Server, action: str, body: dict[str, str] | None) -> list[dict[str, Any]]:
    url = f"{server.url}/moe_balancer/record/{action}"
    ranks: list[dict[str, Any]] = (
        httpx.post(url, json=body, timeout=60).raise_for_status().json()["ranks"]
    )
    return ranks


def _print_ratios(rows: list[dict[str, Any]]) -> None:
    tpot_ms = {
        arm: [row["tpot_ms"] for row in rows if row["arm"] == arm]
        for arm in ("off", "counts", "ids")
    }
    base = statistics.median(tpot_ms["off"])
    for arm, values in tpot_ms.items():
        median = statistics.median(values)
        spread = (max(values) - min(values)) / median
        console.print(
            f"{arm}: median TPOT {median:.2f} ms of {len(values)} bursts, {median / base - 1:+.2%} "
            f"against off; from least to most {spread:.1%}"
        )


if __name__ == "__main__":
    typer.run(recorder)
