"""The demo trace: the choices of the demo model's own router, in the format of traces."""

import numpy as np
import pytest

from bench import demo_trace
from vllm_balance import traces

# It may train the demo model first.
pytestmark = pytest.mark.timeout(1500)


def test_it_is_a_trace_of_the_demo_model():
    trace = traces.load(demo_trace.ensure())
    num_tokens = demo_trace.NUM_REQUESTS * demo_trace.TOKENS_PER_REQUEST
    assert trace.topk_ids_TLK.shape == (num_tokens, 4, 4)
    assert (trace.num_experts, trace.top_k) == (32, 4)
    first_TK = trace.topk_ids_TLK[:, 0]
    share_E = np.bincount(first_TK.flatten(), minlength=32) / first_TK.size
    assert 1.2 < 32 * share_E.max() < 16, "a trained router prefers some experts"


def test_it_is_made_once(monkeypatch):
    path = demo_trace.ensure()
    monkeypatch.setattr(demo_trace, "record", None)
    assert demo_trace.ensure() == path
