"""Map files: damaged, edited or foreign ones are refused with the reason."""

import hashlib
import json
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from json_places import WRONG, beside, keys, places, put, without

from vllm_balance import maps
from vllm_balance.errors import BalancerError
from vllm_balance.maps import LayerMap, PlacementMap
from vllm_balance.model_shape import ModelShape

SHAPE = ModelShape(
    name="m",
    architecture="Qwen3MoeForCausalLM",
    num_layers=4,
    num_experts=4,
    top_k=2,
    hidden=64,
    inner=32,
    dtype="bfloat16",
)


def placement_map(**changes) -> PlacementMap:
    fields = {
        "created": datetime(2026, 11, 22, tzinfo=UTC),
        "policy": "gem",
        "sources": {"trace": "t.npz"},
        "shape": SHAPE,
        "num_ranks": 2,
        "layers": [
            LayerMap(index=1, physical_to_logical=[0, 2, 3, 1, 0, 0]),
            LayerMap(index=3, physical_to_logical=[0, 1, 2, 3, 3, 2]),
        ],
    }
    return PlacementMap(**fields | changes)


TEXT = placement_map().sealed().model_dump_json(indent=1)


def test_what_is_written_comes_back(tmp_path):
    maps.save(tmp_path / "m.json", placement_map())
    found = maps.load(tmp_path / "m.json")
    assert found == placement_map().sealed()
    assert found.num_physical == 6
    assert found.placement_LP([3, 1]).tolist() == [[0, 1, 2, 3, 3, 2], [0, 2, 3, 1, 0, 0]]
    assert found.placement_LP([1]).dtype == np.int32


@given(st.integers(0, len(TEXT) - 1))
def test_a_truncated_file_is_refused(tmp_path_factory, length):
    file = tmp_path_factory.getbasetemp() / "map.json"
    file.write_text(TEXT[:length])
    with pytest.raises(BalancerError, match="no usable placement map"):
        maps.load(file)


@given(st.integers(0, len(TEXT) - 1), st.characters(codec="utf-8"))
def test_any_changed_character_is_refused_or_changes_nothing(tmp_path_factory, place, new):
    file = tmp_path_factory.getbasetemp() / "map.json"
    file.write_text(TEXT[:place] + new + TEXT[place + 1 :], encoding="utf-8")
    try:
        found = maps.load(file)
    except BalancerError:
        return
    assert found == placement_map().sealed()


def sealed(value) -> str:
    """The text of a map file that says this, with the checksum of what it says."""
    if isinstance(value, dict):
        content = {key: part for key, part in value.items() if key != "checksum"}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        value = content | {"checksum": hashlib.sha256(text.encode()).hexdigest()}
    return json.dumps(value)


def test_the_checksum_of_the_tests_is_that_of_the_files(tmp_path):
    """Otherwise the tests below would meet no other check than that of the checksum."""
    moved = put(json.loads(TEXT), ("layers", 0, "physical_to_logical"), [1, 0, 2, 3, 1, 1])
    (tmp_path / "m.json").write_text(sealed(moved))
    assert maps.load(tmp_path / "m.json").layers[0].physical_to_logical == [1, 0, 2, 3, 1, 1]


PLACES = [path for path in places(json.loads(TEXT)) if path != ("checksum",)]


@given(st.sampled_from(PLACES), st.sampled_from([*WRONG, 0, 1, 3, [0, 1], [0, 1, 2, 3] * 2]))
def test_a_wrong_value_under_a_right_checksum_is_refused_or_meant(tmp_path_factory, path, new):
    """A sealed file is refused with our error, or is again a map with all its promises."""
    file = tmp_path_factory.getbasetemp() / "wrong.json"
    file.write_text(sealed(put(json.loads(TEXT), path, new)))
    try:
        found = maps.load(file)
    except BalancerError:
        return
    assert_promises(found)
    maps.save(file, found)
    assert maps.load(file) == found


