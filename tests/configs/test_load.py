"""Recipes and saved runs: where they are found, what is read, what is left behind."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from configs import load as module
from configs.load import load, save
from configs.run import Run
from tests.commands import python_path


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file below the current folder, which is empty and temporary."""
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


PLAIN = """
from configs.run import Run

def get_config():
    return Run(steps=7)
"""
WITH_ARGUMENT = """
from configs.run import Run

def get_config(arg="11"):
    return Run(steps=int(arg))
"""


def test_a_recipe_is_named_after_its_file_unless_it_names_itself(write):
    write("small.py", PLAIN)
    write("other.py", PLAIN.replace("steps=7", "steps=7, name='own'"))
    assert load("small.py") == Run(name="small", steps=7)
    assert load("other.py").name == "own"
    assert load("small.py", {"name": "flag"}).name == "flag"


def test_the_argument_after_the_colon_reaches_the_recipe(write):
    path = write("sized.py", WITH_ARGUMENT)
    assert load("sized.py").steps == 11
    assert load("sized.py:5").steps == 5
    assert load(f"{path}:6").steps == 6


def test_the_current_folder_comes_before_the_project(write, tmp_path, monkeypatch):
    project = tmp_path / "project"
    write("project/configs/a.py", PLAIN)
    monkeypatch.setattr(module, "ROOT", project)
    assert load("configs/a.py").steps == 7
    write("configs/a.py", PLAIN.replace("7", "8"))
    assert load("configs/a.py").steps == 8


def test_a_changed_recipe_is_read_again_and_leaves_no_files_or_paths_behind(write, tmp_path):
    before = list(sys.path)
    write("again.py", "import sys\nsys.path.insert(0, '/nowhere')\n" + PLAIN)
    assert load("again.py").steps == 7
    write("again.py", "import sys\nsys.path.insert(0, '/nowhere')\n" + PLAIN.replace("7", "8"))
    assert load("again.py").steps == 8
    assert sys.path == before
    assert os.listdir(tmp_path) == ["again.py"]


def test_a_saved_run_is_the_same_run_when_loaded(write, tmp_path):
    path = write("sized.py", WITH_ARGUMENT)
    run = load(f"{path}:5", {"optim.lr": "0.1", "model.arch.attention.windows": "8,0"})
    save(run, tmp_path / "config.json")
    assert load("config.json") == run
    assert load("config.json", {"steps": "6"}).steps == 6
    assert sorted(os.listdir(tmp_path)) == ["config.json", "sized.py"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "bad.json:1: this is no JSON"),
        ('{"steps": 5,\n}', "bad.json:2: this is no JSON"),
        ("[]", "bad.json: [] must be an object"),
        ('{"steps": NaN}', "bad.json: steps=nan must be an integer"),
        ('{"stps": 5}', "bad.json: no field stps, did you mean steps?"),
        ('{"model": {"lr": 5}}', "no field model.lr"),
        ('{"model": 3}', "model=3 must be an object"),
        ('{"steps": "5"}', "steps='5' must be an integer"),
        ('{"steps": 5, "steps": 6}', "the key 'steps' stands twice"),
        ('{"optim": {"lr": 1e999}}', "optim.lr=inf must be a finite number"),
        ('{"model": {"heads": 6}}', "bad.json: model: heads=6 must be a multiple of kv_heads=4"),
        ('{"steps": ' + "9" * 5000 + "}", "bad.json: "),
        ('{"optim": {"lr": 1' + "0" * 400 + "}}", "must be a finite number"),
        ('{"' + "k" * 10_000 + '": 1}', "no field kkk"),
        ('{"a\\u001b[31m\\nb": 1}', r"no field a\x1b[31m\nb"),
        ("{" + ",".join(f'"{i}": 0' for i in range(70_000)) + "}", "no field 0;"),
        ("[" * 100_000, "nested too deeply"),
        ('{"name": "' + "a" * (1 << 20) + '"}', "larger than 1 MiB"),
    ],
)
def test_a_damaged_config_json_says_where(write, text, message):
    write("bad.json", text)
    with pytest.raises(ValueError, match=r"^bad\.json") as caught:
        load("bad.json")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_config_json_of_arbitrary_bytes_is_refused(tmp_path):
    (tmp_path / "x.json").write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match="this is no JSON"):
        load(str(tmp_path / "x.json"))


def test_the_error_of_a_file_that_the_recipe_imports_names_that_file(write, tmp_path):
    helper = write("broken_part.py", "x = (\n")
    recipe = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport broken_part\n"
    write("uses.py", recipe)
    with pytest.raises(ValueError, match="was never closed") as caught:
        load("uses.py")
    assert f"{helper}:1: " in str(caught.value)


def test_a_shipped_recipe_is_found_from_any_folder(tmp_path):
    """As in a wheel: recipes lie beside configs/run.py, the current folder is elsewhere."""
    (tmp_path / "site" / "configs").mkdir(parents=True)
    (tmp_path / "site" / "configs" / "shipped.py").write_text(PLAIN)
    code = (
        "import pathlib; from configs import load; load.ROOT = pathlib.Path('site').resolve(); "
        "print(load.load('configs/shipped.py').steps)"
    )
    env = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.stdout == "7\n", done.stderr


def test_what_save_writes_is_plain_sorted_by_field_and_ends_with_a_newline(tmp_path):
    save(Run(), tmp_path / "config.json")
    text = (tmp_path / "config.json").read_text()
    assert text.endswith("}\n")
    assert list(json.loads(text))[:3] == ["name", "steps", "seed"]
