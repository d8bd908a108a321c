"""The flags through vLLM's own parser and EngineArgs: what they set up, and every refusal.

A refusal is one paragraph on stderr and exit status 2, before a weight is read: the models here
are configurations without weights.
"""

import json
import logging
import pickle
import sys

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_balance import plugin, seams
from vllm_balance.config import BALANCERS, FETCHES, LOADED_BY_MAP
from vllm_balance.errors import BalancerError
from vllm_balance.seams.arguments import ARGUMENT_SEAMS
from vllm_balance.seams.deployment import configure

TWO_RANKS = ("--tensor-parallel-size", "2", "--enable-expert-parallel")
OF_THEMSELVES = [name for name in BALANCERS if name not in LOADED_BY_MAP]
"""Those that need no map."""
WORKER = "vllm_balance.seams.worker_cpu.BalancedCPUWorker"


@pytest.fixture(autouse=True)
def registered(untouched_vllm):
    plugin.register()


def engine_args(model: str, *arguments: str) -> AsyncEngineArgs:
    """What ``vllm serve MODEL ARGUMENTS`` makes of its command line."""
    parser = make_arg_parser(FlexibleArgumentParser())
    common = ("--model", model, "--skip-tokenizer-init", "--max-model-len", "64")
    return AsyncEngineArgs.from_cli_args(parser.parse_args([*common, *arguments]))


def configured(model: str, *arguments: str):
    return engine_args(model, *arguments).create_engine_config()


@pytest.fixture
def caplog_vllm(caplog, moe_model):
    """What vLLM's logger says, which does not pass its lines on to the root logger."""
    configured(moe_model)  # The first configuration of a process sets vLLM's handlers anew.
    logging.getLogger("vllm").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("vllm").removeHandler(caplog.handler)


@pytest.fixture
def refused(capfd):
    """Runs a command line that must be refused and returns its paragraph."""

    def run(model: str, *arguments: str) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as raised:
            configured(model, *arguments)
        assert raised.value.code == 2
        lines = capfd.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("vllm: error: ")]
        assert len(errors) == 1 and lines[-1] == errors[0]
        assert errors[0].endswith(".")
        return errors[0].removeprefix("vllm: error: ")

    return run


@pytest.mark.parametrize("name", OF_THEMSELVES)
@pytest.mark.parametrize("parallel", ["tensor", "data"])
def test_a_balancer_selects_worker_and_eplb(moe_model, name, parallel):
    layout = (f"--{parallel}-parallel-size", "2", "--enable-expert-parallel")
    config = configured(moe_model, *layout, "--moe-balancer", name)
    assert config.parallel_config.worker_cls == WORKER
    settled = config.additional_config["moe_balancer"]
    assert settled["name"] == name
    assert config.parallel_config.enable_eplb == (name != "static")
    if name != "static":
        eplb = config.parallel_config.eplb_config
        fetches = name in FETCHES
        redundant = 2 * 4 if fetches else 2
        assert eplb.num_redundant_experts == settled["num_redundant_experts"] == redundant
        assert settled["dynamic_slots"] == (4 if fetches else None)
        rearranged = (1, sys.maxsize) if fetches else (1000, 3000)
        assert (eplb.window_size, eplb.step_interval) == rearranged
        assert not eplb.use_async


def test_settings_of_the_file_arrive(moe_model, tmp_path):
    file = tmp_path / "balancer.toml"
    file.write_text("name = 'metro'\nredundancy = 2.0\nwindow_size = 7\nstep_interval = 8\n")
    config = configured(moe_model, *TWO_RANKS, "--moe-balancer-config", str(file))
    eplb = config.parallel_config.eplb_config
    assert (eplb.num_redundant_experts, eplb.window_size, eplb.step_interval) == (8, 7, 8)
    assert config.additional_config["moe_balancer"]["num_redundant_experts"] == 8


def test_vllms_own_dotted_syntax_works(moe_model):
    dotted = ("--moe-balancer-config.redundancy", "1.5")
    config = configured(moe_model, *TWO_RANKS, "--moe-balancer", "eplb", *dotted)
    assert config.parallel_config.eplb_config.num_redundant_experts == 4