def assert_promises(found: PlacementMap) -> None:
    indices = [layer.index for layer in found.layers]
    assert indices == sorted(set(indices)) and indices[0] >= 0
    assert indices[-1] < found.shape.num_layers
    slots_LP = found.placement_LP(indices)
    assert slots_LP.shape == (len(indices), found.num_physical)
    assert found.num_physical % found.num_ranks == 0
    for slots_P in slots_LP.tolist():
        assert sorted(set(slots_P)) == list(range(found.shape.num_experts))


REQUIRED = [
    path
    for path in keys(json.loads(TEXT))
    if path[-1] not in ("kind", "format", "checksum") and path[:-1] != ("sources",)
]
"""`sources` holds any names; the others have values of their own."""


@pytest.mark.parametrize("path", REQUIRED)
def test_a_missing_key_and_an_unknown_key_are_refused(tmp_path, path):
    value, file = json.loads(TEXT), tmp_path / "m.json"
    file.write_text(sealed(without(value, path)))
    with pytest.raises(BalancerError, match="Field required"):
        maps.load(file)
    file.write_text(sealed(beside(value, path, "surprise")))
    with pytest.raises(BalancerError, match="surprise"):
        maps.load(file)


def test_a_map_without_a_checksum_is_refused(tmp_path):
    file = tmp_path / "m.json"
    file.write_text(json.dumps(without(json.loads(TEXT), ("checksum",))))
    with pytest.raises(BalancerError, match="its checksum is empty"):
        maps.load(file)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "bytes.json"
    file.write_bytes(content)
    with pytest.raises(BalancerError, match="no usable placement map"):
        maps.load(file)


def test_deep_nesting_is_refused(tmp_path):
    (tmp_path / "m.json").write_text("[" * 100_000)
    with pytest.raises(BalancerError, match="no usable placement map"):
        maps.load(tmp_path / "m.json")


def test_an_edited_map_is_told_from_a_damaged_one(tmp_path):
    content = json.loads(TEXT)
    content["layers"][0]["physical_to_logical"][:2] = [2, 0]
    (tmp_path / "m.json").write_text(json.dumps(content))
    with pytest.raises(BalancerError, match="was changed after it was written"):
        maps.load(tmp_path / "m.json")


@pytest.mark.parametrize(
    ("slots", "reason"),
    [
        ([0, 1, 2, 2], "every expert"),
        ([0, 1, 2, 4], "every expert"),
        ([0, 1, 2, 3, 3], "multiple of 2 ranks"),
        ([0, 1, 2, -1], "every expert"),
    ],
)
def test_a_layer_that_is_no_placement_is_refused(slots, reason):
    with pytest.raises(ValueError, match=reason):
        placement_map(layers=[LayerMap(index=0, physical_to_logical=slots)])


@pytest.mark.parametrize("indices", [(1, 1), (3, 1), (1, 4)])
def test_layers_twice_out_of_order_or_beyond_the_model_are_refused(indices):
    slots = [0, 1, 2, 3]
    layers = [LayerMap(index=index, physical_to_logical=slots) for index in indices]
    with pytest.raises(ValueError, match="layer"):
        placement_map(layers=layers)


def test_a_map_for_something_else_is_refused_with_all_differences():
    found = placement_map()
    found.require(shape=SHAPE, num_ranks=2, layers=[1, 3])
    with pytest.raises(BalancerError) as error:
        found.require(
            shape=SHAPE.model_copy(update={"architecture": "Mixtral"}), num_ranks=4, layers=[0, 1]
        )
    for part in ("instead of Mixtral", "2 ranks instead of 4", "no entry for layer 0"):
        assert part in str(error.value)


def test_a_map_is_for_every_dtype():
    served = SHAPE.model_copy(update={"dtype": "float32"})
    placement_map().require(shape=served, num_ranks=2, layers=[1, 3])
    with pytest.raises(BalancerError, match=r"not fit: hidden 64 instead of 128\. Make"):
        placement_map().require(
            shape=served.model_copy(update={"hidden": 128}), num_ranks=2, layers=[1, 3]
        )


def test_another_name_is_doubted_and_the_folder_of_a_download_is_not():
    assert placement_map().doubt("m") is None and placement_map().doubt("org/m") is None
    assert "was made for m, and org/n of the same shape" in placement_map().doubt("org/n")
