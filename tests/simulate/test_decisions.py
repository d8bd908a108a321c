"""The simulator asks production's policies, and loses no token on the way."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from cases import planned
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_balance import traces
from vllm_balance.cost import CostModel
from vllm_balance.errors import BalancerError
from vllm_balance.kernels.metro.reference import optimal_activated
from vllm_balance.placement import PLACEMENT, TRACED, Cluster
from vllm_balance.replay import Replay
from vllm_balance.replay_rows import Hot, ReplaySettings, draw
from vllm_balance.routing import FETCHING, ROUTING
from vllm_balance.simulate import Arm, Layout, Load, hardware, models, recorded, skewed
from vllm_balance.simulate.decisions import (
    Decider,
    num_redundant,
    placement_policy,
    placements,
    policy_of,
)
from vllm_balance.simulate.expert_times import measured, roofline
from vllm_balance.simulate.fetches import (
    FetchingDecider,
    fetch_us,
    fetching_policy,
    with_fetches,
)
from vllm_balance.simulate.run import decider_of
from vllm_balance.simulate.traffic import Traffic, spread_layers
from vllm_balance.traces import Trace

MODEL = models.load("qwen3-30b-a3b")
SKEW = ReplaySettings(zipf=0.8, seed=3, rows=512)


TRAFFIC = skewed(SKEW, MODEL, 2)
OTHERS = skewed(SKEW, MODEL, 2, rank=1)
"""Other tokens of the same distributions."""


@cache
def decider(name) -> Decider:
    redundant = 0 if name in ("static", "gem") else num_redundant(128, 8, 1.5)
    history_NLE = TRAFFIC.fresh().history(np.full((8, 2), (64, 0)))
    policy = "eplb" if name == "exflow" else placement_policy(name, redundant)
    return Decider.of(policy_of(name, 1e9), placements(policy, history_NLE, ranks(8, redundant)))


def ranks(number, redundant=0):
    """Ranks that are as fast as each other."""
    cost = CostModel(a_us=0, b_us=1, c_us=0, beta_us=1)
    return Cluster(costs=(cost,) * number, num_redundant=redundant)


def test_traffic_is_what_a_server_replays():
    replay = Replay(SKEW, num_layers=2, num_experts=128, top_k=8)
    ours = TRAFFIC.fresh()
    for num_tokens in (3, 500, 70):
        batch = ours.batch(num_tokens, 0)
        assert torch.equal(batch[0], replay.rows(0, num_tokens))
        assert torch.equal(batch[1], replay.rows(1, num_tokens))


@pytest.mark.parametrize(
    "skew",
    [
        ReplaySettings(zipf=0.8, change_every=2, seed=3, rows=512),
        ReplaySettings(hot=Hot(experts=9, fraction=0.9, ranks=2, further_fractions=(0.3, 0.6)),
                       change_every=1, seed=3, rows=512),
    ],
)  # fmt: skip
def test_traffic_that_changes_is_what_a_server_replays(skew):
    """Of batches that decode, of prompts and of both, from the beginning and again from there."""
    ours = skewed(skew, MODEL, 2)
    for _ in range(2):
        replay = Replay(skew, num_layers=2, num_experts=128, top_k=8)
        for decode, prefill in ((3, 0), (0, 500), (40, 30), (7, 1), (600, 0)):
            batch = ours.batch(decode, prefill)
            assert torch.equal(batch[0], replay.rows(0, decode + prefill))
            assert torch.equal(batch[1], replay.rows(1, decode + prefill))
        ours = ours.fresh()


def test_history_counts_every_pair():
    history_NLE = TRAFFIC.fresh().history(np.array([(64, 0), (0, 64), (30, 4)]))
    assert history_NLE.shape == (3, 2, 128)
    assert history_NLE.sum(2).tolist() == [[512, 512], [512, 512], [272, 272]]


def test_experts_are_placed_by_other_tokens_of_the_same_distribution():
    batches = np.full((8, 2), (64, 0))
    served, placed_by = (made.fresh().history(batches).sum(0) for made in (TRAFFIC, OTHERS))
    assert (served != placed_by).mean() > 0.5
    assert (np.corrcoef(served[0], placed_by[0])[0, 1]) > 0.9


def test_a_trace_serves_its_own_tokens():
    random = np.random.default_rng(0)
    ids_TLK = np.argsort(random.random((90, 3, 128)), axis=2)[..., :8].astype(np.uint8)
    trace = Trace(
        name="t", num_experts=128, top_k=8, layer_index_L=np.arange(3), topk_ids_TLK=ids_TLK,
        request_id_T=np.repeat(np.arange(9), 10), phase_T=np.arange(90) % 2,
    )  # fmt: skip
    made = recorded(trace, MODEL, 5, seed=0, rows=64)
    decoding = {ids.tobytes() for ids in ids_TLK[1::2, 1].astype(np.int32)}
    assert {ids.tobytes() for ids in made.decode_LNK[4]} <= decoding
    prompt = made.prefill_LNK[0, :5]
    assert any((ids_TLK[start : start + 10 : 2, 0] == prompt).all() for start in range(0, 90, 10))


def test_a_few_layers_are_from_all_over_a_trace():
    """One whose early layers ask for the first experts and whose late ones for the last."""
    ids_TLK = np.where(np.arange(40)[:, None] < 20, np.arange(8), 120 + np.arange(8))
    trace = Trace(
        name="t", num_experts=128, top_k=8, layer_index_L=np.arange(40),
        topk_ids_TLK=np.repeat(ids_TLK[None], 16, axis=0).astype(np.uint8),
    )  # fmt: skip
    made = recorded(trace, MODEL, 4, seed=0, rows=8)
    assert made.decode_LNK[:, 0, 0].tolist() == [0, 0, 120, 120]
    assert spread_layers(40, 4).tolist() == [5, 15, 25, 35]
    assert spread_layers(3, 5).tolist() == [0, 1, 2, 0, 1]
    assert spread_layers(4, 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("number", [lambda n: n, lambda n: n * 2**58 - 2**60])
def test_prompts_come_in_the_same_random_order_whatever_numbers_requests_have(number):
    """Expert of layer 0 marks the request of ten tokens."""
    request_T = np.arange(90) // 10
    model = MODEL.with_counts(top_k=1)
    trace = Trace(
        name="t", num_experts=128, top_k=1, layer_index_L=np.arange(1),
        topk_ids_TLK=request_T.astype(np.uint8)[:, None, None], request_id_T=number(request_T),
    )  # fmt: skip
    made = recorded(trace, model, 1, seed=3, rows=90)
    random = np.random.default_rng(3)
    random.choice(np.arange(90), 90)
    expected = np.repeat(random.permutation(np.arange(9)), 10)
    assert made.prefill_LNK[0, :, 0].tolist() == expected.tolist()


def counts_of(steps, phases=None):
    """A trace of counts: which experts are used in each step of each layer, evenly."""
    counts_NLE = np.zeros((len(steps), len(steps[0]), 128), np.int32)
    for step, layers in enumerate(steps):
        for layer, experts in enumerate(layers):
            counts_NLE[step, layer, experts] = 3
    return Trace(
        name="c", num_experts=128, top_k=8, layer_index_L=np.arange(len(steps[0])),
        counts_NLE=counts_NLE, phase_N=None if phases is None else np.array(phases),
    )  # fmt: skip


def test_counts_serve_tokens_of_distinct_experts_of_one_step():
    """Steps use other experts, and layers of a step belong together; the trace has two layers."""
    steps = [[range(0, 9), range(10, 19)], [range(20, 29), range(30, 39)]]
    made = recorded(counts_of(steps), MODEL, 3, seed=0, rows=64)
    assert made.decode_LNK.shape == made.prefill_LNK.shape == (3, 64, 8)
    for rows_LNK in (made.decode_LNK, made.prefill_LNK):
        assert (np.diff(np.sort(rows_LNK, axis=2), axis=2) > 0).all()
        first_N = (rows_LNK[0] < 10).all(1)
        second_N = (rows_LNK[0] >= 20).all(1)
        assert (first_N ^ second_N).all() and first_N.any() and second_N.any()
        assert ((rows_LNK[1] >= 10) & (rows_LNK[1] < 19))[first_N].all()
        assert ((rows_LNK[1] >= 30) & (rows_LNK[1] < 39))[second_N].all()
        assert ((rows_LNK[2] < 9).all(1) == first_N).all()


def test_no_token_of_counts_is_lost():
    trace = counts_of([[range(0, 40)], [range(60, 70)]])
    made = recorded(trace, MODEL, 2, seed=0, rows=64)
    history_NLE = made.history(np.full((5, 2), (100, 0)))
    assert (history_NLE.sum(2) == 800).all()
    assert not history_NLE[:, :, 40:60].any() and not history_NLE[:, :, 70:].any()


def test_counts_of_a_step_serve_tokens_of_its_phase():
    trace = counts_of([[range(0, 9)], [range(20, 29)], [range(40, 49)]], phases=(0, 1, 2))
    made = recorded(trace, MODEL, 1, seed=0, rows=64)
    assert made.prefill_LNK.max() < 9
    assert made.decode_LNK.min() >= 20 and made.decode_LNK.max() < 29


def test_counts_serve_as_many_tokens_of_an_expert_as_replay_does(tmp_path):
    random = np.random.default_rng(0)
    counts_NLE = random.integers(0, 50, (6, 2, 128)).astype(np.int32)
    trace = replace(counts_of([[[], []]]), counts_NLE=counts_NLE)
    traces.save(tmp_path / "c.npz", trace)
    replay = ReplaySettings(trace=tmp_path / "c.npz", rows=4096)
    served, replayed = (
        np.bincount(rows_NK.ravel(), minlength=128) / rows_NK.size
        for rows_NK in (
            recorded(trace, MODEL, 2, seed=0, rows=4096).decode_LNK[1],
            draw(replay, 2, 128, 8, 0)[1].numpy(),
        )
    )
    assert np.abs(served - replayed).max() < 0.0035


def test_a_trace_of_another_model_is_refused():
    other = Trace(name="o", num_experts=4, top_k=1, layer_index_L=np.arange(1),
                  topk_ids_TLK=np.zeros((2, 1, 1), np.uint8))  # fmt: skip
    with pytest.raises(BalancerError, match="4 experts and top-1"):
        recorded(other, MODEL, 1, seed=0)
    deeper = Trace(name="o", num_experts=128, top_k=8, layer_index_L=np.array([0, 60]),
                   topk_ids_TLK=np.zeros((2, 2, 8), np.uint8))  # fmt: skip
    with pytest.raises(BalancerError, match=r"layers up to 60, and .* has 48 layers"):
        recorded(deeper, MODEL, 1, seed=0)


@pytest.mark.parametrize("name", ROUTING)
@settings(max_examples=30)
@given(num_tokens=st.integers(0, 300))
def test_no_token_is_lost(name, num_tokens):
    tokens_LP, fetched = decider(name).slots(TRAFFIC.fresh().batch(num_tokens, 0))
    assert fetched is None
    assert (tokens_LP.sum(1) == 8 * num_tokens).all() and tokens_LP.min() >= 0


@pytest.mark.parametrize("name", FETCHING)
@settings(max_examples=20)
@given(num_tokens=st.integers(0, 2000), knee=st.sampled_from([0.0, 8.0]))
def test_no_token_is_lost_with_fetches(name, num_tokens, knee):
    machine, _ = hardware.load("b200")
    policy = fetching_policy(name, MODEL, machine, knee)
    made = FetchingDecider.of(policy, 2, 128, 8, 3)
    for _ in range(2):
        tokens_LP, fetched_LS = made.slots(TRAFFIC.fresh().batch(num_tokens, 0))
        assert (tokens_LP.sum(1) == 8 * num_tokens).all() and tokens_LP.min() >= 0
        assert fetched_LS.shape == (2, 8) and (fetched_LS <= 3).all()


@pytest.mark.parametrize("name", ["static", "first_copy", "metro"])
def test_routing_and_planning_agree(name):
    made, ids_LTK = decider(name), TRAFFIC.fresh().batch(100, 0)
    tokens_LP, _ = made.slots(ids_LTK)
    for layer, tables in enumerate(made.tables_L):
        placement = tables.placement
        tokens_E = torch.bincount(ids_LTK[layer].flatten(), minlength=128).int()
        split_ER = planned(made.policy, tokens_E, placement)
        planned_P = np.zeros(placement.num_physical, np.int64)
        table_ER = placement.logical_to_physical_ER.numpy()
        np.add.at(planned_P, table_ER[table_ER >= 0], split_ER.numpy()[table_ER >= 0])
        assert np.array_equal(planned_P, tokens_LP[layer])


def test_metro_activates_as_few_as_is_possible():
    made, ids_LTK = decider("metro"), TRAFFIC.fresh().batch(20, 0)
    tokens_LP, _ = made.slots(ids_LTK)
    for layer, tables in enumerate(made.tables_L):
        tokens_E = np.bincount(ids_LTK[layer].numpy().ravel(), minlength=128)
        least = optimal_activated(
            tokens_E, tables.logical_to_physical_ER.numpy(), tables.num_replicas_E.numpy(), 8, 192
        )
        assert (tokens_LP[layer].reshape(8, -1) > 0).sum(1).max() == least


@pytest.mark.parametrize(("name", "gives"), [("cpu-avx512", True), ("b200", False)])
def test_metro_weighs_tokens_where_experts_run_in_turn(name, gives):
    machine, profile = hardware.load(name)
    load = Load(concurrency=1, prompt_tokens=1, output_tokens=1, token_budget=9, max_steps=1)
    arm = Arm(
        model=MODEL,
        hardware=machine,
        profile=profile,
        layout=Layout(data=2),
        load=load,
        balancer="metro",
        redundancy=1.5,
    )
    policy = decider_of(arm, TRAFFIC.fresh()).policy
    assert (policy.free_tokens is not None) == gives


@pytest.mark.parametrize("policy", ["eplb", "gem", "gem_r"])
@pytest.mark.parametrize("kind", ["stable", "quicksort", "heapsort"])
def test_experts_of_equal_loads_are_placed_alike_whatever_the_sort_does(kind, policy, monkeypatch):
    """Many equal loads, a third of them zero, and loads that are equal once they are split."""
    random = np.random.default_rng(0)
    history_NLE = random.choice([0, 8, 16, 24], (1, 3, 64))
    expected = slots_of(policy, history_NLE)
    argsort = np.argsort

    def backwards(values, axis=-1, **asked):
        """As good as any for those who do not ask for a stable one: equals in reverse."""
        if asked.get("kind") == "stable":
            return argsort(values, axis, kind="stable")
        return values.shape[axis] - 1 - argsort(np.flip(values, axis), axis, kind=kind)

    monkeypatch.setattr(np, "argsort", backwards)
    assert slots_of(policy, history_NLE) == expected


def slots_of(policy, history_NLE):
    """Experts of the slots of each layer on 8 ranks, with 32 redundant ones where that can be."""
    layers = placements(policy, history_NLE, ranks(8, 0 if policy == "gem" else 32))
    return [layer.physical_to_logical_P.tolist() for layer in layers]


def test_placements_are_those_of_vllm_where_no_loads_are_equal():
    history_NLE = np.random.default_rng(1).permutation(3 * 64).reshape(1, 3, 64) * 1009 + 10**6
    expected = PLACEMENT["eplb"]().place(history_NLE, ranks(8, 32))
    assert slots_of("eplb", history_NLE) == expected.tolist()


def test_groups_of_experts_stay_on_a_node_as_vllms_eplb_keeps_them():
    """8 groups of 32 experts on two nodes of 8 ranks, four groups and half of the copies each."""
    deepseek = models.load("deepseek-v3")
    layout = Layout(data=16)
    arm = replace(arm_of("eplb", 1.25), model=deepseek, layout=layout,
                  hardware=hardware.load("b200")[0])  # fmt: skip
    traffic = skewed(ReplaySettings(zipf=0.8, rows=2048), deepseek, 1)
    (tables,) = decider_of(arm, traffic.fresh()).tables_L
    slots_ER = tables.logical_to_physical_ER.numpy()
    node_ER = np.where(slots_ER >= 0, slots_ER // (tables.num_physical // 2), -1)
    nodes_G = [set(node_ER[32 * group : 32 * group + 32].ravel()) - {-1} for group in range(8)]
    assert all(len(nodes) == 1 for nodes in nodes_G)
    assert sum(0 in nodes for nodes in nodes_G) == 4
    one = replace(arm, layout=replace(layout, ranks_per_node=16))
    (alone,) = decider_of(one, traffic.fresh()).tables_L
    assert alone.logical_to_physical_ER.tolist() != slots_ER.tolist()


def arm_of(balancer, redundancy=1.0, **load):
    asked = {"concurrency": 64, "prompt_tokens": 1, "output_tokens": 64, "token_budget": 8192,
             "max_steps": 16}  # fmt: skip
    return Arm(
        model=MODEL, hardware=hardware.load("h100")[0], layout=Layout(data=8),
        balancer=balancer, redundancy=redundancy, load=Load(**{**asked, **load}),
    )  # fmt: skip


@pytest.mark.parametrize(("balancer", "redundancy"), [("gem", 1.0), ("eplb", 1.0), ("gem", 1.25)])
def test_placements_alone_relieve_the_worst_rank(balancer, redundancy):
    """In prefill: without copies by vLLM's and by ours, and with copies by ours."""
    prompts = {"prompt_tokens": 512, "output_tokens": 1}
    own = decider_of(arm_of(balancer, redundancy, **prompts), OTHERS.fresh())
    linear = decider_of(arm_of("static"), OTHERS.fresh())
    assert own.tables_L[0].num_physical == round(128 * redundancy)
    ours, others = (
        decides.slots(TRAFFIC.fresh().batch(0, 4096))[0].reshape(2, 8, -1).sum(2).max(1).sum()
        for decides in (own, linear)
    )
    assert ours < 0.8 * others


