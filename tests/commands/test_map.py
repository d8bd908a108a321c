"""`map info`: what a map says of itself, and whether it fits."""

import json
from datetime import UTC, datetime

import pytest
from typer.testing import CliRunner

from vllm_balance import commands, maps
from vllm_balance.errors import BalancerError
from vllm_balance.maps import LayerMap, PlacementMap
from vllm_balance.model_shape import from_config

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 5,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "mlp_only_layers": [2],
}


@pytest.fixture
def model(tmp_path):
    """A model whose layer 2 is dense."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def write(model, tmp_path):
    def run(layers=(0, 1, 3, 4)):
        found = PlacementMap(
            created=datetime(2026, 11, 22, 8, 30, tzinfo=UTC),
            policy="gem_r",
            sources={"profile": "p.json", "trace": "[red]t.npz"},
            shape=from_config(model),
            num_ranks=2,
            layers=[LayerMap(index=i, physical_to_logical=[0, 1, 2, 3, 3, 0]) for i in layers],
        )
        maps.save(tmp_path / "m.json", found)
        return tmp_path / "m.json"

    return run


def info(*arguments):
    runner = CliRunner(env={"COLUMNS": "120"})
    return runner.invoke(commands.app, ["map", "info", *map(str, arguments)])


def said(done) -> dict[str, str]:
    rows = [line.split("│")[1:-1] for line in done.output.splitlines() if line.startswith("│")]
    return {name.strip(): value.strip() for name, value in rows}


def test_a_map_says_what_it_is(write):
    file = write()
    done = info(file)
    assert done.exit_code == 0, done.output
    rows = said(done)
    assert (rows["policy"], rows["made"]) == ("gem_r", "2026-11-22 08:30 UTC")
    assert (rows["from profile"], rows["from trace"]) == ("p.json", "[red]t.npz")
    assert rows["model"] == "model, Qwen3MoeForCausalLM"
    assert rows["ranks"] == "2" and rows["slots per rank"].startswith("3, 2 redundant")
    assert rows["layers"] == "0-1, 3-4 of 5"
    assert rows["checksum"].startswith(maps.load(file).checksum[:12])
    assert "It fits" not in done.output


def test_it_fits_its_own_deployment_whatever_the_dtype(write, model):
    (model / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": "float32"}))
    done = info(write(), "--model", model, "--ranks", 2)
    assert done.exit_code == 0 and "It fits model on 2 ranks." in done.output, done.output
    assert "It fits 2 ranks." in info(write(), "--ranks", 2).output
    assert "uses its experts differently" not in done.output


def test_another_model_of_the_same_shape_is_doubted(write, model, tmp_path):
    file = write()
    model.rename(tmp_path / "coder")
    done = info(file, "--model", tmp_path / "coder")
    assert done.exit_code == 0 and "It fits coder." in done.output
    assert "was made for model, and coder of the same shape is served" in done.output


@pytest.mark.parametrize(
    ("change", "asked", "reason"),
    [
        ({}, ("--ranks", 4), "2 ranks instead of 4"),
        ({"hidden_size": 128}, (), "hidden 64 instead of 128"),
        ({"mlp_only_layers": []}, (), "no entry for layer 2"),
    ],
)
def test_what_does_not_fit_is_refused(write, model, monkeypatch, capsys, change, asked, reason):
    file = write()
    (model / "config.json").write_text(json.dumps(CONFIG | change))
    arguments = ["map", "info", str(file), "--model", str(model), *map(str, asked)]
    monkeypatch.setattr("sys.argv", ["vllm-balance", *arguments])
    with pytest.raises(SystemExit) as end:
        commands.main()
    assert end.value.code == 1
    printed = capsys.readouterr().out
    assert "gem_r" in printed and reason in printed and "It fits" not in printed


def test_an_edited_map_is_refused(write):
    file = write()
    file.write_text(file.read_text().replace("gem_r", "gem"))
    assert isinstance(info(file).exception, BalancerError)
