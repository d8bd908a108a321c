"""Errors that `plan` shows: of the rows of each kind, written into configs/validity.toml."""

from bench import validation
from vllm_balance import documents
from vllm_balance.simulate.validity import Validity


def rows(kind, errors, **more):
    return [{"kind": kind, "error": error, **more} for error in errors]


POINTS = [
    *rows("pair", [0.01, -0.03, 0.02]),
    *rows("published ratio", [0.1] * 9 + [-0.5]),
    *rows("published", [9.0]),
    *rows("measured", [9.0]),
]


def test_errors_are_of_one_kind():
    assert validation.errors(POINTS, "pair") == {"points": 3, "mean": 0.02, "one_in_ten": 0.03}
    found = validation.errors(POINTS, "published ratio")
    assert found == {"points": 10, "mean": 0.14, "one_in_ten": 0.1}


def test_points_that_older_code_predicted_are_not_in_the_band():
    points = [*POINTS, *rows("pair", [5.0], kept=True)]
    assert validation.errors(points, "pair") == validation.errors(POINTS, "pair")


def test_numbers_are_written_where_they_belong_and_nothing_else(tmp_path, monkeypatch):
    before = validation.VALIDITY.read_text()
    path = tmp_path / "validity.toml"
    path.write_text(before)
    monkeypatch.setattr(validation, "VALIDITY", path)
    validation.write_validity(POINTS)
    made = documents.read_toml(path, Validity, "validity file")
    assert (made.profiled.points.value, made.profiled.mean.value) == (3, 0.02)
    assert (made.roofline.points.value, made.roofline.one_in_ten.value) == (10, 0.1)
    lines = [(old, new) for old, new in
             zip(before.splitlines(), path.read_text().splitlines(), strict=True)]  # fmt: skip
    assert {new.partition(" ")[0] for old, new in lines if old != new} <= {
        "points", "mean", "one_in_ten"
    }  # fmt: skip