def test_gem_places_by_batches_as_large_as_the_steps_of_the_load():
    seen = {}

    class Counting(Traffic):
        def history(self, tokens_N2):
            seen["tokens"] = tokens_N2
            return super().history(tokens_N2)

    traffic = Counting(name="t", num_experts=128, decode_LNK=TRAFFIC.decode_LNK,
                       prefill_LNK=TRAFFIC.prefill_LNK)  # fmt: skip
    decider_of(arm_of("eplb"), traffic)
    assert (seen["tokens"] == (252, 4)).all()
    decider_of(arm_of("gem"), traffic)
    assert seen["tokens"].sum(1).mean() == pytest.approx(64, rel=0.1)
    decider_of(arm_of("gem", prompt_tokens=1024, output_tokens=1), traffic)
    assert not seen["tokens"][:, 0].any() and (seen["tokens"][:, 1] == 4096).all()


def test_exflow_is_placed_by_its_policy_on_the_tokens_of_a_trace():
    noise = np.random.default_rng(1).random((500, 2, 128))
    known = Trace(name="t", num_experts=128, top_k=8, layer_index_L=np.arange(2),
                  topk_ids_TLK=np.argsort(noise, axis=2)[..., :8])  # fmt: skip
    slots_LP = TRACED["exflow"]().place_trace(known, ranks(8))
    decides = decider_of(replace(arm_of("exflow"), known_trace=known), TRAFFIC.fresh())
    for tables, slots_P in zip(decides.tables_L, slots_LP, strict=True):
        assert tables.logical_to_physical_ER[:, 0].tolist() == np.argsort(slots_P).tolist()
    with pytest.raises(BalancerError, match="exflow places experts by the tokens of a trace"):
        decider_of(arm_of("exflow"), TRAFFIC.fresh())