def test_two_numbers_of_redundant_experts_are_refused(moe_model):
    config = configured(moe_model, *TWO_RANKS)
    config.parallel_config.eplb_config.num_redundant_experts = 4
    config.additional_config = {"moe_balancer": {"name": "metro", "num_redundant_experts": 8}}
    with pytest.raises(BalancerError, match=r"is 8 in the settings .* and 4 in --eplb-config"):
        configure(config)


def test_vllms_own_redundancy_setting_is_taken(moe_model):
    """vLLM takes it with --enable-eplb only, and that not on CPU, hence the direct way."""
    config = configured(moe_model, *TWO_RANKS)
    config.parallel_config.eplb_config.num_redundant_experts = 4
    config.additional_config = {"moe_balancer": "metro"}
    configure(config)
    assert config.additional_config["moe_balancer"]["num_redundant_experts"] == 4
    assert config.parallel_config.eplb_config.num_redundant_experts == 4


def test_additional_config_means_the_same_as_the_flags(moe_model):
    arguments = {
        "model": moe_model,
        "skip_tokenizer_init": True,
        "max_model_len": 64,
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
    }
    settings = {"name": "metro", "redundancy": 1.5}
    by_flag = configured(
        moe_model,
        *TWO_RANKS,
        "--moe-balancer",
        "metro",
        "--moe-balancer-config",
        '{"redundancy": 1.5}',
    )
    by_dict = EngineArgs(
        **arguments, additional_config={"moe_balancer": settings, "other": 1}
    ).create_engine_config()
    assert by_dict.additional_config.pop("other") == 1
    assert by_dict.additional_config == by_flag.additional_config
    assert by_dict.parallel_config.eplb_config == by_flag.parallel_config.eplb_config


def test_one_engine_args_makes_many_configs(moe_model):
    """The servers of a data-parallel deployment do so; what they share must not change."""
    arguments = engine_args(moe_model, *TWO_RANKS, "--moe-balancer", "metro")
    eplb, additional = arguments.eplb_config, dict(arguments.additional_config)
    before = repr(eplb)
    configs = [arguments.create_engine_config() for _ in range(3)]
    assert arguments.additional_config == additional == {"moe_balancer": {"name": "metro"}}
    assert arguments.eplb_config is eplb and repr(eplb) == before
    assert len({config.compute_hash() for config in configs}) == 1
    assert not arguments.enable_eplb


def test_a_process_that_loads_plugins_late_finds_the_settings(moe_model):
    """The API servers of a data-parallel deployment parse nothing: they get the arguments, and
    load plugins only while the original from_cli_args runs."""
    parser = make_arg_parser(FlexibleArgumentParser())
    arguments = parser.parse_args(
        ["--model", moe_model, "--skip-tokenizer-init", *TWO_RANKS, "--moe-balancer", "metro"]
    )
    first = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    seams.uninstall(ARGUMENT_SEAMS)
    late = AsyncEngineArgs.from_cli_args(pickle.loads(pickle.dumps(arguments)))
    plugin.register()
    second = late.create_engine_config()
    assert second.additional_config == first.additional_config
    assert second.compute_hash() == first.compute_hash()
    again = AsyncEngineArgs.from_cli_args(arguments)
    assert again.additional_config == {"moe_balancer": {"name": "metro"}}


def test_the_balancer_is_part_of_vllms_config_hash(moe_model):
    hashes = {
        configured(moe_model, *TWO_RANKS, "--moe-balancer", name).compute_hash()
        for name in OF_THEMSELVES
    }
    assert len(hashes) == len(OF_THEMSELVES)


def test_the_same_settings_twice_are_no_conflict(moe_model):
    for same in ('{"moe_balancer": "eplb"}', '{"moe_balancer": {"name": "eplb"}}'):
        config = configured(
            moe_model, *TWO_RANKS, "--moe-balancer", "eplb", "--additional-config", same
        )
        assert config.additional_config["moe_balancer"]["name"] == "eplb"


def test_flag_and_additional_config_that_differ(moe_model, refused):
    other = json.dumps({"moe_balancer": {"name": "eplb"}})
    text = refused(moe_model, *TWO_RANKS, "--moe-balancer", "metro", "--additional-config", other)
    assert "'metro'" in text and "'eplb'" in text and "Give them once" in text


def test_an_unknown_balancer(moe_model, refused):
    text = refused(moe_model, *TWO_RANKS, "--moe-balancer", "metr")
    assert text.startswith("Unknown balancer 'metr'. Did you mean 'metro'?")


