"""Two gloo processes whose experts move: weights and tables together, the same on all ranks.

moving.py compares every batch with the dense layer and every weight with its expert.
"""

import json
import subprocess
import sys
from pathlib import Path

MOVING = Path(__file__).with_name("moving.py")


def test_experts_follow_the_traffic_and_the_output_stays(tmp_path):
    outs = [tmp_path / f"{rank}.json" for rank in range(2)]
    errors = [tmp_path / f"{rank}.err" for rank in range(2)]
    ranks = []
    try:
        for rank in range(2):
            command = [sys.executable, MOVING, "2", str(rank), tmp_path / "init", outs[rank]]
            with errors[rank].open("w") as stderr:
                ranks.append(subprocess.Popen(command, stderr=stderr, cwd=tmp_path))
        codes = [process.wait(timeout=200) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert not any(codes), "\n".join(error.read_text()[-2500:] for error in errors)
    found = [json.loads(out.read_text()) for out in outs]
    assert found[0] == found[1]
    assert found[0]["steps"] == 60 and found[0]["decisions"] == 6
    moved_at = [entry["step"] for entry in found[0]["recent"] if entry["swaps"]]
    assert any(step <= 30 for step in moved_at), "the busy experts of one rank were not parted"
    assert any(step > 30 for step in moved_at), "the new traffic was not noticed"
    assert max(entry["drift"] for entry in found[0]["recent"]) > 0.3
    assert found[0]["moves"] == len(moved_at)