def test_ranks_of_a_profile_have_curves_of_their_own():
    _, profile = hardware.load("cpu-avx512")
    times = measured(profile)
    curves = times.curves(3)
    assert curves[0] == curves[2] and len(profile.ranks) == 2
    for rank, curve in enumerate(curves[:2]):
        tokens_E = np.full(32, 64, np.int32)
        per_rank = np.concatenate([np.zeros(32, np.int32)] * rank + [tokens_E])
        time_us = times.of(per_rank[None], rank + 1)[0][0, rank]
        assert curve.of_experts(tokens_E) == pytest.approx(time_us, rel=0.25)


@pytest.mark.parametrize("machine", ["h100", "cpu-avx512"])
def test_a_curve_has_the_knee_and_the_times_that_it_is_of(machine):
    times = roofline(MODEL, hardware.load(machine)[0])
    (curve, _) = times.curves(2)
    assert curve.knee_tokens == pytest.approx(times.knee_tokens)
    for experts, tokens in ((1, 1), (40, 1), (16, 512)):
        tokens_E = np.full(experts, tokens, np.int32)
        time_us = times.of(tokens_E[None], 1)[0].item()
        assert curve.of_experts(tokens_E) == pytest.approx(time_us, rel=0.25)


def test_redundancy_is_rounded_up_to_full_ranks():
    assert num_redundant(128, 8, 1.5) == 64
    assert num_redundant(128, 6, 1.0) == 4
    assert num_redundant(60, 8, 1.25) == 20


