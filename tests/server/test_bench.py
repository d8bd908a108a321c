"""A run file against a real server: load by vLLM's client, counters, rows, report.

The gate before it: test_parallel.py, on a server that is there.
"""

import tomllib

import pytest
from measured import row

from bench import gate, run, speed
from bench.provenance import config_hash, harness, machine, sources, versions
from vllm_balance.commands.report import report
from vllm_balance.measured_tables import arms_table
from vllm_balance.measurement import read_measurements

pytestmark = pytest.mark.timeout(1800)

FILE = """
title = "A small run"
seed = 5
in_turns = true
[model]
num_layers = 2
num_experts = 16
top_k = 4
hidden = 256
inner = 128
num_heads = 4
num_kv_heads = 2
head_dim = 64
[serve]
tensor_parallel = 2
flags = ["--enforce-eager", "--load-format", "dummy", "--max-model-len", "512", "--max-num-seqs", "8", "--no-enable-prefix-caching"]
[warm]
requests = 8
prompt_tokens = 8
max_tokens = 16
[load]
requests = 8
concurrency = 4
prompt_tokens = 8
max_tokens = 80
repeats = 2
slo_tpot_ms = 10000
[replay]
zipf = 0.8
[eplb]
window_size = 8
step_interval = 40
[arms.metro]
redundancy = 1.5
"""  # noqa: E501


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The second row of `metro`, whose server is suspended until its turn; there is the first."""
    folder = tmp_path_factory.mktemp("run")
    file, results = folder / "small.toml", folder / "small.jsonl"
    file.write_text(FILE)
    known = {"config_hash": config_hash(tomllib.loads(FILE)), "machine": machine()}
    known |= {"sources": sources(), "harness": harness(), "versions": versions()}
    done = row("metro", run="small", **known)
    results.write_text(done.model_dump_json() + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "_is_proof", lambda kept: True)
        patch.setattr(speed, "EXPERTS", 2)
        run.run_file(file, 1, results)
    found = read_measurements(results)
    assert found[0] == done
    assert " tokens of the demo model, proof " in found[1].gate
    return found[1:]


def test_the_client_measured_what_was_asked(measured):
    (found,) = measured
    assert (found.arm, found.position, found.repeat, found.seed) == ("metro", 0, 1, 5)
    assert found.in_turns
    assert (found.requests, found.concurrency, found.output_tokens) == (8, 4, 80)
    assert found.tokens_per_s == pytest.approx(8 * 80 / found.duration_s)
    assert found.goodput_per_s == pytest.approx(found.requests_per_s)
    for latency in (found.ttft_ms, found.tpot_ms, found.itl_ms, found.e2e_ms):
        assert 0 < latency.p50 <= latency.p90 <= latency.p99 <= latency.quantiles[-1] + 0.01
        assert latency.quantiles == sorted(latency.quantiles)
    assert found.e2e_ms.p50 > 79 * found.tpot_ms.quantiles[0]


def test_the_counters_are_those_of_the_load(measured):
    (found,) = measured
    assert (found.num_ranks, found.num_layers) == (2, 2)
    assert (found.num_logical_experts, found.num_physical_experts) == (16, 24)
    assert found.steps >= 160, "two waves of 80 tokens each"
    assert found.decisions == found.steps * 2
    # Every token but the last of each request goes through 2 layers with 4 experts. The client
    # draws tokens and sends text, which may come back as a token more.
    tokens = sum(found.tokens_per_rank) * found.steps / (2 * 4)
    assert tokens == pytest.approx(round(tokens))
    assert 0 <= round(tokens) - 8 * (8 + 80 - 1) <= 8
    assert found.activated_worst_rank >= max(found.activated_per_rank)
    assert 0 <= found.waiting_share_by_experts < 0.5
    assert found.experts_us_per_layer > 0 and found.decide_us_per_layer > 0
    assert found.memory_bytes > 2**29


def test_the_machine_was_timed_beside_the_load(measured):
    streaming, computing = measured[0].machine_speed
    assert (streaming.tokens_each, computing.tokens_each) == (speed.STREAMING, speed.COMPUTING)
    assert len(streaming.time_us) == len(computing.time_us) == 2
    for streamed, computed in zip(streaming.time_us, computing.time_us, strict=True):
        assert computed > streamed > 0


def test_the_load_was_looked_at_while_it_ran(measured):
    (found,) = measured
    assert sum(sample.steps for sample in found.samples) == pytest.approx(found.steps)
    assert len(found.layers) == 2
    for layer in found.layers:
        assert sorted(set(layer.physical_to_logical)) == list(range(16))
        assert sum(layer.slot_tokens) > 0


def test_a_report_is_made_of_it(measured, tmp_path):
    file, page = tmp_path / "small.jsonl", tmp_path / "report.html"
    file.write_text("".join(each.model_dump_json() + "\n" for each in measured))
    report([file], page)
    assert "A small run" in page.read_text()
    assert arms_table(measured).body[0][0] == "metro"
