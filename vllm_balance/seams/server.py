"""The end of an API server: status 1 if it ended because an engine died."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from typing import Any

from vllm_balance.seams import Seam, install

_MODULE = "vllm.entrypoints.launchers.api_server.entry"


def _build_and_serve(original: Callable[..., Any]) -> Callable[..., Any]:
    """Serves as vLLM does; what the caller awaits for the shutdown then fails if an engine died."""

    async def build_and_serve(
        engine_client: Any, *args: Any, **kwargs: Any
    ) -> Coroutine[Any, Any, None]:
        resources, end_engines = engine_client.engine_core.resources, engine_client.shutdown
        was_dead: list[bool] = []

        def shut_engines_down(*args: Any, **kwargs: Any) -> None:
            was_dead.append(resources.engine_dead)
            end_engines(*args, **kwargs)

        # vLLM marks engines that it shuts down as dead: on a signal while it serves, else behind.
        engine_client.shutdown = shut_engines_down
        shutdown = await original(engine_client, *args, **kwargs)
        was_dead.append(resources.engine_dead)

        async def shut_down() -> None:
            await shutdown
            if was_dead[0]:
                raise SystemExit(1)

        return shut_down()

    return build_and_serve


SERVER_SEAMS = (
    Seam(
        target=f"{_MODULE}:build_and_serve",
        parameters=("engine_client",),
        wrap=_build_and_serve,
        why="a server whose engine died ends with status 0 if it is the only API server",
        delete_when="vLLM ends with an error then",
    ),
)


def install_in_api_server() -> None:
    """Wraps the end of the server in a process that serves HTTP; does nothing in others."""
    if _MODULE in sys.modules:
        install(SERVER_SEAMS)
