"""Where the files of arms with a placement are kept: never those that other code made."""

import pytest

from bench import placed


@pytest.mark.parametrize(
    ("name", "found"), [("sources", "other code"), ("versions", {"torch": "0"})]
)
def test_other_code_and_other_packages_have_a_folder_of_their_own(monkeypatch, name, found):
    before = placed._folder("0123456789ab")
    assert placed._folder("0123456789ab") == before != placed._folder("ba9876543210")
    monkeypatch.setattr(placed, name, lambda: found)
    assert placed._folder("0123456789ab") != before
