"""What binds dynamic slots to a loaded model: the store, the copies, the rules, the refusals."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.platforms import current_platform

from vllm_balance.config import BalancerConfig
from vllm_balance.cost import CostModel
from vllm_balance.errors import BalancerError
from vllm_balance.experts.prefetch import Copy, SyncPrefetch, ThreadPrefetch
from vllm_balance.seams import router, slots
from vllm_balance.seams.layer_checks import require_balanceable, require_predictable
from vllm_balance.seams.slots import ModelSlots
from vllm_balance.seams.worker import BalancedWorker

NUM_EXPERTS, NUM_SLOTS = 4, 2


@pytest.fixture
def group(tmp_path):
    """A gloo group of this process alone: every expert is at home."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield SimpleNamespace(world_size=1, rank_in_group=0, cpu_group=dist.group.WORLD)
    dist.destroy_process_group()


def runner(seed: int, *, hidden: int = 8, gate=None):
    generator = torch.Generator().manual_seed(seed)
    rows = NUM_EXPERTS + NUM_SLOTS
    tensors = [
        torch.randn(rows, 6, hidden, generator=generator).bfloat16().view(rows, -1),
        torch.randn(rows, 3, generator=generator),
    ]
    return SimpleNamespace(
        layer_name=f"layer {seed}",
        gate=gate,
        router=CPURouter(top_k=2, global_num_experts=NUM_EXPERTS),
        tensors=tensors,
        get_expert_weights=lambda: tensors,
        routed_experts=SimpleNamespace(
            expert_map=None, quant_method=SimpleNamespace(moe_kernel=None)
        ),
        moe_config=SimpleNamespace(
            num_logical_experts=NUM_EXPERTS,
            experts_per_token=2,
            hidden_dim=hidden,
            intermediate_size_per_partition=2,
            is_act_and_mul=True,
        ),
    )


def model_slots(group, runners, **settings) -> ModelSlots:
    config = BalancerConfig(name="harmoeny", dynamic_slots=NUM_SLOTS, **settings)
    return ModelSlots(runners, config, group)


@pytest.mark.parametrize("prefetch", [None, "async", "sync"])
def test_a_copy_brings_the_expert_of_its_layer_with_all_its_tensors(group, prefetch):
    runners = [runner(0), runner(1)]
    shared = model_slots(group, runners, prefetch=prefetch)
    kind = SyncPrefetch if prefetch == "sync" else ThreadPrefetch
    assert isinstance(shared.prefetch, kind)
    assert shared.store.layout.expert_bytes == 6 * 8 * 2 + 3 * 4
    shared.prefetch.start([Copy(layer=1, expert=2, slot=NUM_EXPERTS + 1)])
    shared.prefetch.wait(1)
    for tensor in runners[1].tensors:
        assert torch.equal(tensor[NUM_EXPERTS + 1], tensor[2])
    for tensor in runners[0].tensors:
        assert not torch.equal(tensor[NUM_EXPERTS + 1], tensor[2])
    shared.prefetch.close()


@pytest.mark.parametrize(("prefetch", "kind"), [("async", "stream"), ("sync", SyncPrefetch)])
def test_a_device_copies_from_pinned_memory_however_copies_run(group, monkeypatch, prefetch, kind):
    shared = model_slots(group, [runner(0)], prefetch=prefetch)
    pinned = []

    def register(address, size_bytes, flags):
        pinned.append((address, size_bytes))
        return 0

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr(slots, "StreamPrefetch", lambda run: "stream")
    shared._on_cpu = False
    found = shared._make_prefetch()
    assert found == kind or isinstance(found, kind)
    assert [size_bytes for _, size_bytes in pinned] == [shared.store.size_bytes]


def test_the_size_of_the_store_is_said_where_it_is_known(group, monkeypatch):
    said = []
    monkeypatch.setattr(slots, "_say", said.append)
    shared = model_slots(group, [runner(0), runner(1)])
    (text,) = said
    assert "host store of 2 layers with 4 experts takes" in text
    assert f"takes {shared.store.size_bytes:,} bytes" in text


def test_layers_with_experts_of_different_sizes_are_refused(group):
    with pytest.raises(BalancerError, match="experts of different sizes"):
        model_slots(group, [runner(0), runner(1, hidden=16)])


def test_a_given_threshold_is_not_measured_and_costs_a_cpu_its_time(group):
    rules = model_slots(group, [runner(0)], threshold_tokens=7).rules(3.0)
    assert (rules.threshold_tokens, rules.fetch_tokens, rules.knee_tokens) == (7, 7, 3.0)


def test_the_threshold_follows_from_the_speeds(group, monkeypatch):
    monkeypatch.setattr(slots, "copy_bytes_per_s", lambda copy, size, num: copy(0) or size * 1e3)
    monkeypatch.setattr(slots, "token_us", lambda experts: 50.0)
    shared = model_slots(group, [runner(0)])
    home = runner(0).tensors[0][:NUM_EXPERTS]
    said = []
    monkeypatch.setattr(slots, "_say", said.append)
    # A copy takes 1,000 us, as long as 20 tokens.
    assert shared.rules(1.0).threshold_tokens == 20
    profiled = CostModel(a_us=0.0, b_us=630.0, c_us=0.0, beta_us=100.0)
    assert shared.rules(1.0, [profiled]).threshold_tokens == 10
    rates = [f"{2 * 3 * 8 * 2 / us / 1e3:,.0f} GFLOP/s" for us in (50, 100)]
    assert f"({rates[0]}, measured; means over the ranks)" in said[0]
    assert f"({rates[1]}, from the profile; means over the ranks)" in said[1]
    assert torch.equal(shared._tensors_L[0][0][:NUM_EXPERTS], home), "measured in a dynamic slot"


