"""What a recording costs while serving: `python -m bench.recorder`.

One server, and bursts of requests that alternate between no recording, counts and ids, there and
back, so that a drift of the machine hits all alike. Recordings start and stop over HTTP between the
bursts. Rows are JSON lines in bench/results/recorder.jsonl; `started` is the same in all rows of a
run, and in no other's. A run that was ended continues with the next burst, on a fresh server.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console

from bench import client, command, markdown, real_size_model, run_files
from bench.ended_run import append, unfinished
from bench.provenance import ROOT, config_hash, harness, provenance, sources
from bench.server import Arm, Server
from bench.starts import Start, arm_of
from vllm_balance import traces

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
    origin = {"run": RUN.stem, "config_hash": config_hash(settings), "seed": settings["seed"]}
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
    console.print(table(rows))


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


def table(rows: list[dict[str, Any]]) -> str:
    """Per arm: time per token, against no recording, and what a step takes in the file."""
    bursts = {arm: [row for row in rows if row["arm"] == arm] for arm in ("off", "counts", "ids")}
    against = against_off(rows)
    body = []
    for arm, own in bursts.items():
        values_ms = [row["tpot_ms"] for row in own]
        median_ms = statistics.median(values_ms)
        steps = sum(row.get("steps", 0) for row in own)
        size = f"{sum(row['bytes'] for row in own) / steps:,.0f}" if steps else "-"
        dropped = str(sum(row.get("dropped_steps", 0) for row in own))
        body.append(
            [
                arm,
                str(len(own)),
                f"{median_ms:.1f}",
                *_spread([against[row["position"]] for row in own if row["position"] in against]),
                f"{(max(values_ms) - min(values_ms)) / median_ms:.1%}",
                size,
                dropped,
                *(_share(own, key) for key in ("serving_us", "writing_us")),
            ]
        )
    headings = ("recording", "bursts", "TPOT ms", "against off", "quartiles", "least to most",
                "bytes a step", "dropped steps", "in serving",
                "in the writer's thread")  # fmt: skip
    return markdown.table(headings, body)


def against_off(rows: list[dict[str, Any]]) -> dict[int, float]:
    """TPOT of each burst by its position, over that of the bursts without recording around it on
    the same server.

    Between two of them on the line between; of a burst without recording, over its neighbours'. One
    that has none, of a run that was ended, is left out.
    """
    found = {}
    for row in rows:
        own = [each for each in rows if each.get("server") == row.get("server")]
        off = {each["position"]: each["tpot_ms"] for each in own if each["arm"] == "off"}
        at = row["position"]
        known = sorted(place for place in off if place != at)
        if not known:
            continue
        found[at] = row["tpot_ms"] / float(np.interp(at, known, [off[p] for p in known]))
    return found


def _spread(ratios: list[float]) -> tuple[str, str]:
    """Median and quartiles of ratios, as differences."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle - 1:+.2%}", f"{low - 1:+.1%} to {high - 1:+.1%}"


def _share(rows: list[dict[str, Any]], key: str) -> str:
    """Median share of a burst's time that the recorder took for itself."""
    return f"{statistics.median(row.get(key, 0) / row['seconds'] / 1e6 for row in rows):.2%}"


if __name__ == "__main__":
    command.main(recorder)
