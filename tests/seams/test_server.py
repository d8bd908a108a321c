"""The end of an API server, without starting one."""

import asyncio
import sys
from types import SimpleNamespace

import pytest
from vllm.entrypoints.launchers.api_server import entry

from vllm_balance.seams import install, is_installed
from vllm_balance.seams.server import SERVER_SEAMS, install_in_api_server


class Engine:
    """vLLM's client of its engines, as far as their end goes."""

    def __init__(self) -> None:
        self.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_dead=False))

    def shutdown(self, timeout: float | None = None) -> None:
        self.engine_core.resources.engine_dead = True


def end_of_a_server(monkeypatch, *, dies: bool, signalled: bool) -> list[str]:
    """What a server does from its last request to its end, with vLLM's part replaced."""
    done, engine = [], Engine()

    async def shut_down() -> None:
        done.append("shut down")

    async def build_and_serve(engine_client: Engine):
        engine_client.engine_core.resources.engine_dead = dies
        if signalled:
            engine_client.shutdown(timeout=0)
        done.append("served")
        return shut_down()

    monkeypatch.setattr(entry, "build_and_serve", build_and_serve)
    install(SERVER_SEAMS)

    async def run() -> None:
        shutdown = await entry.build_and_serve(engine)
        engine.shutdown(timeout=0)
        await shutdown

    asyncio.run(run())
    return done


@pytest.mark.parametrize("signalled", [True, False])
def test_a_server_that_was_asked_to_end_ends_well(monkeypatch, signalled):
    done = end_of_a_server(monkeypatch, dies=False, signalled=signalled)
    assert done == ["served", "shut down"]


@pytest.mark.parametrize("signalled", [True, False])
def test_a_server_whose_engine_died_ends_with_status_1(monkeypatch, signalled):
    with pytest.raises(SystemExit) as raised:
        end_of_a_server(monkeypatch, dies=True, signalled=signalled)
    assert raised.value.code == 1


def test_only_a_process_that_serves_is_wrapped(monkeypatch):
    monkeypatch.delitem(sys.modules, entry.__name__)
    install_in_api_server()
    assert not any(map(is_installed, SERVER_SEAMS))
    monkeypatch.undo()
    install_in_api_server()
    assert all(map(is_installed, SERVER_SEAMS))
