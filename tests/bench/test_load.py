"""The load is vLLM's own client; what a row says of it is what the client measured."""

import numpy as np
import pytest
from pydantic import ValidationError
from vllm.benchmarks import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

from bench import load
from bench.load import Answered, Load, arguments, timed

DECODE = Load(requests=4, concurrency=2, prompt_tokens=16, max_tokens=3)


def parsed(asked, tmp_path):
    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    return parser.parse_args(arguments(asked, "http://localhost:1", tmp_path, seed=7))


def test_the_client_understands_what_it_is_asked(tmp_path):
    found = parsed(DECODE.model_copy(update={"slo_tpot_ms": 80.0}), tmp_path)
    assert (found.backend, found.endpoint, found.seed) == ("openai", "/v1/completions", 7)
    assert (found.num_prompts, found.max_concurrency) == (4, 2)
    assert (found.random_input_len, found.random_output_len) == (16, 3)
    assert (found.temperature, found.save_detailed) == (0.0, True)
    assert serve.check_goodput_args(found) == {"tpot": 80.0}


def test_without_an_slo_there_is_no_goodput(tmp_path):
    assert serve.check_goodput_args(parsed(DECODE, tmp_path)) == {}


def test_requests_at_once_are_never_more_than_there_are():
    assert DECODE.at_once == 2
    assert DECODE.model_copy(update={"concurrency": None}).at_once == 4
    assert DECODE.model_copy(update={"concurrency": 99}).at_once == 4


def test_the_shortest_request_bounds_the_steps():
    assert DECODE.min_steps == 3
    assert DECODE.model_copy(update={"max_tokens": 40, "length_spread": 0.25}).min_steps == 30


@pytest.mark.parametrize(
    "wrong", [{"prompt_words": 12}, {"requests": 0}, {"slo_tpot_ms": 0}, {"length_spread": 1.0}]
)
def test_wrong_keys_and_values_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Load(**DECODE.model_dump() | wrong)


def client(**changes):
    """What the client returns for two requests of three tokens and one of one token."""
    found = {
        **{"duration": 2.0, "completed": 3, "failed": 0, "errors": ["", "", ""]},
        **{"request_throughput": 1.5, "request_goodput": None},
        **{"output_throughput": 3.5, "total_token_throughput": 27.5},
        **{"ttfts": [0.1, 0.2, 0.3], "latencies": [0.5, 0.4, 0.3], "output_lens": [3, 3, 1]},
        **{"itls": [[0.1, 0.3], [0.1, 0.1], []]},
    }
    for name in load.METRICS:
        found |= {f"p{p}_{name}_ms": float(p) for p in load.PERCENTILES}
    return found | changes


def test_a_row_says_what_the_client_measured():
    fields = timed(DECODE, Answered(client=client(), looks=[], waited_s=0.25))
    assert (fields["tokens_per_s"], fields["requests_per_s"]) == (3.5, 1.5)
    assert fields["client_waited_s"] == 0.25
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        assert [fields[name][p] for p in ("p50", "p90", "p99")] == [50.0, 90.0, 99.0]
        assert len(fields[name]["quantiles"]) == load.NUM_QUANTILES
    assert fields["ttft_ms"]["quantiles"][::25] == [100, 200, 300]
    assert fields["itl_ms"]["quantiles"][::50] == [100, 300]
    assert fields["e2e_ms"]["quantiles"][::25] == [300, 400, 500]
    # TPOT leaves the first token out, and with it requests of one token.
    assert fields["tpot_ms"]["quantiles"][::50] == [100, 200]


def test_quantiles_are_those_of_the_client():
    """Its percentiles and our quantiles are of the same numbers."""
    draw = np.random.default_rng(0).exponential(size=200)
    metrics = client(ttfts=list(draw), latencies=list(draw), output_lens=[1] * 200)
    answered = Answered(client=metrics, looks=[], waited_s=0.0)
    quantiles = timed(DECODE, answered)["ttft_ms"]["quantiles"]
    assert quantiles[25] == pytest.approx(1e3 * np.percentile(draw, 50), abs=0.01)
    assert quantiles[45] == pytest.approx(1e3 * np.percentile(draw, 90), abs=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completed": 3, "failed": 1, "errors": ["", "", "", "refused"]}, "1 of 4 .* refused"),
        ({"completed": 4, "output_lens": [3, 3, 3, 2]}, r"for 3 tokens .* with \[2\]"),
    ],
)
def test_a_load_that_was_not_answered_as_asked_gives_no_number(changes, message):
    with pytest.raises(RuntimeError, match=message):
        load._require_all_answered(client(**changes), DECODE)


def test_lengths_that_are_drawn_may_differ():
    spread = DECODE.model_copy(update={"length_spread": 0.5})
    load._require_all_answered(client(completed=4, output_lens=[3, 4, 3, 2]), spread)
