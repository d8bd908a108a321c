"""Wrappers without a balancer: the original is called as before, and its answer is the answer."""

from types import SimpleNamespace

import pytest
import torch
from vllm.platforms import current_platform

from vllm_balance.seams import arguments, cpu, loading, router

LAYER = SimpleNamespace()
"""A router, a dispatch object or experts of a layer that has no balancer."""
ENGINE_ARGS = SimpleNamespace(additional_config=None)
IDS, MAP = object(), object()
WEIGHT = {
    "param": object(),
    "loaded_weight": object(),
    "weight_name": "w13_weight",
    "shard_id": "w1",
    "expert_id": 3,
}
CALLS = {
    "the router": (router._apply_eplb_mapping, (LAYER, IDS), {}),
    "the dispatch": (router._prepare, (LAYER, IDS), {"topk_ids": IDS}),
    "a rearrangement": (cpu._rearrange, (LAYER,), {"is_profile": True}),
    "a weight": (loading._weight_loader, (LAYER,), WEIGHT | {"return_success": True}),
    "a weight without report": (
        loading._weight_loader,
        (LAYER,),
        WEIGHT | {"return_success": False},
    ),
    "the state of EPLB": (loading._add_model, (LAYER, "model", "config", "name"), {}),
    "a command line": (arguments._from_cli_args, (object, SimpleNamespace(model="m")), {}),
    "a configuration": (arguments._create_engine_config, (ENGINE_ARGS,), {"usage_context": None}),
    "an unknown version": (arguments._refuse, (ENGINE_ARGS,), {"usage_context": None}),
}


@pytest.mark.parametrize("name", CALLS)
def test_without_a_balancer_the_original_answers(name):
    wrap, args, kwargs = CALLS[name]
    answer, calls = SimpleNamespace(additional_config={}, model_config=None), []

    def original(*given, **named):
        calls.append((given, named))
        return answer

    assert wrap(original)(*args, **kwargs) is answer
    assert calls == [(args, kwargs)]
    assert vars(answer) == {"additional_config": {}, "model_config": None} and vars(LAYER) == {}


@pytest.mark.parametrize("experts", [LAYER, SimpleNamespace(**{cpu.EXPERTS: object()})])
def test_experts_without_a_balancer_or_on_one_rank_are_the_originals(experts):
    """vLLM's return nothing: they fill the output that they are given."""
    call = {"output": object(), "topk_ids": IDS, "expert_map": MAP if experts is LAYER else None}
    calls = []
    wrapped = cpu._apply_experts(lambda self, **named: calls.append((self, named)))
    wrapped(experts, **call)
    assert calls == [(experts, call)]


def test_off_cpus_a_layer_runs_what_vllm_chose(monkeypatch):
    parallel = SimpleNamespace(enable_eplb=False)
    config = SimpleNamespace(additional_config={}, parallel_config=parallel)
    monkeypatch.setattr("vllm.config.get_current_vllm_config", lambda: config)
    monkeypatch.setattr(router, "require_balanceable", lambda runner: None)
    monkeypatch.setattr(router, "require_known_slots", lambda runner, enabled: None)
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    chosen = object()
    assert router._select_forward(lambda self: chosen)(LAYER) is chosen


def test_torch_has_its_own_events_again_behind_a_rearrangement_also_a_failed_one():
    own = torch.Event

    def fails(self):
        assert torch.Event is cpu._HostEvent
        raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        cpu._rearrange(fails)(LAYER)
    assert torch.Event is own
