"""The wheel holds every module of the house, and nothing else."""

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the checkout, built offline."""
    folder = tmp_path_factory.mktemp("packaging") / "checkout"
    leave = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=leave)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist()), archive.read(
            next(name for name in archive.namelist() if name.endswith("METADATA"))
        ).decode()


def modules():
    scripts = {path.name for path in ROOT.glob("*.py")}
    packages = {init.parent for init in ROOT.glob("*/__init__.py")} - {ROOT / "tests"}
    files = {path for folder in packages for path in folder.rglob("*.py")}
    return scripts | {path.relative_to(ROOT).as_posix() for path in files}


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    names, _ = wheel
    found = {name for name in names if ".dist-info/" not in name}
    assert "train.py" in found
    assert "model/kernels/attention.py" in found
    assert found == modules()


def test_every_folder_of_modules_is_a_package():
    """A folder without __init__.py is silently left out of the wheel."""
    for path in modules():
        assert (ROOT / path).parent == ROOT or (ROOT / path).with_name("__init__.py").is_file(), (
            path
        )


def test_the_wheel_asks_for_what_pyproject_states(wheel):
    _, metadata = wheel
    assert "Requires-Python: >=3.11" in metadata
    for extra in ("cuda", "tpu", "test"):
        assert f"Provides-Extra: {extra}" in metadata


@pytest.mark.parametrize("name", ["jax", "flax", "optax", "orbax-checkpoint", "grain"])
def test_what_is_installed_is_within_the_bounds(wheel, name):
    packaging = pytest.importorskip("packaging.requirements")
    lines = [line for line in wheel[1].splitlines() if line.startswith("Requires-Dist: ")]
    wanted = map(packaging.Requirement, (line.removeprefix("Requires-Dist: ") for line in lines))
    (requirement,) = (want for want in wanted if want.name == name and not want.marker)
    assert requirement.specifier.contains(importlib.metadata.version(name))
