"""`vllm-balance plan`: yes, no, and what it refuses."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from vllm_balance import commands, traces
from vllm_balance.commands.plan import answer, layout_of, microseconds
from vllm_balance.config import parse
from vllm_balance.errors import BalancerError
from vllm_balance.simulate import hardware, models, validity
from vllm_balance.simulate.advice import Advice, Candidate, Question, knee_of

MODEL = ["--model", "qwen3-30b-a3b", "--hardware", "h20"]
SMALL = [*MODEL, "--prompt-tokens", "64", "--output-tokens", "64"]


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


def test_answers_of_one_token_have_no_time_per_token():
    load = ["--concurrency", "8", "--prompt-tokens", "256", "--output-tokens", "1"]
    said = plan(*MODEL, "--zipf", "0", *load)
    assert "nan" not in said
    assert re.search(r"static *│ *1│ *8│ *-│ *\d+│", said), said


def test_a_rare_prompt_has_a_time_to_its_first_token():
    said = plan(*MODEL, "--zipf", "0", "--concurrency", "1", "--output-tokens", "4096")
    assert "nan" not in said
    assert re.search(r"static *│ *1│ *1│ *[\d.]+│ *\d+│", said), said


def test_the_limits_of_an_engine_are_vllms_or_those_that_are_asked_for():
    asked = [*SMALL, "--zipf", "0", "--concurrency", "8"]
    assert "--max-num-batched-tokens 8192 and --max-num-seqs 1024 per engine" in plan(*asked)
    said = plan(*asked, "--max-num-batched-tokens", "512", "--max-num-seqs", "16")
    assert "--max-num-batched-tokens 512 and --max-num-seqs 16 per engine" in said
    with pytest.raises(BalancerError, match="at most 16 each run 128 at once"):
        plan(*asked[:-1], "129", "--max-num-seqs", "16")


def test_a_model_without_eplb_gets_a_plain_answer():
    said = plan("--model", "gpt-oss-20b", "--hardware", "h20", "--zipf", "0.3")
    assert "Left out, as a server would refuse it: eplb, first_copy, metro, harmoeny; " in said
    assert "vLLM 0.32 does not support EPLB for GptOssForCausalLM" in said
    assert "Left out, as a server would refuse it: gem; vLLM 0.32 loads all experts of" in said
    assert "No: a server would refuse every balancer here but static." in said


def advice(balancer, redundancy=1.5, gain=0.2):
    """What was found where this candidate is the best."""
    steps = SimpleNamespace(prefill_N=np.array([0.0, 500, 652]), times_N=np.array([5, 1, 1]))
    made = SimpleNamespace(redundant_bytes=3.2e9, steps=steps)
    best = Candidate(balancer=balancer, redundancy=redundancy, concurrency=9, outcome=made)
    static = Candidate(balancer="static", redundancy=1.0, concurrency=9, outcome=made)
    return Advice(candidates=(static, best), left_out={}, best=best, static_rate=1.0, gain=gain,
                  band=(gain - 0.05, gain + 0.05))  # fmt: skip


def test_an_answer_names_slots_host_memory_and_what_a_gpu_needs_for_them():
    layout = layout_of(None, 8, "all_gather", 8)
    asked = Question(model=models.load("qwen3-30b-a3b"), hardware=hardware.load("h20")[0],
                     layout=layout, prompt_tokens=64, output_tokens=64,
                     traffic=lambda: None, concurrency=9)  # fmt: skip
    errors = validity.load().roofline
    said = answer(asked, advice("harmoeny"), errors)
    assert (
        "Yes: harmoeny with 8 dynamic slots per rank is predicted to give +20.0% tokens/s" in said
    )
    assert "3.2 GB more memory on each rank and 58 GB of host memory" in said
    assert "with --enforce-eager --moe-backend triton --moe-balancer harmoeny" in said
    assert f"one ratio in ten was missed by more than {errors.one_in_ten.value:.0%}" in said
    caveat = "Decoding without CUDA graphs, which it needs, is slower than modelled here."
    assert caveat in said and caveat not in answer(
        replace(asked, output_tokens=1), advice("harmoeny"), errors
    )
    said = answer(asked, advice("gem", 1.0), errors)
    assert "Yes: gem without redundant experts is predicted" in said
    assert """with --moe-balancer gem --moe-balancer-config '{"map": "MAP.json"}'""" in said
    knee = knee_of(asked, advice("gem", 1.0).best)
    made = f"place --policy gem --model MODEL --knee-tokens {knee:g} --ranks 8 --trace TRACE"
    assert 15 < knee < 25 and f"{made} --batch 9 --prefill-batch 576 -o MAP.json" in said
    prefill = replace(asked, output_tokens=1, hardware=hardware.load("cpu-amx")[0])
    said = answer(prefill, advice("gem", 1.0), errors)
    assert "--profile PROFILE --ranks 8 --trace TRACE --phase prefill --batch 576 -o" in said
    said = answer(asked, advice("metro"), errors)
    assert "Yes: metro with redundancy 1.5" in said and "host memory" not in said
    assert "with --moe-balancer metro" in said
    assert "within the model's error" in answer(asked, advice("metro", gain=0.01), errors)


def test_an_even_load_is_left_alone():
    assert "No, leave it off" in plan(*SMALL, "--zipf", "0", "--concurrency", "512")


def test_an_slo_bounds_the_requests_in_flight():
    said = plan(*SMALL, "--zipf", "0.5", "--slo-tpot", "8ms")
    assert "at 8 ms per token" in said
    with pytest.raises(BalancerError, match="misses the SLO even without balancing"):
        plan(*SMALL, "--zipf", "0.5", "--slo-tpot", "1us")


def test_a_skewed_trace_is_worth_a_balancer(tmp_path):
    """Zipf 1.5, by the Gumbel trick, where the same load under even routing is left alone."""
    random = np.random.default_rng(0)
    popularity_E = -1.5 * np.log(1 + random.permutation(128))
    noisy_TLE = random.gumbel(size=(4000, 2, 128)) + popularity_E
    ids_TLK = np.argsort(-noisy_TLE, axis=2)[..., :8].astype(np.uint8)
    trace = traces.Trace(
        name="t", num_experts=128, top_k=8, layer_index_L=np.arange(2), topk_ids_TLK=ids_TLK,
    )  # fmt: skip
    traces.save(tmp_path / "t.npz", trace)
    said = plan(*SMALL, "--trace", str(tmp_path / "t.npz"), "--concurrency", "2048")
    assert "Yes: " in said, said


def test_a_trace_is_split_between_placing_and_serving(tmp_path):
    random = np.random.default_rng(0)
    ids_TLK = np.argsort(random.random((400, 2, 128)), axis=2)[..., :8].astype(np.uint8)
    trace = traces.Trace(
        name="t", num_experts=128, top_k=8, layer_index_L=np.arange(2), topk_ids_TLK=ids_TLK
    )
    traces.save(tmp_path / "t.npz", trace)
    assert "leave it off" in plan(*SMALL, "--trace", str(tmp_path / "t.npz"))


def test_counts_will_do_and_what_they_do_not_tell_is_said(tmp_path):
    random = np.random.default_rng(0)
    shape = {"name": "t", "num_experts": 128, "top_k": 8, "layer_index_L": np.arange(2)}
    counts_NLE = random.integers(0, 9, (40, 2, 128)).astype(np.int32)
    ids_TLK = np.argsort(random.random((400, 2, 128)), axis=2)[..., :8].astype(np.uint8)
    asked = [*SMALL, "--concurrency", "8", "--trace"]
    said = {}
    for kind, recorded in {"counts_NLE": counts_NLE, "topk_ids_TLK": ids_TLK}.items():
        traces.save(tmp_path / f"{kind}.npz", traces.Trace(**shape, **{kind: recorded}))
        said[kind] = plan(*asked, str(tmp_path / f"{kind}.npz"))
    drawn = "which experts a token uses together is drawn from them, not recorded."
    assert said["counts_NLE"].endswith(f"Trace counts_NLE holds counts of steps: {drawn}")
    assert "drawn from them" not in said["topk_ids_TLK"]


def test_a_trace_without_counts_or_ids_is_refused(tmp_path):
    np.savez(tmp_path / "t.npz", num_experts=128, top_k=8)
    with pytest.raises(BalancerError, match="exactly one of topk_ids and counts"):
        plan(*SMALL, "--trace", str(tmp_path / "t.npz"))


def test_fetching_is_a_candidate_where_there_is_a_host_link():
    prefill = ["--prompt-tokens", "2048", "--output-tokens", "2", "--concurrency", "16"]
    said = plan(*MODEL, *prefill, "--zipf", "1.5")
    assert said.count("harmoeny") >= 2
    found = re.search(r"harmoeny *│ *1.5│[^│]*│[^│]*│[^│]*│[^│]*│ *\+([\d.]+)%", said)
    assert found is not None, said
    assert float(found[1]) > 5


def test_what_does_not_fit_is_refused():
    with pytest.raises(BalancerError, match="673 GB, which do not fit on 8 ranks"):
        plan("--model", "deepseek-v3", "--hardware", "h100", "--zipf", "0")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (SMALL, "Give a --trace"),
        (
            [*SMALL, "--zipf", "0", "--slo-tpot", "fast"],
            "--slo-tpot is 'fast'; allowed is a positive number with a unit",
        ),
        ([*SMALL, "--zipf", "0", "--slo-tpot", "50"], "--slo-tpot is '50'.*for example 50ms"),
        ([*SMALL, "--zipf", "0", "--trace", "t.npz"], "t.npz and --zipf 0 were given together"),
        (
            [*SMALL, "--zipf", "0", "--tensor", "8", "--dispatch", "all_to_all"],
            "between data-parallel ranks, and the layout is tensor-parallel",
        ),
        ([*SMALL[:-1], "1", "--zipf", "0", "--slo-tpot", "5ms"], "answers of one token"),
        ([*SMALL, "--zipf", "0", "--max-num-seqs", "8192"], "no room for prompts"),
        (
            ["--model", "qwen15-moe-fp32", "--hardware", "v100-dgx1", "--zipf", "0"],
            "60 experts, and 8 ranks were asked for",
        ),
        (
            ["--model", "switch-128", "--hardware", "v100-dgx1", "--zipf", "0"],
            "no server of switch-base-128 can be planned",
        ),
        ([*SMALL, "--zipf", "0", "--slo-tpot", "0ms"], "allowed is a positive number"),
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
    assert layout_of(None, None, "all_to_all", 8).num_ranks == 8
