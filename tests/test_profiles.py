"""Profile files: what was written comes back, and nothing else is believed."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from json_places import WRONG, beside, keys, places, put, without

from vllm_balance import documents, profiles
from vllm_balance.cost import CostModel, Fit, free_of, knee_of
from vllm_balance.errors import BalancerError
from vllm_balance.model_shape import ModelShape
from vllm_balance.placement import Cluster
from vllm_balance.placement.gem import coefficients
from vllm_balance.profiles import Curve, Point, Profile, RankProfile, Units

SHAPE = ModelShape(
    name="m",
    architecture="Qwen3MoeForCausalLM",
    num_layers=4,
    num_experts=8,
    top_k=2,
    hidden=64,
    inner=32,
    dtype="bfloat16",
)
VERSIONS = {"vllm": "0.32.0", "torch": "2.13.0"}
IN_TURN = CostModel(
    a_us=1, b_us=2, c_us=0, beta_us=0, tile_us=4, tile_tokens=1, free_tokens=2, in_turn=True
)
"""The form that the profile of a CPU has."""


def profile(num_ranks: int = 2) -> Profile:
    fit = Fit(
        model=IN_TURN,
        residual_us_N=(0.5,),
        r2=0.9,
        median_relative_error=0.01,
    )
    ranks = [
        RankProfile(
            rank=rank,
            place=f"core {rank}",
            curve=Curve.of(fit),
            points=[Point(tokens_E=[1, 2], time_us=9.5, repeats=3, rounds_us=[9.5, 9.9])],
        )
        for rank in range(num_ranks)
    ]
    return Profile(
        units=Units(),
        created=datetime(2026, 11, 22, tzinfo=UTC),
        device="cpu, vec",
        versions=VERSIONS,
        shape=SHAPE,
        ranks=ranks,
        alone=[Point(tokens_E=[1, 2], time_us=7.6, repeats=3)],
    )


TEXT = profile().model_dump_json(indent=1)


def test_a_disk_that_is_full_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    documents.write(tmp_path / "p.json", profile())
    before = (tmp_path / "p.json").read_bytes()

    def full(self, mode):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "chmod", full)
    with pytest.raises(BalancerError, match="No space left"):
        documents.write_text(tmp_path / "p.json", "other")
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    assert (tmp_path / "p.json").read_bytes() == before


def test_what_is_written_comes_back(tmp_path):
    documents.write(tmp_path / "p.json", profile())
    found = profiles.load(tmp_path / "p.json")
    assert found == profile()
    assert found.costs == (IN_TURN,) * 2
    assert found.contention == {1.5: pytest.approx(1.25)}
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]


def test_a_file_from_before_it_said_so_has_tiles_of_one_token_in_turn(tmp_path):
    content = json.loads(TEXT)
    for rank in content["ranks"]:
        del rank["curve"]["in_turn"]
    content["ranks"][1]["curve"]["tile_tokens"] = 16
    (tmp_path / "p.json").write_text(json.dumps(content))
    assert [cost.in_turn for cost in profiles.load(tmp_path / "p.json").costs] == [True, False]


def test_a_file_from_before_a_rank_was_measured_alone_says_nothing_of_it(tmp_path):
    content = json.loads(TEXT)
    del content["alone"]
    (tmp_path / "p.json").write_text(json.dumps(content))
    assert profiles.load(tmp_path / "p.json").contention == {}


def test_a_batch_that_was_measured_alone_only_is_refused(tmp_path):
    content = json.loads(TEXT)
    content["alone"][0]["tokens_E"] = [3]
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(BalancerError, match="alone must have batches that the ranks have points"):
        profiles.load(tmp_path / "p.json")


@given(st.integers(0, len(TEXT.rstrip()) - 1))
def test_a_truncated_file_is_refused(tmp_path_factory, length):
    file = tmp_path_factory.getbasetemp() / "truncated.json"
    file.write_text(TEXT[:length])
    with pytest.raises(BalancerError, match="no usable profile"):
        profiles.load(file)


TILE = ("ranks", 0, "curve", "tile_tokens")
FREE = ("ranks", 1, "curve", "free_tokens")


@given(
    st.sampled_from(list(places(json.loads(TEXT)))),
    st.sampled_from([*WRONG, 0, 1, 2**31, 2**31 + 1]),
)
@example(TILE, 10**400)
@example(TILE, 2**31)
@example(FREE, 10**400)
@example(FREE, 2**31)
@example(("ranks", 0, "points", 0, "rounds_us", 1), 0)
@example(("ranks", 0, "points", 0, "rounds_us", 1), -1)
def test_a_wrong_value_anywhere_is_refused_or_meant(tmp_path_factory, path, new):
    """A changed file is refused with our error, or is again a profile with all its promises."""
    file = tmp_path_factory.getbasetemp() / "wrong.json"
    file.write_text(json.dumps(put(json.loads(TEXT), path, new)))
    try:
        found = profiles.load(file)
    except BalancerError:
        return
    assert_usable(found)
    assert profiles.load(file).model_dump_json() == found.model_dump_json()
    assert {rank.rank for rank in found.ranks} == {0, 1}


def assert_usable(found: Profile) -> None:
    """What placements, METRO and HarMoEny do with a profile."""
    counts_E = np.array([0, 1, 2, 3, 100])
    for cost in found.costs:
        assert cost.knee_tokens >= 0 and math.isfinite(cost.token_us)
        assert math.isfinite(cost.of_experts(counts_E))
        assert (cost.further(counts_E) >= 0).all() and cost.slowed(1.5).free == cost.free
    assert np.isfinite(coefficients(Cluster(costs=found.costs))).all()
    assert knee_of(found.costs) > 0 and (free_of(found.costs) or 0) >= 0
    assert all(time_us > 0 for rank in found.ranks for p in rank.points for time_us in p.rounds_us)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "bytes.json"
    file.write_bytes(content)
    with pytest.raises(BalancerError):
        profiles.load(file)


LATER = ("cores_per_rank", "rounds_us", "in_turn", "alone")
"""Not in older files, which are of one core and one round and of busy ranks; tiles of one token are
in turn there."""
REQUIRED = [
    path
    for path in keys(json.loads(TEXT))
    if path[-1] not in ("kind", "format", *LATER) and path[:-1] not in (("versions",), ("units",))
]
"""`versions` holds any names; the others have values of their own."""


def test_an_older_file_is_of_one_core_and_one_round(tmp_path):
    value, file = json.loads(TEXT), tmp_path / "p.json"
    del value["cores_per_rank"]
    for rank in value["ranks"]:
        for point in rank["points"]:
            del point["rounds_us"]
    file.write_text(json.dumps(value))
    found = profiles.load(file)
    assert found.cores_per_rank == 1 and found.costs == profile().costs
    assert all(point.rounds_us == [] for rank in found.ranks for point in rank.points)


@pytest.mark.parametrize("path", REQUIRED)
def test_a_missing_key_and_an_unknown_key_are_refused(tmp_path, path):
    value, file = json.loads(TEXT), tmp_path / "p.json"
    file.write_text(json.dumps(without(value, path)))
    with pytest.raises(BalancerError, match="Field required"):
        profiles.load(file)
    file.write_text(json.dumps(beside(value, path, "surprise")))
    with pytest.raises(BalancerError, match="surprise"):
        profiles.load(file)


def test_deep_nesting_is_refused(tmp_path):
    (tmp_path / "p.json").write_text("[" * 100_000)
    with pytest.raises(BalancerError):
        profiles.load(tmp_path / "p.json")


def test_a_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(BalancerError, match=r"no\.json cannot be read"):
        profiles.load(tmp_path / "no.json")
    with pytest.raises(BalancerError, match="cannot be written"):
        documents.write(tmp_path / "no" / "p.json", profile())


def test_a_foreign_profile_is_refused_with_all_differences():
    found = profile()
    found.require(shape=SHAPE, device="cpu, vec", versions=VERSIONS)
    found.require(shape=SHAPE.model_copy(update={"name": "another folder"}))
    with pytest.raises(BalancerError) as error:
        found.require(
            shape=SHAPE.model_copy(update={"hidden": 128}),
            device="cpu, amx",
            versions={"vllm": "0.33.0", "torch": "2.13.0"},
        )
    for part in ("hidden 64 instead of 128", "'cpu, vec' instead", "vllm 0.32.0 instead of 0.33.0"):
        assert part in str(error.value)
    assert "torch" not in str(error.value)


def test_one_rank_stands_for_all_but_two_do_not_stand_for_three():
    assert len(profile(1).costs_of(8)) == 8
    assert len(profile(2).costs_of(2)) == 2
    with pytest.raises(BalancerError, match="3 ranks"):
        profile(2).costs_of(3)
