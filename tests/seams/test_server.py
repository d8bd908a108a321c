"""The end of an API server, without starting one."""

import asyncio
import sys
from types import SimpleNamespace

import pytest
from vllm.entrypoints.launchers.api_server import entry

from vllm_balance.seams import install, is_installed
from vllm_balance.seams.server import SERVER_SEAMS, install_in_api_server


def end_of_a_server(monkeypatch, *, engine_dead: bool) -> list[str]:
    """What a server does from its last request to its end, with vLLM's part replaced."""
    done = []

    async def shut_down() -> None:
        done.append("shut down")

    async def build_and_serve(engine_client: object):
        done.append("served")
        return shut_down()

    monkeypatch.setattr(entry, "build_and_serve", build_and_serve)
    install(SERVER_SEAMS)
    resources = SimpleNamespace(engine_dead=engine_dead)
    engine = SimpleNamespace(engine_core=SimpleNamespace(resources=resources))

    async def run() -> None:
        shutdown = await entry.build_and_serve(engine)
        # vLLM shuts its engines down here, which marks them as dead.
        resources.engine_dead = True
        await shutdown

    asyncio.run(run())
    return done


def test_a_server_that_was_asked_to_end_ends_well(monkeypatch):
    assert end_of_a_server(monkeypatch, engine_dead=False) == ["served", "shut down"]


def test_a_server_whose_engine_died_ends_with_status_1(monkeypatch):
    with pytest.raises(SystemExit) as raised:
        end_of_a_server(monkeypatch, engine_dead=True)
    assert raised.value.code == 1


def test_only_a_process_that_serves_is_wrapped(monkeypatch):
    monkeypatch.delitem(sys.modules, entry.__name__)
    install_in_api_server()
    assert not any(map(is_installed, SERVER_SEAMS))
    monkeypatch.undo()
    install_in_api_server()
    assert all(map(is_installed, SERVER_SEAMS))
