"""Settings: the flag, the file, JSON and additional_config, and each mistake a user makes there."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_balance.config import BALANCERS, FETCHES, BalancerConfig, parse, read
from vllm_balance.errors import BalancerError

VALID = {
    "name": "metro",
    "redundancy": 1.5,
    "window_size": 10,
    "step_interval": 20,
    "knee_tokens": 7.5,
    "free_tokens": 2.0,
    "exchange": "all_reduce",
}
TOML = "\n".join(f"{key} = {json.dumps(value)}" for key, value in VALID.items())


def message(call, *args) -> str:
    """The one paragraph of the BalancerError that `call` raises."""
    with pytest.raises(BalancerError) as raised:
        call(*args)
    text = str(raised.value)
    assert "\n" not in text and text.endswith(".")
    return text


@pytest.mark.parametrize("name", BALANCERS)
def test_a_name_is_enough(name):
    assert parse(name) == parse({"name": name}) == BalancerConfig(name=name)
    assert read(name, None) == {"name": name}


@pytest.mark.parametrize("suffix", [".toml", ".json", "inline"])
@pytest.mark.parametrize("flag", [None, "metro"])
def test_file_json_and_flag_mean_the_same(tmp_path, suffix, flag):
    if suffix == "inline":
        source = "  " + json.dumps(VALID)
    else:
        file = tmp_path / f"balancer{suffix}"
        file.write_text(TOML if suffix == ".toml" else json.dumps(VALID))
        source = str(file)
    assert read(flag, source) == VALID
    assert parse(read(flag, source)) == BalancerConfig(**VALID)


def test_the_flag_names_the_balancer_of_a_file_without_name():
    assert read("eplb", '{"redundancy": 2.0}') == {"name": "eplb", "redundancy": 2.0}


def test_replay_settings_survive_the_way_to_the_workers():
    settings = read("static", '{"replay": {"zipf": 0.8, "seed": 3}}')
    assert json.loads(json.dumps(settings)) == settings
    assert parse(settings).replay.zipf == 0.8


@given(
    st.sampled_from(BALANCERS),
    st.sampled_from(range(8)),
    st.sampled_from(["drop", "double", "swap", "upper"]),
)
def test_a_mistyped_balancer_gets_the_nearest_name(name, position, mistake):
    at = position % (len(name) - 1)
    typed = {
        "drop": name[:at] + name[at + 1 :],
        "double": name[:at] + name[at] + name[at:],
        "swap": name[:at] + name[at + 1] + name[at] + name[at + 2 :],
        "upper": name.upper(),
    }[mistake]
    if typed in BALANCERS:
        return
    text = message(parse, typed)
    assert f"Unknown balancer {typed!r}. Did you mean {name!r}?" in text
    assert all(allowed in text for allowed in BALANCERS)


def test_a_balancer_like_no_other_gets_the_list():
    text = message(parse, "zzz")
    assert "Did you mean" not in text
    assert f"Allowed: {', '.join(BALANCERS)}" in text


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("redundency", "redundancy"),
        ("num_redundant_expert", "num_redundant_experts"),
        ("knee", "knee_tokens"),
        ("window", "window_size"),
    ],
)
def test_an_unknown_key_gets_the_nearest_key(key, nearest):
    text = message(parse, {"name": "metro", key: 1})
    assert f"Unknown key {key!r}. Did you mean {nearest!r}?" in text


def test_a_recording_implies_static_and_meets_its_other_settings():
    assert read(None, None, "t.npz") == {"name": "static", "record": {"file": "t.npz"}}
    settings = read("metro", '{"record": {"what": "ids", "max_bytes": 65536}}', "t.npz")
    record = {"file": "t.npz", "what": "ids", "max_bytes": 65536}
    assert settings == {"name": "metro", "record": record}
    assert read(None, '{"name": "eplb"}', "t.npz")["name"] == "eplb"


def test_a_recording_of_two_files_or_with_wrong_settings():
    other = '{"record": {"file": "other.npz"}}'
    assert "Name one file" in message(read, "metro", other, "t.npz")
    assert "Name one file" in message(read, "metro", '{"record": "other.npz"}', "t.npz")
    text = message(parse, {"name": "metro", "record": {"file": "t.npz", "wat": "ids"}})
    assert "Unknown key 'record.wat'. Did you mean 'record.what'?" in text


def test_an_unknown_key_of_the_replay_gets_the_nearest_of_its_keys():
    text = message(parse, {"name": "metro", "replay": {"zipff": 1.0}})
    assert "Unknown key 'replay.zipff'. Did you mean 'replay.zipf'?" in text


def test_an_unknown_key_of_a_table_in_a_table_gets_the_nearest_of_its_keys():
    settings = {"hot": {"expert": 1, "fraction": 0.5}}
    text = message(parse, {"name": "metro", "replay": settings})
    assert "Unknown key 'replay.hot.expert'. Did you mean 'replay.hot.experts'?" in text
    assert "Allowed: replay.hot.experts, replay.hot.fraction, replay.hot.ranks, replay" in text


def test_all_wrong_values_are_named_at_once():
    text = message(parse, {"name": "eplb", "redundancy": 0.5, "window_size": "x", "knees": 1})
    assert "`redundancy` is 0.5" in text
    assert "`window_size` is 'x'" in text
    assert "'knees'" in text


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (5, "given as int"),
        (None, "given as NoneType"),
        ({}, "name no balancer"),
        ({"redundancy": 1.5}, "name no balancer"),
        ({"name": None}, "Unknown balancer 'None'"),
        ({"name": ["metro"]}, "Unknown balancer"),
        ({"name": "metro", "num_redundant_experts": -1}, "`num_redundant_experts` is -1"),
        ({"name": "metro", "knee_tokens": 0}, "`knee_tokens` is 0"),
        (
            {"name": "metro", "free_tokens": 2},
            "`free_tokens` is 2: it needs `knee_tokens` beside it; omit both for the defaults.",
        ),
        *(
            ({"name": name, "knee_tokens": 40, "free_tokens": 20}, "decides by `knee_tokens` and")
            for name in FETCHES
        ),
        ({"name": "metro", "exchange": "sometimes"}, "`exchange` is 'sometimes'"),
        ({"name": "metro", "replay": {}}, "exactly one of zipf, hot and trace"),
    ],
)
def test_wrong_settings(settings, part):
    assert part in message(parse, settings)


def test_a_missing_file_says_where_it_was_looked_for(tmp_path):
    text = message(read, "metro", str(tmp_path / "balancer.toml"))
    assert f"{str(tmp_path / 'balancer.toml')!r}, which is not a file" in text
    assert f"looked in {tmp_path}" in text
    assert "is not a file" in message(read, "metro", str(tmp_path))


@pytest.mark.parametrize("line", [1, 3])
def test_malformed_toml_names_file_and_line(tmp_path, line):
    file = tmp_path / "balancer.toml"
    file.write_text("\n" * (line - 1) + "redundancy = = 1.5\n")
    text = message(read, "metro", str(file))
    assert f"{file} is not valid TOML" in text
    assert f"at line {line}," in text


@pytest.mark.parametrize("line", [1, 4])
def test_malformed_json_names_file_and_line(tmp_path, line):
    file = tmp_path / "balancer.json"
    content = "{" + "\n" * (line - 1) + '"redundancy": nothing}'
    file.write_text(content)
    text = message(read, "metro", str(file))
    assert f"{file} is not valid JSON" in text
    assert f"at line {line}," in text
    assert f"at line {line}," in message(read, "metro", content)


def test_a_file_that_is_no_text_is_an_error_of_the_user(tmp_path):
    for name in ("balancer.toml", "balancer.json"):
        file = tmp_path / name
        file.write_bytes(b"\xff\xfe\x00name")
        assert str(file) in message(read, "metro", str(file))


def test_a_file_that_may_not_be_read_is_an_error_of_the_user(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    file = tmp_path / "balancer.toml"
    file.write_text(TOML)
    for method in ("read_text", "is_file"):
        with monkeypatch.context() as patch:
            patch.setattr(type(file), method, refuse)
            text = message(read, "metro", str(file))
        assert f"{str(file)!r}, which cannot be read: Permission denied" in text


def test_json_that_is_no_object(tmp_path):
    file = tmp_path / "balancer.json"
    file.write_text("[1]")
    assert "holds a JSON list; an object is needed" in message(read, "metro", str(file))


@pytest.mark.parametrize("what", ["placement map", "profile"])
def test_a_map_or_a_profile_is_no_settings(tmp_path, what):
    file = tmp_path / "made.json"
    file.write_text(json.dumps({"kind": f"vllm-balance {what}", "format": 1, "layers": []}))
    text = message(read, "gem", str(file))
    assert f"is a {what} and no settings" in text
    assert f'{{"{what.split()[-1]}": "{file}"}}' in text and "Unknown key" not in text


def test_a_folder_of_a_user_that_is_not_there():
    assert "a user that this machine does not have" in message(read, "gem", "~nobody-of-us/x.toml")


def test_flag_and_file_that_name_different_balancers():
    text = message(read, "metro", '{"name": "eplb"}')
    assert "'metro'" in text and "'eplb'" in text and "Name one balancer" in text


ON_MAPS = [{"name": name, "map": "m.json"} for name in ("gem", "exflow")]


@pytest.mark.parametrize(
    ("settings", "stays", "moves"),
    [
        *(({"name": name}, False, True) for name in ("eplb", "first_copy", "metro")),
        *(({"name": name}, True, False) for name in ("static", *FETCHES)),
        *((settings, True, False) for settings in ON_MAPS),
        *((settings | {"redundancy": 1.5}, True, False) for settings in ON_MAPS),
        ({"name": "gem", "online": {}}, True, True),
    ],
    ids=str,
)
def test_who_moves_experts(settings, stays, moves):
    """vLLM's EPLB, `online` or nobody; experts in dynamic slots are copies of those that stay."""
    config = BalancerConfig(**settings)
    assert (config.stays, config.moves) == (stays, moves)
