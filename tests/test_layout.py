"""The house rules: imports point down, files and functions stay short. docs/architecture.md."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Which packages a package may import. Commands and tests import anything.
MAY_IMPORT = {
    "sharding": set(),
    "text": set(),
    "monitor": set(),
    "data": {"text", "sharding"},
    "optim": {"sharding"},
    "model": {"sharding"},
    "checkpoint": {"model", "text", "sharding"},
    "costs": {"model", "sharding"},
    "inference": {"model", "text", "sharding"},
    "compressors": {"model", "optim", "checkpoint", "sharding"},
    "evals": {"inference", "model", "data", "text", "sharding"},
    "configs": {"data", "model", "optim", "sharding"},  # their config classes
    "tools": None,
    "training": None,
}
# Beyond the config classes: the vocabulary of layouts, meshes and schedules is theirs too.
CONFIG_MODULES = {"data.config", "model.config", "optim.config"}
CONFIG_MODULES |= {"sharding.layout", "sharding.mesh", "sharding.schedule"}
LEAVES = {"configs.fields"}  # modules that import nothing of the house, for anyone
# Tools that repeat a training step.
MAY_IMPORT_TRAIN = {"tools.parity", "tools.plan", "tools.replay"}
MAY_IMPORT_TRAIN |= {"tools.bench", "tools.bubble"}  # and time it
MAX_LINES, MAX_KERNEL_LINES, MAX_FUNCTION_LINES = 500, 700, 80


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PACKAGES = sorted(
    path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"
)
COMMANDS = {path.stem for path in ROOT.glob("*.py")}
HOUSE = {
    name_of(path): path for folder in (*PACKAGES, "tests") for path in (ROOT / folder).rglob("*.py")
} | {name: ROOT / f"{name}.py" for name in COMMANDS}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in HOUSE.items()}


def imports(tree):
    """The modules of the house that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; they are absolute here"
            # `from package import name` imports package.name if that is a module.
            yield from (
                whole if (whole := f"{node.module}.{alias.name}") in HOUSE else node.module
                for alias in node.names
                if node.module in HOUSE or node.module.partition(".")[0] in PACKAGES
            )
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in HOUSE)


IMPORTS = {name: set(imports(tree)) for name, tree in TREES.items()}


def package(name):
    return name.partition(".")[0]


def test_every_package_is_in_the_table():
    assert set(PACKAGES) <= MAY_IMPORT.keys(), "say in MAY_IMPORT what the package may import"


@pytest.mark.parametrize("name", PACKAGES)
def test_imports_point_down(name):
    allowed = MAY_IMPORT[name]
    found = {
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if package(module) == name and package(other) not in (name, *COMMANDS)
        if allowed is not None and package(other) not in allowed and other not in LEAVES
    }
    assert not found


def test_recipes_import_config_classes_only():
    others = {
        f"{module} imports {other}"
        for module in IMPORTS
        for other in IMPORTS[module] - CONFIG_MODULES
        if package(module) == "configs" and package(other) != "configs"
    }
    assert not others


def test_nobody_imports_a_command():
    found = {
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others & COMMANDS
        if package(module) != "tests"
        if not (other == "train" and module in MAY_IMPORT_TRAIN)
    }
    assert not found


def test_no_module_imports_itself_through_others():
    try:
        tuple(graphlib.TopologicalSorter(IMPORTS).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


def test_files_are_short():
    def most(name):
        return MAX_KERNEL_LINES if name.startswith("model.kernels.") else MAX_LINES

    lines = {name: path.read_text(encoding="utf-8").count("\n") for name, path in HOUSE.items()}
    assert not {name: count for name, count in lines.items() if count > most(name)}


def test_functions_are_short():
    lines = {
        f"{name}:{node.name}": node.end_lineno - node.lineno + 1
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: count for name, count in lines.items() if count > MAX_FUNCTION_LINES}


def test_files_say_what_they_own():
    silent = {name for name, tree in TREES.items() if not ast.get_docstring(tree)}
    assert not {name for name in silent if package(name) != "tests"}


def test_the_rules_see_what_breaks_them():
    """The reader of imports finds each way to write one."""
    source = "import train\nimport model.config as c\nfrom sharding import mesh\ndef f():\n  "
    source += "from model.layers import Role\n  import numpy\n  from jax import lax\n"
    found = set(imports(ast.parse(source)))
    assert found == {"train", "model.config", "sharding.mesh", "model.layers"}
