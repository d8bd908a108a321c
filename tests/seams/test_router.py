"""Padding rows in vLLM's router and dispatch, and layers whose slots are not those balanced."""

from types import SimpleNamespace

import pytest
import torch
from deployments import refusal

from vllm_balance.config import BalancerConfig
from vllm_balance.errors import BalancerError
from vllm_balance.seams import layer_binding, router

IDS_TK = torch.tensor([[4, 1], [0, 3], [2, 0], [-1, -1]])
"""The last row is padding whose router emits -1; that of the second chose experts."""
IS_PADDING_T = torch.tensor([False, True, False, True, True, True])


class OnGpu(torch.Tensor):
    """A host tensor that says that it is on a device."""

    is_cpu = False


class Balancer:
    """Slot of expert e is e + 10; remembers what the router gave it."""

    def __init__(self, way: str) -> None:
        self.way = way

    def in_router(self, ids_TK, num_valid_tokens):
        self.given_TK, self.num_valid_tokens = ids_TK, num_valid_tokens
        return ids_TK if self.way == "after_gather" else slots_of(ids_TK)

    def after_gather(self, ids_GK, rows_F):
        self.rows_F = rows_F
        return slots_of(ids_GK)


def slots_of(ids_TK: torch.Tensor) -> torch.Tensor:
    return torch.where(ids_TK < 0, -1, ids_TK + 10)


@pytest.fixture(autouse=True)
def context(monkeypatch) -> SimpleNamespace:
    """vLLM's forward context of a batch with padding rows."""
    sizes = SimpleNamespace(get_chunk_sizes_across_dp_rank=lambda: [3, 1])
    found = SimpleNamespace(is_padding=IS_PADDING_T, dp_metadata=sizes)
    monkeypatch.setattr("vllm.forward_context.get_forward_context", lambda: found)
    monkeypatch.setenv("VLLM_MOE_SKIP_PADDING", "1")
    return found


def routed(balancer: Balancer, ids_TK: torch.Tensor, eplb_state=None) -> torch.Tensor:
    own = SimpleNamespace(**{router.BALANCER: balancer}, eplb_state=eplb_state)
    return router._apply_eplb_mapping(None)(own, ids_TK)


def dispatched(balancer: Balancer, ids_TK: torch.Tensor) -> torch.Tensor:
    def gather(self, topk_ids):
        return "hidden states", "scales", None, topk_ids, "weights"

    own = SimpleNamespace(**{router.BALANCER: balancer})
    *others, slots_TK, weights = router._prepare(gather)(own, ids_TK)
    assert others == ["hidden states", "scales", None] and weights == "weights"
    return slots_TK


def test_nothing_computes_padding_rows_on_cpu():
    balancer = Balancer("after_gather")
    ids_TK = routed(balancer, IDS_TK)
    assert ids_TK.tolist() == [[4, 1], [-1, -1], [2, 0], [-1, -1]]
    assert dispatched(balancer, ids_TK).tolist() == [[14, 11], [-1, -1], [12, 10], [-1, -1]]
    assert balancer.rows_F == [3, 1]


def test_sources_are_not_told_apart_where_it_was_not_vllm_that_gathered(context):
    context.dp_metadata = None
    balancer = Balancer("after_gather")
    dispatched(balancer, IDS_TK)
    assert balancer.rows_F is None


GPU_SLOTS = [[14, 11], [0, 3], [12, 10], [-1, -1]]
"""Padding rows have what their router chose: -1, or the numbers of its experts."""


def test_padding_rows_go_through_the_gather_without_counting_and_stay_what_they_were_on_gpus():
    balancer = Balancer("after_gather")
    ids_TK = routed(balancer, IDS_TK.as_subclass(OnGpu))
    assert ids_TK.tolist() == [[4, 1], [-2, -5], [2, 0], [-1, -1]]
    assert dispatched(balancer, ids_TK).tolist() == GPU_SLOTS


def test_padding_rows_stay_what_they_were_where_counts_are_exchanged_on_gpus():
    balancer = Balancer("all_reduce")
    slots_TK = routed(balancer, IDS_TK.as_subclass(OnGpu))
    assert balancer.given_TK.tolist() == [[4, 1], [-2, -5], [2, 0], [-1, -1]]
    assert slots_TK.tolist() == GPU_SLOTS
    assert routed(balancer, IDS_TK).tolist() == [[14, 11], [-1, -1], [12, 10], [-1, -1]]


@pytest.mark.parametrize("way", ["replicated", "after_gather", "all_reduce"])
@pytest.mark.parametrize("kind", [torch.Tensor, OnGpu])
def test_a_mask_that_vllm_does_not_fill_is_not_read(way, kind, monkeypatch):
    """Without VLLM_MOE_SKIP_PADDING it says padding everywhere, left there by a dummy batch."""
    monkeypatch.setenv("VLLM_MOE_SKIP_PADDING", "0")
    balancer = Balancer(way)
    routed(balancer, IDS_TK.as_subclass(kind))
    assert balancer.given_TK.tolist() == IDS_TK.tolist()
    assert balancer.num_valid_tokens is None


