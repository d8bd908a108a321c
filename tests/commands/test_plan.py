"""`vllm-balance plan`: yes, no, and what it refuses."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from vllm_balance import commands, traces
from vllm_balance.commands.plan import layout_of, microseconds
from vllm_balance.config import parse
from vllm_balance.errors import BalancerError

SMALL = ["--model", "gpt-oss-20b", "--hardware", "h20", "--prompt", "64", "--output", "64"]


def plan(*arguments):
    made = CliRunner().invoke(commands.app, ["plan", *arguments], env={"COLUMNS": "200"})
    if made.exception is not None and not isinstance(made.exception, SystemExit):
        raise made.exception
    return " ".join(made.output.split())


def test_heavy_skew_in_a_large_batch_is_worth_a_balancer():
    said = plan(*SMALL, "--zipf", "1.5", "--concurrency", "2048")
    found = re.search(r"Yes: (\w+) with redundancy ([\d.]+) is predicted to give \+([\d.]+)%", said)
    assert found is not None, said
    assert float(found[3]) > 5
    assert "GB more memory on each rank" in said
    advised = re.search(r"--moe-balancer (\w+) --moe-balancer-config '(\{.*?\})'", said)
    assert advised is not None and advised[1] == found[1], said
    parse({"name": advised[1], **json.loads(advised[2])})


def test_no_request_that_arrives_has_no_time_to_its_first_token():
    said = plan(*SMALL[:4], "--zipf", "0", "--concurrency", "1", "--output", "4096")
    assert "nan" not in said
    assert re.search(r"static│ *1│ *1│ *[\d.]+│ *-│", said.replace(" ", "").replace("│", "│ "))


def test_an_even_load_is_left_alone():
    assert "No, leave it off" in plan(*SMALL, "--zipf", "0", "--concurrency", "512")


def test_an_slo_bounds_the_requests_in_flight():
    said = plan(*SMALL, "--zipf", "0.5", "--slo-tpot", "8ms")
    assert "at 8 ms per token" in said
    with pytest.raises(BalancerError, match="misses the SLO even without balancing"):
        plan(*SMALL, "--zipf", "0.5", "--slo-tpot", "1us")


def test_a_trace_is_split_between_placing_and_serving(tmp_path):
    random = np.random.default_rng(0)
    ids_TLK = np.argsort(random.random((400, 2, 32)), axis=2)[..., :4].astype(np.uint8)
    trace = traces.Trace(
        name="t", num_experts=32, top_k=4, layer_index_L=np.arange(2), topk_ids_TLK=ids_TLK
    )
    traces.save(tmp_path / "t.npz", trace)
    assert "leave it off" in plan(*SMALL, "--trace", str(tmp_path / "t.npz"))


def test_fetching_is_a_candidate_where_there_is_a_host_link():
    prefill = ["--prompt", "2048", "--output", "2", "--zipf", "1.5", "--concurrency", "64"]
    said = plan("--model", "gpt-oss-20b", "--hardware", "h20", *prefill)
    assert said.count("harmoeny") >= 2
    found = re.search(r"harmoeny │ *1.5│[^│]*│[^│]*│[^│]*│[^│]*│ *\+([\d.]+)%", said)
    assert found is not None, said
    assert float(found[1]) > 5


def test_what_does_not_fit_is_refused():
    with pytest.raises(BalancerError, match="671 GB, which do not fit on 8 ranks"):
        plan("--model", "deepseek-v3", "--hardware", "h100", "--zipf", "0")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (SMALL, "Give a --trace"),
        ([*SMALL, "--zipf", "0", "--slo-tpot", "fast"], "is no time"),
        ([*SMALL, "--zipf", "0", "--slo-tpot", "0ms"], "is no time"),
        ([*SMALL, "--zipf", "0", "--dispatch", "post"], "all_gather, all_to_all"),
        ([*SMALL, "--zipf", "0", "--tensor", "2", "--data", "4"], "refuses tensor inside data"),
        (["--model", "gpt", "--hardware", "h20"], "no model file 'gpt'"),
        (["--model", "gpt-oss-20b", "--hardware", "abacus"], "no hardware file 'abacus'"),
    ],
)
def test_wrong_arguments_are_explained(arguments, reason):
    with pytest.raises(BalancerError, match=reason):
        plan(*arguments)


def test_times_and_layouts():
    assert (microseconds("50ms"), microseconds("0.05 s"), microseconds("8us")) == (5e4, 5e4, 8)
    assert (
        layout_of(None, None, "all_gather", 8).data,
        layout_of(None, None, "all_gather", 2).data,
    ) == (8, 1)
    assert layout_of(4, None, "all_to_all", 8).num_ranks == 4
