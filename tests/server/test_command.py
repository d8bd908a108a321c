"""The real command: refusals end it with status 2 before weights; stock vLLM stays stock."""

import subprocess

import pytest
from serving import VLLM

from bench.server import environment

pytestmark = pytest.mark.timeout(900)

COMMANDS = {
    "unknown balancer": (
        ["serve", "MODEL", "--enable-expert-parallel", "-tp", "2", "--moe-balancer", "metr"],
        2,
        "vllm: error: Unknown balancer 'metr'. Did you mean 'metro'? "
        "Allowed: static, eplb, first_copy, metro, gem, exflow, harmoeny, harmoeny_paper, shadow, "
        "even_split.",
    ),
    "no expert parallelism": (
        ["serve", "MODEL", "--moe-balancer", "metro", "--tensor-parallel-size", "2"],
        2,
        "vllm: error: --moe-balancer metro balances experts over expert-parallel ranks, but "
        "expert parallelism is off. Add --enable-expert-parallel.",
    ),
    "library benchmark, one rank": (
        ["bench", "latency", "--model", "MODEL", "-ep", "--moe-balancer", "eplb"],
        2,
        "vllm: error: --moe-balancer eplb needs at least two expert-parallel ranks, and there is "
        "one. Add --tensor-parallel-size 2 or --data-parallel-size 2, or leave the flag away.",
    ),
}


@pytest.fixture(scope="module")
def ended(model, tmp_path_factory):
    """(exit status, stdout, stderr) of all commands, which run at the same time."""
    folder = tmp_path_factory.mktemp("commands")
    started = {}
    try:
        for name, (arguments, _, _) in COMMANDS.items():
            started[name] = subprocess.Popen(
                [VLLM, *[str(model) if word == "MODEL" else word for word in arguments]],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(2),
                cwd=folder,
            )
        found = {}
        for name, process in started.items():
            stdout, stderr = process.communicate(timeout=600)
            found[name] = (process.returncode, stdout, stderr)
        return found
    finally:
        for process in started.values():
            process.kill()
            process.wait()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_refusal_is_one_paragraph_and_status_2(ended, name):
    _, expected_status, expected = COMMANDS[name]
    status, stdout, stderr = ended[name]
    assert status == expected_status, stderr
    assert stderr.splitlines()[-1] == expected
    assert stderr.count("vllm: error:") == 1
    assert "Traceback" not in stdout + stderr
    assert "Starting to load model" not in stdout + stderr


def test_without_our_flag_there_is_no_endpoint_and_no_balancer(dense):
    assert dense.endpoint_status == 404
    assert "MoE balancer" not in dense.log
    assert "vllm_balance.seams.worker" not in dense.log