def test_a_pass_without_a_mask_has_no_padding(context):
    context.is_padding = None
    for way in ("replicated", "after_gather", "all_reduce"):
        balancer = Balancer(way)
        routed(balancer, IDS_TK.as_subclass(OnGpu))
        assert balancer.given_TK.tolist() == IDS_TK.tolist()
        assert balancer.num_valid_tokens is None


def test_tensor_parallel_gpus_know_their_padding_with_and_without_eplb(context):
    context.is_padding = torch.tensor([False, False, False, True, True])
    balancer, ids_TK = Balancer("replicated"), IDS_TK.as_subclass(OnGpu)
    assert routed(balancer, ids_TK).tolist() == slots_of(IDS_TK).tolist()
    assert balancer.num_valid_tokens.dtype is torch.int32
    assert int(balancer.num_valid_tokens) == 3
    state = SimpleNamespace(num_unpadded_tokens_tensors=[torch.tensor(2, dtype=torch.int32)])
    routed(balancer, ids_TK, state)
    assert balancer.num_valid_tokens is state.num_unpadded_tokens_tensors[0]
    routed(balancer, IDS_TK, state)
    assert balancer.num_valid_tokens is None, "a CPU pads no batch"


@pytest.mark.parametrize(("way", "rows_S"), [("replicated", None), ("after_gather", [3, 1])])
def test_the_next_layer_looks_at_the_inputs_when_this_one_has_chosen(way, rows_S):
    done = []

    class Ahead(Balancer):
        look_ahead = "a guess"

        def before_experts(self, hidden_TH, rows_S):
            done.append((hidden_TH, rows_S))

    def chooses(self, hidden_states, router_logits, topk_indices_dtype=None, *, input_ids=None):
        done.append((router_logits, topk_indices_dtype, input_ids))
        return "weights", "ids"

    def select(balancer: Balancer | None):
        own = SimpleNamespace(**{router.BALANCER: balancer})
        return router._select_experts(chooses)(own, "inputs", "logits", torch.int32, input_ids="i")

    balancer = Ahead(way)
    assert select(balancer) == ("weights", "ids")
    logits = ("logits", torch.int32, "i")
    if way == "after_gather":
        assert done == [logits], "this layer's own copies come first, and behind the gather"
        gathered = ("tokens", None, None, IDS_TK, "weights")
        dispatch = SimpleNamespace(**{router.BALANCER: balancer})
        router._prepare(lambda self: gathered)(dispatch)
        assert balancer.inputs_TH is None
    assert done == [logits, ("inputs", rows_S)]
    for without in (Balancer(way), None):
        select(without)
    assert done[2:] == [logits] * 2, "these ask nobody"


def runner(*, eplb_state=None, fused: int = 0) -> SimpleNamespace:
    manager = SimpleNamespace(num_fused_shared_experts=fused)
    return SimpleNamespace(
        layer_name="model.layers.0.mlp.experts",
        router=SimpleNamespace(eplb_state=eplb_state),
        routed_experts=SimpleNamespace(expert_map_manager=manager),
        moe_config=SimpleNamespace(num_experts=4),
    )


def test_a_model_that_gives_its_layers_no_eplb():
    router.require_known_slots(runner(), None)
    router.require_known_slots(runner(eplb_state="made"), "metro")
    text = refusal(router.require_known_slots, runner(), "metro")
    assert "--moe-balancer metro needs" in text and "--moe-balancer static" in text
    assert "vLLM built model.layers.0.mlp.experts of this model without it" in text


def test_shared_experts_that_are_slots():
    text = refusal(router.require_known_slots, runner(fused=2), None)
    assert "2 shared experts" in text and "VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS" in text


def test_layers_are_checked_while_they_are_built(monkeypatch):
    parallel = SimpleNamespace(enable_eplb=True)
    config = SimpleNamespace(parallel_config=parallel, additional_config={"moe_balancer": "eplb"})
    monkeypatch.setattr("vllm.config.get_current_vllm_config", lambda: config)
    monkeypatch.setattr(router, "require_balanceable", lambda runner: None)
    with pytest.raises(BalancerError, match="--moe-balancer eplb needs vLLM's EPLB"):
        router._select_forward(lambda self: None)(runner())


def test_a_layer_that_the_maps_of_eplb_do_not_cover():
    uncovered = runner(eplb_state=SimpleNamespace(logical_to_physical_map=None))
    text = refusal(layer_binding._tables, "metro", uncovered, 2, None)
    assert "its maps do not cover model.layers.0.mlp.experts" in text
    assert "--moe-balancer metro needs" in text and "--moe-balancer static" in text


def test_a_model_without_eplb_on_cpu():
    from vllm_balance.seams.worker_cpu import BalancedCPUWorker

    worker = SimpleNamespace(
        model_runner=SimpleNamespace(get_model=lambda: torch.nn.Linear(1, 1)),
        balancer_config=BalancerConfig(name="metro"),
    )
    text = refusal(BalancedCPUWorker._attach_eplb, worker)
    assert "Linear does not support it" in text and "--moe-balancer metro needs" in text
