"""A compiled server that records from its start: what it wrote, its limit, and a kill."""

import time

import psutil
import pytest
import requests
from serving import FLOAT32, PROMPTS, TENSOR_PARALLEL, serve

from bench.server import descendants
from vllm_balance import traces
from vllm_balance.step_writer import FLUSH_S

pytestmark = pytest.mark.timeout(900)

LAYERS, TOP_K = 4, 4


def test_recording_from_the_start_up_to_a_kill(model, tmp_path):
    """`--moe-record` alone: static is implied, torch.compile on, and warm-up is not recorded."""
    file = tmp_path / "trace.npz"
    arguments = (*TENSOR_PARALLEL, *FLOAT32, "--moe-record", str(file))
    log = tmp_path / "log"
    with serve(model, *arguments, log=log, num_ranks=2, VLLM_PLUGINS="moe_balancer") as server:
        first, second = server.status()
        assert first["balancer"] == "static" and second["recording"] is None
        assert first["recording"]["state"] == "recording" and first["recording"]["steps"] == 0
        server.reset()
        server.all_tokens(PROMPTS)
        deadline = time.monotonic() + 10 * FLUSH_S
        pairs = server.status()[0]["pairs"]
        while server.status()[0]["recording"]["tokens"] * TOP_K * LAYERS < pairs:
            assert time.monotonic() < deadline, server.status()[0]["recording"]
            time.sleep(0.1)
        assert traces.load(file).counts_NLE.sum() == pairs

        again = requests.post(
            f"{server.url}/moe_balancer/record/start", json={"file": str(file)}, timeout=60
        )
        assert again.status_code == 409 and "is running" in again.text

        for process in [*descendants(server.process.pid), psutil.Process(server.process.pid)]:
            process.kill()
    trace = traces.load(file)
    assert trace.counts_NLE.sum() == pairs
    assert (trace.counts_NLE.sum(2) == trace.counts_NLE[:, :1].sum(2)).all()
    assert trace.phase_N.shape == trace.counts_NLE.shape[:1]
