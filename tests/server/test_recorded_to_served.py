"""From a recording to a server that is placed by it, with the commands of docs/placement.md."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
from serving import EAGER, FLOAT32, PROMPTS, REARRANGED, TENSOR_PARALLEL, balanced, serve

from vllm_balance import maps, profiles, traces
from vllm_balance.commands.profile import own_cores
from vllm_balance.errors import BalancerError

pytestmark = pytest.mark.timeout(1800)

ENDS_WITHIN_S = 300
LAYERS, TOP_K = 4, 4
ALL_WRITTEN_WITHIN_S = 60
"""It is half a second; a busy machine may need more."""


def command(*words: object) -> str:
    """What `vllm-balance` prints, as a user runs it."""
    program = Path(sys.executable).with_name("vllm-balance")
    done = subprocess.run(
        [program, *map(str, words)], capture_output=True, text=True, timeout=ENDS_WITHIN_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait_until_written(trace: Path, pairs: int) -> None:
    """Returns when the file, which may be read while it grows, has all pairs: behind a SIGTERM
    nothing more is written."""
    deadline, found = time.monotonic() + ALL_WRITTEN_WITHIN_S, 0
    while found != pairs:
        assert time.monotonic() < deadline, f"{found} of {pairs} pairs were written"
        time.sleep(0.2)
        with contextlib.suppress(BalancerError):  # There is no whole step yet.
            found = int(traces.load(trace).chunks(1).sum())


def test_recorded_profiled_placed_and_served(model, dense, tmp_path):
    trace, profile, placed = (tmp_path / name for name in ("trace.npz", "profile.json", "map.json"))
    flags = (*TENSOR_PARALLEL, *FLOAT32, *EAGER)
    recording = ("--moe-record", str(trace))
    with serve(model, *flags, *recording, log=tmp_path / "first", num_ranks=2) as server:
        assert server.all_tokens(PROMPTS) == dense.tokens
        wait_until_written(trace, dense.num_computed_tokens * TOP_K * LAYERS)
        server.end()
    recorded = traces.load(trace)
    assert recorded.chunks(1).sum() == dense.num_computed_tokens * TOP_K * LAYERS

    measured = min(2, len(own_cores()))
    command("profile", model, "--ranks", measured, "--dtype", "float32", "-o", profile)
    sources = ("--profile", profile, "--ranks", 2, "--trace", trace)
    command("place", "--policy", "gem", *sources, "-o", placed)
    found = maps.load(placed)
    assert len(profiles.load(profile).ranks) == measured and found.num_ranks == 2
    assert [layer.index for layer in found.layers] == recorded.layer_index_L.tolist()
    assert any(
        layer.physical_to_logical != sorted(layer.physical_to_logical) for layer in found.layers
    ), "the map is that of vLLM itself"

    flags += balanced("gem", map=str(placed), profile=str(profile))
    with serve(
        model, *flags, log=tmp_path / "then", num_ranks=2, VLLM_PLUGINS="moe_balancer"
    ) as server:
        assert server.all_tokens(PROMPTS) == dense.tokens
        ranks = server.status()
        assert server.count_in_log(REARRANGED) == 0
    for rank in ranks:
        assert rank["placement"] == f"gem map {found.checksum[:12]} verified"
        assert rank["decisions"] > 0