def layer():
    """The balancer of a layer, as far as look-ahead is about it."""
    tables, summed = SimpleNamespace(num_ranks=1), lambda seen_E: seen_E
    return SimpleNamespace(experts=None, rank=0, tables=tables, summed=summed)


def test_a_layer_asks_the_router_of_the_next(group):
    gate = torch.nn.Linear(8, NUM_EXPERTS)
    runners = [runner(0), runner(1, gate=lambda rows: (gate(rows), None))]
    shared = model_slots(group, runners, look_ahead="router")
    layers = [layer(), layer()]
    shared.connect(layers, 4.0)
    assert layers[0].following is layers[1] and not hasattr(layers[1], "following")
    assert layers[0].look_ahead.all_reduce is layers[0].summed, "a guess is counted"
    guess = layers[0].look_ahead.guess(torch.randn(50, 8))
    assert int(guess.sum()) == 100
    assert layers[0].look_ahead.guess(torch.randn(4, 8)) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_grouped_topk": True, "num_expert_group": 2, "topk_group": 1}, "grouped top-k"),
        ({"custom_routing_function": torch.topk}, "a routing function of its own"),
        ({"e_score_correction_bias": torch.ones(NUM_EXPERTS)}, "a correction bias"),
        ({"scoring_func": "sqrtsoftplus"}, "sqrtsoftplus scores"),
    ],
)
def test_a_router_that_takes_others_than_the_largest_logits_is_not_asked_early(changes, reason):
    found = runner(1, gate=lambda rows_NH: (rows_NH, None))
    require_predictable(found)
    found.router = CPURouter(top_k=2, global_num_experts=NUM_EXPERTS, **changes)
    with pytest.raises(BalancerError, match=rf"layer 1 chooses otherwise \({reason}\)"):
        require_predictable(found)


def test_of_the_routers_for_gpus_one_takes_the_largest_logits():
    found = runner(1, gate=lambda rows_NH: (rows_NH, None))
    found.router = FusedTopKRouter(top_k=2, global_num_experts=NUM_EXPERTS)
    require_predictable(found)
    for other, reason in (
        (FusedTopKRouter(2, NUM_EXPERTS, scoring_func="sigmoid"), "sigmoid scores"),
        (CustomRoutingRouter(2, NUM_EXPERTS, torch.topk), "CustomRoutingRouter"),
        (SimpleNamespace(), "SimpleNamespace"),
    ):
        found.router = other
        with pytest.raises(BalancerError, match=rf"layer 1 chooses otherwise \({reason}\)"):
            require_predictable(found)


@pytest.mark.parametrize("look_ahead", ["router", "off"])
def test_a_layer_that_hides_its_router_is_refused_while_it_is_built(monkeypatch, look_ahead):
    settings = {"name": "harmoeny", "look_ahead": look_ahead}
    config = SimpleNamespace(
        additional_config={"moe_balancer": settings},
        parallel_config=SimpleNamespace(enable_eplb=True),
    )
    monkeypatch.setattr("vllm.config.get_current_vllm_config", lambda: config)
    monkeypatch.setattr(router, "require_balanceable", lambda runner: None)
    monkeypatch.setattr(router, "require_known_slots", lambda runner, enabled: None)
    hidden = runner(1)
    hidden._shared_experts = None
    if look_ahead == "off":
        assert router._select_forward(lambda self: None)(hidden) is torch.ops.vllm.moe_forward
        return
    with pytest.raises(BalancerError, match="layer 1 does not tell vLLM where its router is"):
        router._select_forward(lambda self: None)(hidden)


def built_layer(*names: str):
    """A layer while its model is built, with these parameters and modular experts."""
    experts = torch.nn.Module()
    experts.quant_method = SimpleNamespace(is_monolithic=False)
    for name in names:
        experts.register_parameter(name, torch.nn.Parameter(torch.ones(NUM_EXPERTS)))
    return SimpleNamespace(layer_name="layer 0", routed_experts=experts)


@pytest.mark.parametrize(
    "name", ["w13_input_scale", "w2_input_scale", "w13_input_global_scale", "w2_input_scale_2"]
)
def test_scales_that_all_slots_share_are_refused_where_slots_are_empty(name, monkeypatch):
    def served_with(balancer: str | None) -> None:
        settings = {} if balancer is None else {"moe_balancer": balancer}
        config = SimpleNamespace(additional_config=settings)
        monkeypatch.setattr("vllm.config.get_current_vllm_config", lambda: config)

    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    served_with("harmoeny")
    require_balanceable(built_layer("w13_weight", "w13_weight_scale"))
    with pytest.raises(BalancerError, match=rf"layer 0 has static scales .* \({name}\)"):
        require_balanceable(built_layer("w13_weight", name))
    for fetches_nothing in ("metro", None):
        served_with(fetches_nothing)
        require_balanceable(built_layer("w13_weight", name))


def worker(name: str) -> BalancedWorker:
    made = BalancedWorker()
    made.balancer_config = BalancerConfig(name=name)
    return made


def test_weights_that_change_later_would_not_reach_the_store():
    with pytest.raises(BalancerError, match="filled once, so weights cannot be reloaded"):
        worker("harmoeny").reload_weights()


def test_another_skew_needs_a_server_that_replays():
    found = worker("static")
    assert "routing is the model's own" in found.moe_balancer_replay({"zipf": 1.0})["error"]
    asked = []
    found._replay_as = asked.append
    assert found.moe_balancer_replay({"zipf": 1.0, "seed": 4}) is None
    assert (asked[0].zipf, asked[0].seed) == (1.0, 4)
    assert "`replay` cannot be changed" in found.moe_balancer_replay({"zipf": -1.0})["error"]
