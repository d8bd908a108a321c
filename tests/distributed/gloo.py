"""Starts one process per rank and reads what each found."""

import json
import subprocess
import sys
from pathlib import Path


def run_ranks(script: Path, size: int, folder: Path) -> list[dict]:
    """What each rank wrote, in rank order; fails with the ranks' tracebacks if one failed.

    The script gets: number of ranks, its rank, a file to meet at, a file for its findings.
    """
    outs = [folder / f"{rank}.json" for rank in range(size)]
    errors = [folder / f"{rank}.err" for rank in range(size)]
    ranks = []
    try:
        for rank in range(size):
            with errors[rank].open("w") as stderr:
                command = [sys.executable, script, str(size), str(rank), folder / "init"]
                ranks.append(subprocess.Popen([*command, outs[rank]], stderr=stderr, cwd=folder))
        codes = [process.wait(timeout=200) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert not any(codes), "\n".join(error.read_text()[-2500:] for error in errors)
    return [json.loads(out.read_text()) for out in outs]
