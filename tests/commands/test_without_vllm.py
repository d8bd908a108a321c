"""The command line where neither vLLM nor torch is installed: help, and what is missing."""

from apart import require_success_apart

CHECK = """
import json
import sys


class Without:
    '''A finder that does not find torch and vLLM.'''

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in ("torch", "vllm")
        return None if hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = map(Without, sys.meta_path)

from typer.testing import CliRunner

from vllm_balance import commands
from vllm_balance.errors import BalancerError


def run(*arguments):
    return CliRunner().invoke(commands.app, arguments, env={"COLUMNS": "200"})


for command in ("doctor", "profile", "place", "plan", "report", "trace", "map"):
    assert run(command, "--help").exit_code == 0, command
missing = "vLLM is not installed. In the repository, on GPUs: pip install '.[cuda]'. On CPUs: `make"
found = run("doctor")
assert found.exit_code == 1 and missing in found.output, found.output
found = json.loads(run("doctor", "--json").output)
assert found["vllm"] == "not installed" and found["seams"] == [], found
for arguments in (
    ("profile", "model"),
    ("place", "--profile", "p", "--trace", "t", "--ranks", "2", "-o", "m"),
    ("plan", "--model", "gpt-oss-20b", "--hardware", "h20", "--zipf", "0"),
):
    refused = run(*arguments).exception
    assert isinstance(refused, BalancerError) and missing in str(refused), refused
    assert f"`vllm-balance {arguments[0]}`" in str(refused), refused
"""


def test_commands_say_that_vllm_is_missing():
    require_success_apart(CHECK)
