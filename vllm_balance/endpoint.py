"""``GET /moe_balancer``: what the balancer of every rank did, on vLLM's own HTTP server.

An endpoint plugin of vLLM: loaded only when allow-listed with ``VLLM_PLUGINS=moe_balancer``, which
names the balancer itself too. ``?per_layer=true`` adds the counters of every layer;
``GET /moe_balancer/metrics`` has the counters as Prometheus scrapes them;
``POST /moe_balancer/reset`` sets all counters but those of ``online`` to zero.
``POST /moe_balancer/record/start`` with ``{"file": ..., "what": "counts" or "ids", "max_bytes":
...}`` records what the router chooses into a new file on the server, until
``POST /moe_balancer/record/stop`` or the limit. ``POST /moe_balancer/map`` with ``{"file": ...}``
moves the experts of a server with `online` to where a map has them. All of it reaches the ranks of
this server's engines: not those of other nodes with hybrid or external load balancing. For
benchmarks, ``POST /moe_balancer/replay`` gives a server whose routing is a replay another skew.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Body, FastAPI, HTTPException, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from vllm_balance import prometheus
from vllm_balance.config import KEY
from vllm_balance.recording import RecordSettings

ENGINE = "moe_balancer_engine"
"""Attribute of the server's state that holds the engine client."""

TIMEOUT_S = 60.0
"""After which ranks that do not answer count as stalled."""

router = APIRouter()


class MapFile(BaseModel):
    """What ``POST /moe_balancer/map`` takes."""

    model_config = ConfigDict(extra="forbid")

    file: str = Field(min_length=1)
    """Placement map (`vllm-balance place`), as every rank finds it."""


@router.get("/moe_balancer")
async def status(request: Request, per_layer: bool = False) -> dict[str, Any]:
    """Counters of every rank, with data parallelism of all engines behind this server."""
    ranks = await _ask(request, "moe_balancer_status", {"per_layer": per_layer})
    return {"ranks": sorted(ranks, key=lambda rank: rank["rank"])}


@router.get("/moe_balancer/metrics")
async def metrics(request: Request) -> Response:
    """The counters of every rank in Prometheus' text format."""
    ranks = await _ask(request, "moe_balancer_status", {"per_layer": False})
    return Response(prometheus.exposition(ranks), media_type=prometheus.CONTENT_TYPE)


@router.post("/moe_balancer/reset")
async def reset(request: Request) -> dict[str, str]:
    """Sets the counters of every rank to zero."""
    await _ask(request, "moe_balancer_reset", {})
    return {"status": "reset"}


@router.post("/moe_balancer/map")
async def move_to_map(request: Request, asked: MapFile) -> dict[str, Any]:
    """What every rank moved; 409 with the reason if one cannot, and then no rank moves anything."""
    ranks = await _ask(request, "moe_balancer_map", asked.model_dump(), patient=True)
    refusals = [rank["error"] for rank in ranks if "error" in rank]
    if refusals:
        raise HTTPException(409, refusals[0])
    return {"ranks": sorted(ranks, key=lambda rank: rank["rank"])}


@router.post("/moe_balancer/replay")
async def replay(request: Request, settings: Annotated[dict[str, Any], Body()]) -> dict[str, str]:
    """Benchmarks only: replays another skew, in a server that was started with `replay`; 409 if
    that cannot be."""
    answers = await _ask(request, "moe_balancer_replay", {"settings": settings})
    refusals = [answer["error"] for answer in answers if answer]
    if 0 < len(refusals) < len(answers):
        raise HTTPException(
            409,
            f"{refusals[0]} {len(answers) - len(refusals)} of {len(answers)} ranks replay it all "
            f"the same: post settings that all of them can replay.",
        )
    if refusals:
        raise HTTPException(409, refusals[0])
    return {"status": "replaying"}


@router.post("/moe_balancer/record/start")
async def start_recording(request: Request, settings: RecordSettings) -> dict[str, Any]:
    """The state of every recording rank; 409 if one of them refuses: then no rank starts one."""
    asked_by = uuid.uuid4().hex
    own = settings.model_dump(mode="json") | {"run": settings.run or asked_by}
    asked = {"settings": own, "asked_by": asked_by}
    ranks = await _ask(request, "moe_record_start", asked, patient=True)
    refusals = [rank["error"] for rank in ranks if rank and "error" in rank]
    if refusals:
        if len(refusals) < sum(rank is not None for rank in ranks):
            await _ask(request, "moe_record_cancel", {"asked_by": asked_by}, patient=True)
        raise HTTPException(409, refusals[0])
    return {"ranks": [rank for rank in ranks if rank]}


@router.post("/moe_balancer/record/stop")
async def stop_recording(request: Request) -> dict[str, Any]:
    """The state of every recording rank, with its file closed."""
    ranks = await _ask(request, "moe_record_stop", {}, patient=True)
    return {"ranks": [rank for rank in ranks if rank]}


async def _ask(
    request: Request, method: str, kwargs: dict[str, Any], *, patient: bool = False
) -> list[Any]:
    """The answer of every rank; 503 after TIMEOUT_S, unless patient: what was asked for is done all
    the same, and whoever starts a recording must learn of it."""
    engine = getattr(request.app.state, ENGINE, None)
    if engine is None:
        raise HTTPException(
            404,
            "This server runs without --moe-balancer, so there is nothing to report. Start it with "
            "`--moe-balancer NAME`, or with `--moe-record FILE` to record what the router chooses.",
        )
    # AsyncLLM.collective_rpc asks all engines of a data-parallel deployment, too, but returns the
    # answer of the first only.
    asked = asyncio.ensure_future(
        engine.engine_core.call_utility_all_async("collective_rpc", method, None, (), kwargs)
    )
    # Nobody may be there any more to hear how it failed.
    asked.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        # vLLM's client does not expect that a call is cancelled, so it goes on.
        timeout_s = None if patient else TIMEOUT_S
        per_engine = await asyncio.wait_for(asyncio.shield(asked), timeout_s)
    except TimeoutError as error:
        raise HTTPException(
            503,
            f"The ranks did not answer {method} within {TIMEOUT_S:g} s: a step takes longer than "
            f"that, or the engine is stalled. Look at the server's log.",
        ) from error
    return [answer for workers in per_engine for answer in workers]


class MoEBalancerEndpoint:
    """The endpoint plugin, see ``vllm.plugins.endpoint_plugins``."""

    name = "moe_balancer"
    required_tasks = None
    """Of all models: those that are pooled have experts too."""

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        if engine_client is None or KEY not in (engine_client.vllm_config.additional_config or {}):
            return
        setattr(state, ENGINE, engine_client)