def test_an_unknown_key(moe_model, refused, tmp_path):
    file = tmp_path / "balancer.toml"
    file.write_text("redundency = 1.5\n")
    text = refused(
        moe_model, *TWO_RANKS, "--moe-balancer", "metro", "--moe-balancer-config", str(file)
    )
    assert "Unknown key 'redundency'. Did you mean 'redundancy'?" in text


def test_settings_without_a_balancer(moe_model, refused):
    text = refused(moe_model, *TWO_RANKS, "--moe-balancer-config", '{"redundancy": 1.5}')
    assert "name no balancer" in text


def test_a_missing_and_a_malformed_file(moe_model, refused, tmp_path):
    missing = str(tmp_path / "missing.toml")
    text = refused(
        moe_model, *TWO_RANKS, "--moe-balancer", "metro", "--moe-balancer-config", missing
    )
    assert missing in text and "is not a file" in text
    malformed = tmp_path / "balancer.toml"
    malformed.write_text("# a comment\nredundancy = \n")
    text = refused(
        moe_model, *TWO_RANKS, "--moe-balancer", "metro", "--moe-balancer-config", str(malformed)
    )
    assert str(malformed) in text and "at line 2" in text


@pytest.mark.parametrize("name", OF_THEMSELVES)
def test_no_expert_parallelism_one_rank_and_a_dense_model(moe_model, dense_model, refused, name):
    flag = ("--moe-balancer", name)
    assert "Add --enable-expert-parallel" in refused(
        moe_model, "--tensor-parallel-size", "2", *flag
    )
    assert "at least two expert-parallel ranks" in refused(
        moe_model, "--enable-expert-parallel", *flag
    )
    assert "is a dense model" in refused(dense_model, "--tensor-parallel-size", "2", *flag)


def test_redundancy_that_does_not_divide(moe_model, refused):
    text = refused(
        moe_model,
        *TWO_RANKS,
        "--moe-balancer",
        "metro",
        "--moe-balancer-config",
        '{"num_redundant_experts": 3}',
    )
    assert "11 physical experts, which do not divide over 2 ranks" in text
    assert "2 (redundancy 1.25) or 4 (redundancy 1.5)" in text


def test_redundancy_for_static(moe_model, refused):
    text = refused(
        moe_model,
        *TWO_RANKS,
        "--moe-balancer",
        "static",
        "--moe-balancer-config",
        '{"redundancy": 1.5}',
    )
    assert "static keeps one copy" in text


def test_experts_that_do_not_fit_in_memory(moe_model, refused, tmp_path):
    config = json.loads((tmp_path.joinpath(moe_model) / "config.json").read_text())
    config |= {"moe_intermediate_size": 10**8, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = refused(str(tmp_path), *TWO_RANKS, "--moe-balancer", "metro")
    needed = (8 + 2) * (2 + 1) * 3 * 64 * 10**8 * 2  # Two layers, and a buffer for exchanges.
    assert f"need {needed:,} bytes" in text
    assert "Lower `num_redundant_experts`" in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--pipeline-parallel-size", "2"), "pipeline parallelism"),
        (("--data-parallel-size", "2"), "tensor parallelism inside data parallelism"),
        (("--expert-placement-strategy", "round_robin"), "round-robin expert placement"),
    ],
)
def test_combinations_that_are_not_supported(moe_model, refused, arguments, named):
    text = refused(moe_model, *TWO_RANKS, "--moe-balancer", "metro", *arguments)
    assert f"not supported together with {named}." in text


def test_another_worker_class(moe_model, refused):
    text = refused(
        moe_model, *TWO_RANKS, "--moe-balancer", "metro", "--worker-cls", "my.own.Worker"
    )
    assert "--worker-cls asks for my.own.Worker" in text


