"""A placement map in the settings: what it sets up, and every refusal before weights are loaded."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.engine.arg_utils import EngineArgs

from vllm_balance import maps, plugin
from vllm_balance.errors import BalancerError
from vllm_balance.maps import LayerMap
from vllm_balance.model_shape import from_config, moe_layers
from vllm_balance.seams import announcements
from vllm_balance.seams.deployment import settings_of
from vllm_balance.seams.model_config import read_shape
from vllm_balance.seams.settings_files import initial_placement


@pytest.fixture(autouse=True)
def registered(untouched_vllm):
    plugin.register()


@pytest.fixture
def write(moe_model, tmp_path):
    """Writes a map of the model with 8 experts and 2 layers and returns its path."""

    def run(num_redundant: int = 0, **changes) -> str:
        slots = [[7, 6, 5, 4, 3, 2, 1, 0], [1, 0, 3, 2, 5, 4, 7, 6]]
        fields = {
            "created": datetime(2026, 11, 22, tzinfo=UTC),
            "policy": "gem",
            "sources": {},
            "shape": from_config(Path(moe_model)),
            "num_ranks": 2,
            "layers": [
                LayerMap(index=index, physical_to_logical=row + row[:num_redundant])
                for index, row in enumerate(slots)
            ],
        }
        maps.save(tmp_path / "map.json", maps.PlacementMap(**fields | changes))
        return str(tmp_path / "map.json")

    return run


def configured(model: str, name: str, **settings):
    return EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        max_model_len=64,
        tensor_parallel_size=2,
        enable_expert_parallel=True,
        additional_config={"moe_balancer": {"name": name, **settings}},
    ).create_engine_config()


def placement_of(vllm_config):
    """As a worker reads it."""
    return initial_placement(settings_of(vllm_config), vllm_config)


def refused(model: str, name: str, **settings) -> str:
    with pytest.raises(BalancerError) as raised:
        configured(model, name, **settings)
    text = str(raised.value)
    assert "\n" not in text and text.endswith(".")
    return text


def test_gem_without_redundancy_needs_no_eplb(moe_model, write):
    config = configured(moe_model, "gem", map=write())
    assert not config.parallel_config.enable_eplb
    placement = placement_of(config)
    assert placement.origin == "gem map" and placement.num_physical == 8
    assert placement.slots_P(1).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]


def test_gem_with_redundancy_never_rearranges(moe_model, write):
    config = configured(moe_model, "gem", map=write(num_redundant=4))
    eplb = config.parallel_config.eplb_config
    assert config.parallel_config.enable_eplb and eplb.num_redundant_experts == 4
    assert eplb.step_interval > 2**60


@pytest.mark.parametrize("name", ["eplb", "first_copy", "metro"])
def test_others_start_from_the_map_and_go_on(moe_model, write, name):
    config = configured(moe_model, name, map=write(num_redundant=4))
    eplb = config.parallel_config.eplb_config
    assert (eplb.num_redundant_experts, eplb.step_interval) == (4, 3000)
    assert placement_of(config).slots_P(0).tolist() == [7, 6, 5, 4, 3, 2, 1, 0, 7, 6, 5, 4]


def test_the_path_is_absolute_for_the_workers(moe_model, write, monkeypatch):
    file = Path(write())
    monkeypatch.chdir(file.parent)
    config = configured(moe_model, "gem", map="map.json")
    assert config.additional_config["moe_balancer"]["map"] == str(file.resolve())


def test_a_damaged_or_missing_file(moe_model, write, tmp_path):
    assert "cannot be read" in refused(moe_model, "gem", map=str(tmp_path / "lost.json"))
    file = Path(write())
    content = json.loads(file.read_text())
    content["layers"][0]["physical_to_logical"] = list(range(8))
    file.write_text(json.dumps(content))
    assert "was changed after it was written" in refused(moe_model, "gem", map=str(file))
    file.write_text(file.read_text()[:100])
    assert "no usable placement map" in refused(moe_model, "metro", map=str(file))


def test_another_deployment(moe_model, write):
    shape = from_config(Path(moe_model))
    other = write(shape=shape.model_copy(update={"hidden": 128}))
    assert "hidden 128 instead of 64" in refused(moe_model, "gem", map=other)
    four = write(num_ranks=4)
    assert "4 ranks instead of 2" in refused(moe_model, "gem", map=four)
    one_layer = write(layers=[LayerMap(index=1, physical_to_logical=list(range(8)))])
    assert "no entry for layer 0" in refused(moe_model, "gem", map=one_layer)


@pytest.mark.parametrize("setting", [{"num_redundant_experts": 2}, {"redundancy": 1.25}])
def test_redundancy_that_contradicts_the_map(moe_model, write, setting):
    text = refused(moe_model, "metro", map=write(num_redundant=4), **setting)
    assert "has 12 slots per layer" in text and "make 10" in text
    assert "make 10" in refused(moe_model, "metro", map=write(), **setting)


def test_without_a_map_redundant_experts_have_vllms_own_placement_and_others_none(moe_model):
    assert placement_of(configured(moe_model, "static")) is None
    found = placement_of(configured(moe_model, "metro"))
    assert found.origin == "vLLM's own"
    assert all(found.slots_P(layer).tolist() == [*range(8), 0, 1] for layer in range(2))


class Text:
    num_hidden_layers = 6

    def __init__(self, **fields) -> None:
        vars(self).update(fields)


def test_which_layers_are_moe():
    assert moe_layers(Text()) == (0, 1, 2, 3, 4, 5)
    assert moe_layers(Text(first_k_dense_replace=1)) == (1, 2, 3, 4, 5)
    assert moe_layers(Text(decoder_sparse_step=2, mlp_only_layers=[3])) == (1, 5)
    assert moe_layers(Text(moe_layers=[1, 3])) == (1, 3)


def test_a_model_is_called_alike_by_its_name_and_by_its_folder_in_the_cache(
    moe_model, write, tmp_path, monkeypatch
):
    """Without a network vLLM replaces the name by the folder; a map knows the model by either."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    shutil.copytree(moe_model, repository / "snapshots" / "0123abc")
    said = []
    logger = SimpleNamespace(warning=lambda *line: said.append(line), info=lambda *line: None)
    monkeypatch.setattr("vllm.logger.init_logger", lambda name: logger)
    shape = from_config("org/tiny")
    assert shape.name == "org/tiny"
    config = configured("org/tiny", "gem", map=write(shape=shape))
    assert "snapshots" in config.model_config.model
    assert read_shape(config.model_config) == shape and said == []


def test_a_map_of_another_model_of_the_same_shape_is_warned_about(moe_model, write, monkeypatch):
    said: list[str] = []
    logger = SimpleNamespace(warning=lambda text, *values: said.append(text % values))
    shape = from_config(Path(moe_model))
    monkeypatch.setattr("vllm.logger.init_logger", lambda name: logger)
    vllm_config = SimpleNamespace(model_config=None)
    monkeypatch.setattr(announcements, "read_shape", lambda model_config: shape)
    announcements.warn_of_another_name(maps.load(Path(write())), vllm_config)
    assert said == []
    other = shape.model_copy(update={"name": "coder"})
    announcements.warn_of_another_name(maps.load(Path(write(shape=other))), vllm_config)
    assert len(said) == 1 and f"made for coder, and {shape.name} of the same shape" in said[0]
    monkeypatch.undo()
    assert placement_of(configured(moe_model, "gem", map=write(shape=other)))
