"""The servers of benchmarks end with the run that started them."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest

from bench import server, starter

SCRIPT = '''
import subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
from bench.server import Server

HEALTHY = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""
class Fake(Server):
    def _start(self):
        command = [sys.executable, "-c", HEALTHY, str(self.port)]
        return subprocess.Popen(command, start_new_session=True)

with Fake(SimpleNamespace(name="fake"), Path("model")) as server:
    print(server._process.pid, flush=True)
    time.sleep(600)
'''


STARTER = """
import os, signal, time
from bench import starter

def run(request):
    os.setsid()
    if request["command"] == ["stopped"]:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)

starter.IMPORTED, starter.run = (), run
starter.main()
"""


def test_servers_end_with_whoever_asked_for_them_even_if_that_was_killed():
    """Of a killed run only the pipe is closed; in turn a server may be stopped at that moment."""
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    pids = []
    for command in ("serving", "stopped"):
        print(json.dumps({"command": [command]}), file=process.stdin, flush=True)
        pids.append(int(process.stdout.readline()))
    assert all(psutil.Process(pid).is_running() for pid in pids)
    process.send_signal(signal.SIGTERM)  # As `timeout` sends it to the whole group.
    process.stdin.close()
    assert process.wait(timeout=120) == 0
    deadline = time.monotonic() + 60
    while any(map(runs, pids)):
        assert time.monotonic() < deadline, "a server outlived its run"
        time.sleep(0.05)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_run_that_is_terminated_takes_its_server_along(tmp_path):
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    server = psutil.Process(int(run.stdout.readline()))
    assert server.is_running()
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=120) == 128 + signal.SIGTERM
    deadline = time.monotonic() + 60
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the server outlived its run"
        time.sleep(0.05)


def test_a_suspended_server_takes_no_time_and_goes_on():
    folder = {"__name__": "fake"}
    exec(SCRIPT[: SCRIPT.index("with Fake")], folder)
    with folder["Fake"](SimpleNamespace(name="fake"), Path("model")) as server:
        server.suspend()
        process = psutil.Process(server._process.pid)
        deadline = time.monotonic() + 60
        while process.status() != psutil.STATUS_STOPPED:  # A signal takes a moment to arrive.
            assert time.monotonic() < deadline, "the server runs on"
            time.sleep(0.01)
        with pytest.raises(httpx.TimeoutException):
            httpx.get(f"{server.url}/health", timeout=0.5)
        server.resume()
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        server.suspend()
    assert not process.is_running(), "a suspended server ends like any other"


def test_ranks_yield_to_their_api_server_and_their_session_to_the_client():
    folder = {"__name__": "fake"}
    exec(SCRIPT[: SCRIPT.index("with Fake")], folder)

    class WithRank(folder["Fake"]):
        def _start(self):
            command = f"exec -a VLLM::Worker_TP0 sleep 600 & exec {sys.executable} -c"
            healthy = [folder["HEALTHY"], str(self.port)]
            return subprocess.Popen(
                ["bash", "-c", f'{command} "$@"', "server", *healthy], start_new_session=True
            )

    with WithRank(SimpleNamespace(name="fake"), Path("model")) as started:
        api, rank = started._process.pid, started.worker(0)
        niceness = [os.getpriority(os.PRIO_PROCESS, pid) for pid in (os.getpid(), api, rank)]
        assert niceness[1:] == [niceness[0], server.RANKS_NICE]
        assert os.sched_getaffinity(rank) == {server.rank_cores(1)[0]}
        group = Path(f"/proc/{api}/autogroup")
        if group.exists():  # Otherwise Linux does not group tasks by session.
            assert group.read_text().split()[-1] == str(server.RANKS_NICE)


def test_a_starter_that_has_ended_is_named(tmp_path, monkeypatch):
    """Here because what it imports is not there."""
    script = tmp_path / "starter.py"
    script.write_text("import nothing_of_this_name")
    monkeypatch.setattr(starter, "__file__", str(script))
    with pytest.raises(RuntimeError, match="the process that forks servers has ended"):
        starter.Starter().start(["vllm"], log=tmp_path / "log", environ={})


def test_a_port_that_somebody_has_is_passed_over(monkeypatch):
    """Also one that listens on another address than ours."""
    with socket.socket() as taken:
        port = server.free_port()
        taken.bind(("127.0.0.1", port))
        monkeypatch.setattr(server, "_turns", itertools.count(server.PORTS.index(port)))
        assert server.free_port() in set(server.PORTS) - {port}
        monkeypatch.setattr(server, "PORTS", range(port, port + 1))
        with pytest.raises(RuntimeError, match=f"{port} to {port} are all taken"):
            server.free_port()