@pytest.mark.parametrize("layout", [TWO_RANKS, ()])
def test_offline_commands_copy_their_arguments(moe_model, capfd, layout):
    """``vllm bench latency`` and others make ``LLM(**vars(engine_args))`` of what they parsed."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = parser.parse_args(
        ["--model", moe_model, "--skip-tokenizer-init", *layout, "--moe-balancer", "metro"]
    )
    copied = EngineArgs(**vars(EngineArgs.from_cli_args(arguments)))
    if layout:
        assert copied.create_engine_config().parallel_config.worker_cls == WORKER
        return
    with pytest.raises(SystemExit) as raised:
        copied.create_engine_config()
    assert raised.value.code == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("vllm: error: --moe-balancer metro")


def test_library_users_get_an_exception_and_not_an_exit(moe_model):
    arguments = {"model": moe_model, "skip_tokenizer_init": True, "max_model_len": 64}
    wrong = EngineArgs(**arguments, additional_config={"moe_balancer": "metro"})
    with pytest.raises(BalancerError, match="Add --enable-expert-parallel"):
        wrong.create_engine_config()
    assert issubclass(BalancerError, ValueError)


def test_a_recording_alone_takes_static_and_an_absolute_path(moe_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configured(moe_model, *TWO_RANKS, "--moe-record", "t.npz")
    settled = config.additional_config["moe_balancer"]
    assert settled["name"] == "static"
    assert settled["record"] == {
        "run": "",
        "file": str(tmp_path / "t.npz"),
        "what": "counts",
        "max_bytes": 256 * 2**20,
    }


def test_a_recording_that_cannot_be_made(moe_model, refused, tmp_path):
    record = ("--moe-balancer", "metro", "--moe-record")
    text = refused(moe_model, *TWO_RANKS, *record, str(tmp_path / "missing" / "t.npz"))
    assert f"the folder {tmp_path / 'missing'} does not exist" in text
    (tmp_path / "t.rank1.npz").touch()
    assert configured(moe_model, *TWO_RANKS, *record, str(tmp_path / "t.npz"))
    text = refused(
        moe_model, "-dp", "2", "--enable-expert-parallel", *record, str(tmp_path / "t.npz")
    )
    assert f"{tmp_path / 't.rank1.npz'} exists, and recordings are never overwritten" in text


def test_later_processes_find_the_file_that_a_rank_made(moe_model, tmp_path, monkeypatch):
    monkeypatch.setattr("multiprocessing.parent_process", lambda: "the first one")
    monkeypatch.setenv("VLLM_BALANCE_SET_UP", "1")
    (tmp_path / "t.npz").touch()
    assert configured(moe_model, *TWO_RANKS, "--moe-record", str(tmp_path / "t.npz"))


def test_the_flags_have_a_group_of_their_own_in_the_help():
    parser = make_arg_parser(FlexibleArgumentParser())
    groups = {group.title: group for group in parser._action_groups}
    options = [
        option
        for action in groups["MoEBalancerConfig"]._group_actions
        for option in action.option_strings
    ]
    assert options == ["--moe-balancer", "--moe-balancer-config", "--moe-record"]
    shown = groups["MoEBalancerConfig"]._group_actions[0].help
    assert all(name in shown for name in BALANCERS)


def test_another_plugin_that_wrapped_the_same_places_is_wrapped_too(moe_model, monkeypatch):
    seams.uninstall(ARGUMENT_SEAMS)
    create = EngineArgs.create_engine_config
    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda *a, **k: create(*a, **k))
    plugin.register()
    config = configured(moe_model, *TWO_RANKS, "--moe-balancer", "static")
    assert config.parallel_config.worker_cls == WORKER
    seams.uninstall(ARGUMENT_SEAMS)


def test_a_place_that_does_not_fit_leaves_vllm_as_it_is_and_says_so(
    moe_model, monkeypatch, capfd, caplog_vllm
):
    seams.uninstall(ARGUMENT_SEAMS)
    original = EngineArgs.__dict__["create_engine_config"]
    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda: None)
    plugin.register()
    assert "--moe-balancer is not available. vLLM 0.32" in caplog_vllm.text
    monkeypatch.setattr(EngineArgs, "create_engine_config", original)
    assert configured(moe_model).additional_config == {}
    with pytest.raises(SystemExit) as raised:
        configured(moe_model, "--moe-balancer", "static")
    assert raised.value.code == 2
    assert "unrecognized arguments: --moe-balancer" in capfd.readouterr().err


def test_the_start_says_what_the_balancer_takes(moe_model, caplog_vllm):
    configured(moe_model, *TWO_RANKS, "--moe-balancer", "metro")
    assert "MoE balancer metro: 8 experts + 2 redundant per layer on 2 ranks" in caplog_vllm.text
