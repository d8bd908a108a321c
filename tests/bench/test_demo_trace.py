"""The demo trace: the choices of the demo model's own router, in the format of traces."""

import numpy as np
import pytest

from bench import demo_trace
from vllm_balance import traces
from vllm_balance.replay_rows import read_trace

# It may train the demo model first.
pytestmark = pytest.mark.timeout(1500)


def test_it_is_a_trace_of_the_demo_model():
    path = demo_trace.ensure()
    topk_ids = read_trace(path, num_experts=32, top_k=4)
    num_tokens = demo_trace.NUM_REQUESTS * demo_trace.TOKENS_PER_REQUEST
    assert topk_ids.shape == (num_tokens, 4, 4)
    assert traces.load(path).num_experts == 32
    share_E = np.bincount(topk_ids[:, 0].flatten(), minlength=32) / topk_ids[:, 0].size
    assert 1.2 < 32 * share_E.max() < 16, "a trained router prefers some experts"


def test_it_is_made_once(monkeypatch):
    path = demo_trace.ensure()
    monkeypatch.setattr(demo_trace, "record", None)
    assert demo_trace.ensure() == path