def test_an_unknown_balancer_is_refused():
    with pytest.raises(BalancerError, match="static, eplb"):
        policy_of("fair", 4)


def test_fetches_of_gpus_hide_behind_experts_that_are_there_until_they_are_longer():
    time_LS, activated_LS = np.array([[100.0, 100.0, 100.0]]), np.array([[10, 10, 10]])
    made = with_fetches(time_LS, activated_LS, np.array([[0, 1, 3]]), 40.0, hidden=True)
    assert made.tolist() == [[100.0, 100.0, 3 * 40.0 + 3 * 10.0]]


def test_fetches_of_cpus_take_a_ranks_own_time():
    time_LS, activated_LS = np.array([[100.0, 50.0]]), np.array([[10, 0]])
    made = with_fetches(time_LS, activated_LS, np.array([[0, 3]]), 40.0)
    assert made.tolist() == [[100.0, 50.0 + 3 * 40.0]]


@pytest.mark.parametrize("name", ["cpu-avx512", "b200"])
@pytest.mark.parametrize("hidden", [False, True])
def test_the_schedule_counts_a_copy_that_nothing_hides(name, hidden):
    machine, _ = hardware.load(name)
    rules = fetching_policy("harmoeny", MODEL, machine, 4.0, hidden=hidden).rules
    assert rules.threshold_tokens > 1 and rules.knee_tokens == 4.0
    assert rules.fetch_tokens == (0 if hidden else rules.threshold_tokens)


def test_a_fetch_takes_the_host_link():
    machine, _ = hardware.load("v100-dgx1")
    switch = models.load("switch-128")
    assert fetch_us(switch, machine) == pytest.approx(10 + 18.87e6 / 13e3, rel=1e-3)
    with pytest.raises(BalancerError, match="no host link"):
        fetch_us(switch, machine.model_copy(update={"host": None}))


def test_heavy_skew_is_scheduled_away():
    """alpha 0.9 to one of 128 experts on 8 ranks: one rank has 0.9 + 0.0125 of the pairs."""
    switch, (machine, _) = models.load("switch-128"), hardware.load("v100-dgx1")
    hot = skewed(ReplaySettings(hot=Hot(experts=1, fraction=0.9), seed=1), switch, 1)
    even = FetchingDecider.of(fetching_policy("harmoeny_paper", switch, machine, 8.0), 1, 128, 8, 4)
    tokens_LP, fetched_LS = even.slots(hot.batch(65536, 0))
    pairs_S = tokens_LP.reshape(8, -1).sum(1)
    assert pairs_S.max() < 1.05 * pairs_S.mean()
    assert fetched_LS.sum() >= 7
