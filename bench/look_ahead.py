"""Look-ahead in a server: `python -m bench.look_ahead`.

The demo model, whose own router decides (a replayed one cannot be looked ahead of), reads prompts
that repeat one word each, so that few experts are hot in a batch and others in the next: on text as
it was trained on, slots soon hold all that is needed. Arms differ in the number of dynamic slots
and in `look_ahead`; settings force fetches, as the model's experts are so small that none would
pay. So the table is about guesses, not about time. Rows are JSON lines in
bench/results/look_ahead.jsonl; `started` is the same in all rows of a run. Every call starts anew.
"""

from __future__ import annotations

import json
import random
import re
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import client, command, demo_model, demo_text, markdown
from bench.gate import FLAGS
from bench.provenance import ROOT, provenance, sources
from bench.server import Arm, Server
from vllm_balance.own_benchmarks.look_ahead import Served, table

SLOTS = (2, 4)
LOOK_AHEAD = ("off", "router")
FORCED = {"knee_tokens": 1.0, "threshold_tokens": 2}
LOADS, WARM = 30, 2
TITLE = (
    "Prefill of the demo model with its own router, 4 prompts of one word each at once, TP2, "
    "fetches forced"
)
AT_ONCE = 4
WORDS = 100
"""Of a prompt, all the same."""
COUNTED = (
    *("fetches", "early_fetches", "hits", "early_hits", "fetched_bytes", "wasted_bytes"),
    *("fetch_wait_us", "look_ahead_us", "experts_us"),
)
RESULTS = ROOT / "bench" / "results" / "look_ahead.jsonl"
Row = dict[str, Any]


def look_ahead(seed: int = 1) -> None:
    """Append one row per server to bench/results/look_ahead.jsonl and print the table."""
    origin = {
        "run": "look_ahead",
        "title": TITLE,
        "started": datetime.now(UTC).isoformat(),
        "seed": seed,
    }
    origin |= {"sources": sources(), **provenance()}
    model = demo_model.ensure()
    arms = [(slots, how) for slots in SLOTS for how in LOOK_AHEAD]
    rows = []
    for position, (slots, how) in enumerate([*arms, *reversed(arms)]):
        rows.append(origin | {"position": position} | _measured(model, slots, how, seed))
        with RESULTS.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        Console(stderr=True).print(rows[-1])
    found = table([Served.model_validate(row) for row in rows])
    Console().print(markdown.written(found), markup=False)


def prompts(seed: int) -> list[list[str]]:
    """The prompts of each load, [loads, at once]; no word comes twice."""
    words = sorted(set(re.findall(r"[a-z]{4,8}", "".join(demo_text.documents(seed=seed)[:200]))))
    picked = random.Random(seed).sample(words, LOADS * AT_ONCE)
    said = [" ".join([word] * WORDS) for word in picked]
    return [said[load * AT_ONCE : (load + 1) * AT_ONCE] for load in range(LOADS)]


def _measured(model: Path, slots: int, how: str, seed: int) -> Row:
    """Counters of all ranks over the loads behind the warm ones.

    Raises:
        RuntimeError: nothing was fetched, or look-ahead guessed nothing.
    """
    settings = {"dynamic_slots": slots, "look_ahead": how, **FORCED}
    arm = Arm(name="harmoeny", balancer="harmoeny", settings=settings, tensor_parallel=2,
              flags=list(FLAGS))  # fmt: skip
    ttft_ms = []
    with Server(arm, model) as server:
        for number, load in enumerate(prompts(seed)):
            if number == WARM:
                server.reset()
            answers = client.send(server.url, str(model), load, max_tokens=1)
            ttft_ms += [answers.ttft_ms] if number >= WARM else []
        ranks = server.status()
    found = {key: sum(rank[key] for rank in ranks) for key in COUNTED}
    if not found["fetches"] or bool(found["early_fetches"]) != (how == "router"):
        raise RuntimeError(f"look_ahead {how} with {slots} slots fetched {found}: no number.")
    return {
        "slots": slots,
        "look_ahead": how,
        "schedules": ranks[0]["decisions"],
        "ttft_ms": statistics.median(ttft_ms),
        **found,
    }


if __name__ == "__main__":
    command.main(look_ahead)
