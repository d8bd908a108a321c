"""The package's own order: a module imports only from rows below its own, and vLLM only at edges.

The rows, top to bottom, as docs describe them:

1. the entry point of vLLM's plugins, which imports nothing until it is called
2. what people call: the command and the HTTP endpoint
3. the seams, where vLLM is touched; the worker classes are their top
4. what is deployed, and the hub of one batch
5. settings; the exchange of counts
6. routing and placement policies, the experts of one rank; cost curves, fetch costs, their files
7. metrics; recorder, traces and their replay; shapes of models, JSON files, rows of benchmarks
8. kernels
9. the vocabulary and the one exception
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_balance

PACKAGE = Path(vllm_balance.__file__).parent
ROWS = [
    ["plugin"],
    ["commands", "endpoint"],
    ["seams"],
    [
        "deployment",
        "slot_deployment",
        "balancer",
        "slot_balancer",
        "worker_balancer",
        "simulate",
        "initial_placement",
        "online",
    ],
    ["config", "exchange"],
    ["routing", "placement", "experts", "cost", "fetch_cost", "profiles", "maps"],
    [
        "metrics",
        "prometheus",
        "recorder",
        "recorded",
        "recording",
        "step_writer",
        "replay",
        "replay_rows",
        "traces",
        "trace_summary",
        "model_shape",
        "documents",
        "measurement",
        "measured_tables",
        "own_benchmarks",
        "run_tables",
        "skew_table",
        "slo_table",
    ],
    ["kernels"],
    ["types", "errors"],
]
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}
UNITS = ("seams", "kernels", "routing", "commands", "placement", "simulate", "own_benchmarks")
"""Packages whose modules know each other."""
VLLM_AT_IMPORT = {"endpoint", "seams.worker_cpu", "seams.worker_gpu"}
"""Modules that vLLM itself asks for by name, inside a process that has imported it already."""


def modules() -> dict[str, Path]:
    """Every module of the package by its name below ``vllm_balance``; kernels are a link."""
    found = {}
    for folder in (PACKAGE, *(f for f in PACKAGE.iterdir() if f.is_dir())):
        for file in folder.rglob("*.py") if folder != PACKAGE else folder.glob("*.py"):
            parts = file.relative_to(PACKAGE).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = file
    found.pop("", None)
    return found


MODULES = modules()


def imports(name: str, *, everywhere: bool) -> set[str]:
    """Full names that a module imports: with its functions, or only when it is itself imported."""
    file = MODULES[name]
    package = ["vllm_balance", *name.split(".")]
    if file.name != "__init__.py":
        package.pop()
    found = set()
    nodes = [ast.parse(file.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*origin, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if everywhere or not is_function:
            nodes.extend(ast.iter_child_nodes(node))
    return found


def test_the_kernels_are_part_of_the_package():
    assert {"kernels.metro", "kernels.record.layout", "seams.cpu", "balancer"} <= MODULES.keys()


def test_every_module_has_its_row():
    assert {name.partition(".")[0] for name in MODULES} <= ROW_OF.keys()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name):
    own = name.partition(".")[0]
    for imported in imports(name, everywhere=True):
        root, _, rest = imported.partition(".")
        if root != "vllm_balance" or not rest or rest == "__version__":
            continue
        other = rest.partition(".")[0]
        same_unit = own == other and own in UNITS
        assert same_unit or ROW_OF[other] >= ROW_OF[own], f"{name} imports {imported} from above"


def cycle_in(knows: dict[str, set[str]]) -> list[str]:
    """Names that know each other in a circle, first and last the same; [] if there is none."""
    seen: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for name in sorted(knows.get(path[-1], set()) - {path[-1]}):
            if name in path:
                return [*path[path.index(name) :], name]
            if name not in seen and (found := search([*path, name])):
                return found
        seen.add(path[-1])
        return []

    found = (search([name]) for name in sorted(knows) if name not in seen)
    return next((cycle for cycle in found if cycle), [])


def test_a_cycle_of_any_length_is_found():
    knows = {"a": {"a", "b", "e"}, "b": {"c"}, "c": {"d"}, "d": {"b"}, "e": set()}
    assert cycle_in(knows) == ["b", "c", "d", "b"]
    assert cycle_in(knows | {"d": {"e"}}) == []


def test_rows_have_no_cycles_within():
    """Modules of one row may know each other in one direction only."""
    knows = {
        name: {
            imported.split(".")[1]
            for module in MODULES
            if module.partition(".")[0] == name
            for imported in imports(module, everywhere=True)
            if imported.startswith("vllm_balance.")
        }
        for name in ROW_OF
    }
    assert cycle_in(knows) == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_vllm_is_imported_at_the_edges_only(name):
    at_import = {full.partition(".")[0] for full in imports(name, everywhere=False)}
    assert "vllm" not in at_import or name in VLLM_AT_IMPORT
    anywhere = {full.partition(".")[0] for full in imports(name, everywhere=True)}
    pure = ROW_OF[name.partition(".")[0]] >= ROW_OF["config"]
    allowed = name in ("routing.eplb", "placement.eplb", "replay")
    assert not (pure and "vllm" in anywhere) or allowed, "a pure row asks vLLM for something"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_catches_everything(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"
            caught = {part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)}
            assert not caught & {"Exception", "BaseException"}, f"line {node.lineno}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_environment_is_read_in_config_only(name):
    """Setting a variable for a library that is loaded later is allowed in one other module; reading
    one is not."""
    if name == "config":
        return
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
            assert node.attr == "environ" and name == "commands.expert_probe", f"line {node.lineno}"
        if isinstance(node, ast.Subscript) and "environ" in ast.unparse(node.value):
            assert isinstance(node.ctx, ast.Store), f"line {node.lineno} reads the environment"
        if isinstance(node, ast.Call) and "environ" in ast.unparse(node.func):
            raise AssertionError(f"line {node.lineno} reads the environment")


def loaded_after(statement: str, tmp_path: Path) -> set[str]:
    """Top-level modules that are loaded in a new process after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    return set(done.stdout.split())


def test_the_entry_point_is_light(tmp_path):
    """vLLM imports it in every process, also in those that never use a balancer."""
    loaded = loaded_after("import vllm_balance.plugin", tmp_path)
    assert "vllm_balance" in loaded
    assert not loaded & {"torch", "numba", "vllm", "numpy", "pydantic", "triton"}


def test_registering_loads_what_vllm_has_and_no_numba(tmp_path):
    """Before a worker has registered its Triton kernels, an imported numba breaks it."""
    vllms = loaded_after("import vllm.engine.arg_utils", tmp_path)
    loaded = loaded_after("import vllm_balance.plugin as p; p.register()", tmp_path)
    assert "vllm" in loaded
    assert "numba" not in loaded
    assert loaded - vllms - sys.stdlib_module_names == {"vllm_balance"}


def test_settings_do_not_load_vllm(tmp_path):
    loaded = loaded_after("import vllm_balance.deployment", tmp_path)
    assert "pydantic" in loaded
    assert "vllm" not in loaded


def test_kernels_are_not_a_top_level_package(tmp_path):
    """transformers takes any top-level package of that name for its own."""
    code = (
        "import importlib.util as u, vllm_balance.kernels.metro as m; "
        "print(u.find_spec('kernels'), m.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.split() == ["None", "vllm_balance.kernels.metro"]
