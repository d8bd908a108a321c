"""Starts one process per rank and reads what each found.

Run as ``python gloo.py SCRIPT RANKS FOLDER`` it is the process that imports the script, once, and
from which the ranks are forked.
"""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ENDS_WITHIN_S = 540
"""Less than pytest gives the files that start ranks, 600 s."""


def run_ranks(script: Path, size: int, folder: Path) -> list[dict]:
    """What each rank wrote, in rank order; fails with the ranks' tracebacks if one failed.

    The script's main() gets: number of ranks, its rank, a file to meet at, a file for its findings.
    """
    codes = exit_codes(script, size, folder)
    assert codes == [0] * size, "\n".join(said(folder, rank)[-2500:] for rank in range(size))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def said(folder: Path, rank: int) -> str:
    """What a rank printed, logs included."""
    return (folder / f"{rank}.err").read_text()


def exit_codes(script: Path, size: int, folder: Path) -> list[int]:
    """How each rank ended, in rank order. Raises TimeoutExpired if one does not in time."""
    command = [sys.executable, __file__, script, str(size), folder]
    with (folder / "imports.err").open("w") as stderr:
        ranks = subprocess.Popen(command, stderr=stderr, cwd=folder, start_new_session=True)
    try:
        code = ranks.wait(timeout=ENDS_WITHIN_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(ranks.pid, signal.SIGKILL)
        ranks.wait()
    assert code == 0, (folder / "imports.err").read_text()[-2500:]
    return json.loads((folder / "codes.json").read_text())


def main() -> None:
    script, size, folder = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    # What a script imports from tests: cases, and its neighbours, as `import ranks`.
    sys.path.insert(0, str(script.parent))
    load("cases", Path(__file__).parents[1] / "cases.py")
    module = load(script.stem, script)
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run, args=(module, size, rank, folder)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    (folder / "codes.json").write_text(json.dumps([rank.exitcode for rank in ranks]))


def load(name: str, file: Path) -> ModuleType:
    """The module of a file, by a name under which others import it."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module: ModuleType, size: int, rank: int, folder: Path) -> None:
    """In the forked process: becomes a rank, which prints to a file of its own."""
    with (folder / f"{rank}.err").open("w") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    out = folder / f"{rank}.json"
    sys.argv = [str(module.__file__), str(size), str(rank), str(folder / "init"), str(out)]
    module.main()


if __name__ == "__main__":
    main()
