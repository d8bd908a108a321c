"""Files of arms with a placement: never those of other code, and rows say of which routing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import typer
from tiny_model import CONFIG

from bench import placed
from vllm_balance import traces
from vllm_balance.traces import Trace

PLACED = {"seed": 1, "place": {}, "replay": {"trace": "t.npz"}}


@pytest.mark.parametrize(
    ("name", "found"), [("sources", "other code"), ("versions", {"torch": "0"})]
)
def test_other_code_and_other_packages_have_a_folder_of_their_own(monkeypatch, name, found):
    before = placed._folder("0123456789ab")
    assert placed._folder("0123456789ab") == before != placed._folder("ba9876543210")
    monkeypatch.setattr(placed, name, lambda: found)
    assert placed._folder("0123456789ab") != before


def trace(seed: int) -> Trace:
    noise = np.random.default_rng(seed).random((160, 4, 8))
    return Trace(
        name="t",
        num_experts=8,
        top_k=2,
        layer_index_L=np.arange(4),
        topk_ids_TLK=np.argsort(noise, axis=2)[..., :2].astype(np.uint8),
        request_id_T=np.repeat(np.arange(16), 10),
    )


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.fixture
def kept(tmp_path):
    """Puts a trace into a folder as t.npz and returns the folder."""

    def run(name: str, recorded: Trace):
        (tmp_path / name).mkdir()
        traces.save(tmp_path / name / "t.npz", recorded)
        return tmp_path / name

    return run


def test_traffic_is_what_a_trace_holds_and_not_its_name(model, kept):
    first, same, other = kept("a", trace(0)), kept("b", trace(0)), kept("c", trace(1))
    found = placed.traffic(PLACED, model, first)
    assert len(found) == 12
    assert found == placed.traffic(PLACED, model, same)
    assert found != placed.traffic(PLACED, model, other)


def test_traffic_is_what_is_cut_out_of_a_trace(model, kept):
    """Two of four layers are taken, the second and the last; a seed draws the halves."""
    ids_TLK = trace(0).topk_ids_TLK
    unused_TLK, used_TLK = ids_TLK.copy(), ids_TLK.copy()
    unused_TLK[:, [0, 2]], used_TLK[:, 1] = [0, 1], [0, 1]
    unused = kept("unused", replace(trace(0), topk_ids_TLK=unused_TLK))
    used = kept("used", replace(trace(0), topk_ids_TLK=used_TLK))
    found = placed.traffic(PLACED, model, kept("a", trace(0)))
    assert found == placed.traffic(PLACED, model, unused)
    assert found != placed.traffic(PLACED, model, used)
    assert found != placed.traffic(PLACED | {"seed": 2}, model, unused)


def test_the_demo_model_s_trace_is_traffic_too(model, kept, monkeypatch):
    settings = {"replay": {"zipf": 1.0}, "cases": {"recorded": {"replay": {"trace": "demo"}}}}
    digests = []
    for name, seed in (("a", 0), ("b", 1)):
        file = kept(name, trace(seed)) / "t.npz"
        monkeypatch.setattr(placed.demo_trace, "ensure", lambda file=file: file)
        digests += [placed.traffic(settings, model, None), placed.traffic(PLACED | {
            "replay": {"trace": "demo"}}, model, None)]  # fmt: skip
    assert len(set(digests)) == 4


def test_a_seed_s_routing_is_part_of_the_settings_and_a_trace_needs_its_folder(model):
    assert placed.traffic({"replay": {"zipf": 0.8}, "loads": {"a": {}}}, model, None) == ""
    with pytest.raises(typer.BadParameter, match="--traces"):
        placed.traffic(PLACED, model, None)
