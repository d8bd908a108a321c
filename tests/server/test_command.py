"""Refusals end the command with status 2 before weights; stock vLLM stays stock."""

import pytest
from serving import VLLM

from bench.server import environment
from bench.starter import starter

pytestmark = pytest.mark.timeout(1800)

ENDS_WITHIN_S = 300

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
        "one. Add --tensor-parallel-size 2 or --data-parallel-size 2, or remove the flag.",
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_refusal_is_one_paragraph_and_status_2(name, model, tmp_path):
    arguments, expected_status, expected = COMMANDS[name]
    command = [VLLM, *[str(model) if word == "MODEL" else word for word in arguments]]
    log = tmp_path / "log"
    process = starter().start(command, log=log, environ=environment(2), folder=tmp_path)
    try:
        status = process.wait(ENDS_WITHIN_S)
    finally:
        process.kill()
    said = log.read_text(errors="replace")
    assert status == expected_status, said
    assert said.splitlines()[-1] == expected
    assert said.count("vllm: error:") == 1
    assert "Traceback" not in said
    assert "Starting to load model" not in said


def test_without_our_flag_there_is_no_endpoint_and_no_balancer(dense):
    assert dense.endpoint_status == 404
    assert "MoE balancer" not in dense.log
    assert "vllm_balance.seams.worker" not in dense.log
