"""A Run from a recipe file or a saved config.json, and back to a file.

A recipe is a Python file with `def get_config(arg: str = ...) -> Run`. It is code of the user's
and runs as such; a .json file is only read. Every error is a ValueError or an OSError.
"""

import difflib
import importlib.util
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs import fields
from configs.run import SHORT, Run, from_json, to_json

ROOT = Path(__file__).parent.parent
_JSON_BYTES = 1 << 20  # a saved Run has about 2,000


def load(source: str, overrides: Mapping[str, str] | None = None) -> Run:
    """The Run of `PATH.py`, `PATH.py:ARG` or `PATH.json`, with fields set from text by path."""
    path, colon, arg = source, "", ""
    for suffix in (".py", ".json"):
        if suffix + ":" in source:
            path, colon, arg = source.partition(suffix + ":")
            path += suffix
    if colon and not arg:
        raise ValueError(f"{source}: nothing follows the colon; write {path} or {path}:ARG")
    if colon and path.endswith(".json"):
        raise ValueError(f"{source}: only a recipe takes an argument; write {path}")
    file = _find(path)
    run = _recipe(file, path, arg) if file.suffix == ".py" else _saved(file, path)
    run = replace(run, name=run.name or file.stem)
    return fields.override(run, _in_full(overrides or {}))


def save(run: Run, path: str | os.PathLike) -> None:
    """Write `run` so that `load` reads the same Run; the file is replaced as a whole."""
    part = Path(f"{os.fspath(path)}.part")
    part.write_text(json.dumps(to_json(run), indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def _in_full(overrides: Mapping[str, str]) -> dict[str, str]:
    """Overrides by the paths of fields, none of them short."""
    found: dict[str, str] = {}
    for path, text in overrides.items():
        head, dot, tail = path.partition(".")
        close = [] if head in fields.kinds(Run) else difflib.get_close_matches(head, SHORT, 1)
        if close and head not in SHORT:
            raise ValueError(f"no field {fields.brief(path)}, did you mean {close[0]}{dot}{tail}?")
        full = SHORT.get(head, head) + dot + tail
        if full in found:
            raise ValueError(f"{path} is short for {full}, which is given too")
        found[full] = text
    return found


def _find(path: str) -> Path:
    """The file at `path`, below the current folder or else below the project's."""
    places = [Path(os.path.expanduser(path)), ROOT / path]
    for place in places:
        if place.is_dir() and (place / "config.json").is_file():
            raise ValueError(f"{path} is a folder; write {Path(path) / 'config.json'}")
        if place.suffix in (".py", ".json") and place.exists() and not place.is_file():
            raise ValueError(f"{path} is no regular file; write a recipe's or config.json's path")
        if place.is_file():
            if place.suffix not in (".py", ".json"):
                raise ValueError(f"{path} must be a recipe (.py) or a saved config (.json)")
            return place
    kind = "a folder" if places[0].is_dir() else "no file"
    raise FileNotFoundError(f"{path} is {kind}{_instead(path)}")


def _instead(path: str) -> str:
    """What could have been meant by a path that does not exist, as the end of a message."""
    recipes = {}
    for folder in (ROOT / "configs", Path(path).parent):
        if folder.is_dir():
            shown = "configs" if folder == ROOT / "configs" else path.rpartition("/")[0]
            recipes |= {
                os.path.join(shown, file.name): file
                for file in sorted(folder.glob("*.py"))
                if re.search(r"(?m)^def get_config\(", file.read_text("utf-8", "replace"))
            }
    stems = {Path(recipe).stem: recipe for recipe in reversed(recipes)}
    close = difflib.get_close_matches(Path(path).stem, stems, 1)
    hint = f", did you mean {stems[close[0]]}?" if close else ";"
    return f"{hint} the recipes are {', '.join(recipes) or 'none'}"


def _saved(file: Path, path: str) -> Run:
    with file.open("rb") as stream:
        data = stream.read(_JSON_BYTES + 1)
    if len(data) > _JSON_BYTES:
        raise ValueError(f"{path} is larger than 1 MiB and cannot be a saved Run")
    try:
        return from_json(json.loads(data, object_pairs_hook=_no_twice))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be a saved Run") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: this is no JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: this is no JSON: byte {error.start} is not UTF-8") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {fields.shown(key)} stands twice in one object")
        found[key] = value
    return found


def _recipe(file: Path, path: str, arg: str) -> Run:
    """What `get_config` of a recipe file returns."""
    name = "recipe_" + re.sub(r"\W", "_", file.stem)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.modules[name] = module  # dataclasses and pickle look for the module by its name
    try:
        # Not exec_module: it would write, and could read a stale, __pycache__ beside the recipe.
        compiled = spec.loader.source_to_code
        code = _located(file, path, lambda: compiled(file.read_bytes(), str(file)))
        _located(file, path, lambda: exec(code, vars(module)))
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise ValueError(f"{path} has no function get_config; write def get_config() -> Run")
        _check_argument(get_config, path, arg)
        run = _located(file, path, lambda: get_config(*([arg] if arg else [])))
    finally:
        sys.path[:] = before
    code = getattr(inspect.unwrap(get_config), "__code__", None)
    where = f"{path}:{code.co_firstlineno}" if code else path
    if type(run) is not Run:
        raise ValueError(f"{where}: get_config returned {fields.shown(run)}, it must return a Run")
    try:
        fields.check_types(run)
    except ValueError as error:
        raise ValueError(f"{where}: get_config returned a Run whose {error}") from None
    return run


def _check_argument(get_config: Callable, path: str, arg: str) -> None:
    """Raise ValueError unless `get_config` can be called with, or without, the argument."""
    signature = inspect.signature(get_config)
    try:
        signature.bind(*([arg] if arg else []))
    except TypeError:
        if arg:
            raise ValueError(f"{path} takes no argument, got {arg!r}; write {path}") from None
        raise ValueError(f"{path} needs an argument; write {path}:ARG") from None


def _located(file: Path, path: str, call: Callable[[], Any]) -> Any:
    """`call()`; any error of the recipe's becomes one that names its file and line."""
    try:
        return call()
    except SyntaxError as error:
        name = path if error.filename == str(file) else error.filename
        if not (name and error.lineno and os.path.isfile(name)):
            raise _in_recipe(file, path, error) from error
        raise ValueError(f"{name}:{error.lineno}: {error.msg}") from error
    except OSError as error:
        if error.filename == file:
            raise  # the recipe itself cannot be read
        raise _in_recipe(file, path, error) from error
    except (Exception, SystemExit) as error:
        raise _in_recipe(file, path, error) from error


def _in_recipe(file: Path, path: str, error: BaseException) -> ValueError:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    where = f"{path}:{lines[-1]}" if lines else path
    text = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    return ValueError(f"{where}: {text}")
