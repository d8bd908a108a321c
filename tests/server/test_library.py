"""Without a server: `LLM(...)` in a Python program, and vLLM's own benchmark command."""

import json
import subprocess
import sys

import pytest
from serving import FLOAT32, MAX_TOKENS, MOVING, PROMPTS, TENSOR_PARALLEL, VLLM

from bench.server import environment
from vllm_balance import traces

pytestmark = pytest.mark.timeout(1800)

LAYERS, TOP_K = 4, 4
PROGRAM = """
import json, sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    llm = LLM(
        asked["model"],
        dtype="float32",
        max_model_len=512,
        max_num_seqs=16,
        enforce_eager=True,
        tensor_parallel_size=2,
        enable_expert_parallel=True,
        additional_config={"moe_balancer": {"name": "metro", **asked["settings"]}},
    )
    sampling = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], ignore_eos=True)
    answers = llm.generate(asked["prompts"], sampling)
    tokens = [list(answer.outputs[0].token_ids) for answer in answers]
    ranks = llm.collective_rpc("moe_balancer_status")
    refused = llm.collective_rpc("moe_record_start", args=({"file": "missing/trace.npz"},))
    print("FOUND " + json.dumps({"tokens": tokens, "ranks": ranks, "refused": refused}))
"""


def run(*command: str, folder) -> str:
    """Standard output of a program that must end well; the log is at hand if it does not."""
    log = folder / "log"
    with log.open("w") as errors:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment(2),
            cwd=folder,
            timeout=840,
        )
    assert done.returncode == 0, log.read_text()[-3000:]
    return done.stdout


def test_a_python_program_gets_the_dense_tokens_the_counters_and_a_refusal(model, dense, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    asked = {
        "model": str(model),
        "settings": MOVING,
        "max_tokens": MAX_TOKENS,
        "prompts": PROMPTS,
    }
    said = run(sys.executable, "program.py", json.dumps(asked), folder=tmp_path)
    (line,) = [line for line in said.splitlines() if line.startswith("FOUND ")]
    found = json.loads(line.removeprefix("FOUND "))
    assert found["tokens"] == dense.tokens
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert all(rank["balancer"] == "metro" for rank in found["ranks"])
    assert all(rank["memory_bound_batches"] > 0 for rank in found["ranks"])
    first, second = found["refused"]
    assert "missing/trace.npz cannot be made" in first["error"] and second is None


def test_vllms_benchmark_command_takes_the_flag(model, tmp_path):
    said = run(
        *(VLLM, "bench", "throughput", "--model", str(model), *TENSOR_PARALLEL, *FLOAT32),
        *("--moe-balancer", "metro", "--enforce-eager", "--max-model-len", "512"),
        *("--dataset-name", "random", "--random-input-len", "16", "--random-output-len", "8"),
        *("--num-prompts", "4", "--output-json", "out.json", "--moe-record", "trace.npz"),
        folder=tmp_path,
    )
    assert "Throughput:" in said
    assert json.loads((tmp_path / "out.json").read_text())["num_requests"] == 4
    log = (tmp_path / "log").read_text() + said
    assert "MoE balancer metro" in log
    # The balancer saw every token but the last of each answer, in every layer.
    recorded = traces.load(tmp_path / "trace.npz").chunks(1).sum((0, 2))
    tokens = recorded / TOP_K
    assert len(recorded) == LAYERS and len(set(tokens)) == 1
    assert tokens[0] >= 4 * (16 + 8 - 1)
