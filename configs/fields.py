"""The fields of nested, frozen config dataclasses: addressed by path, as text and as JSON.

"model.arch.norm.eps" is the path of a field. A field that is a dataclass itself is a group; one
with a class method `by_name` can be set as a whole, to the group that has a name: its `name`.
Every error is a ValueError that begins with the path.
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_EXACT = 2**53  # largest integer that JSON readers and floats keep exactly
_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_NOUNS = {
    bool: ("true or false", "true or false"),
    int: ("an integer", "integers"),
    float: ("a finite number", "finite numbers"),
    str: ("a non-empty text", "texts"),
}


@functools.cache
def kinds(cls: type) -> dict[str, Any]:
    """The annotated type of every field of a dataclass, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def group(kind: Any) -> type | None:
    """The dataclass in `Group` or `Group | None`; None for the type of a plain field."""
    return next((k for k in _choices(kind) if dataclasses.is_dataclass(k)), None)


def leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, type, value) of every plain field, depth first; an absent group counts as one."""
    for name, kind in kinds(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, join(path, name))
        else:
            yield join(path, name), kind, value


def spelled(config: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, text) of every plain field, depth first; a group that has a name counts as one."""
    for name, kind in kinds(type(config)).items():
        value, where = getattr(config, name), join(path, name)
        if hasattr(kind, "by_name") and value.name:
            yield where, value.name
        elif dataclasses.is_dataclass(value):
            yield from spelled(value, where)
        else:
            yield where, spell(value)


def paths(cls: type, path: str = "") -> Iterator[str]:
    """The path of every plain field below a config class."""
    for name, kind in kinds(cls).items():
        inner = group(kind)
        yield from paths(inner, join(path, name)) if inner else [join(path, name)]


def nearest(cls: type, path: str) -> str | None:
    """The path that was probably meant: longer at the front, or the closest spelling."""
    known = list(paths(cls))
    name = path.rpartition(".")[2]
    longer = [p for p in known if name and p.endswith("." + path)]
    same = [p for p in known if p.rpartition(".")[2] == name]
    found = longer or _corrected(cls, path) or same or difflib.get_close_matches(path, known, 1)
    if not found:
        last = {p.rpartition(".")[2]: p for p in reversed(known)}
        found = [last[match] for match in difflib.get_close_matches(name, last, 1)]
    return found[0] if found else None


def override(config: Any, texts: Mapping[str, str]) -> Any:
    """`config` with the fields at these paths set from text, checked in their final combination.

    Groups are set by name before any field in them is.
    """
    kinds_at = {path: _find(type(config), path) for path in texts}
    by_name = {path: kind.by_name for path, kind in kinds_at.items() if hasattr(kind, "by_name")}
    for path in sorted(by_name, key=lambda path: path.count(".")):
        try:
            value = by_name[path](texts[path])
        except ValueError as error:
            raise ValueError(f"{path}={shown(texts[path])} {error}") from None
        nested = functools.reduce(lambda tree, name: {name: tree}, path.split(".")[::-1], value)
        config = _replaced(type(config), config, nested, "")
    tree: dict[str, Any] = {}
    for path, text in texts.items():
        if path in by_name:
            continue
        kind = kinds_at[path]
        *groups, name = path.split(".")
        node = tree
        for step in groups:
            node = node.setdefault(step, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path}={text}: its group cannot be set and be none as well")
        if name in node:
            raise ValueError(f"{path}={text}: its fields cannot be set and be none as well")
        try:
            node[name] = parse(kind, text)
        except ValueError as error:
            now = {p: value for p, _, value in leaves(config)}.get(path)
            example = "" if now in ((), "", None) else f", such as {spell(now)}"
            raise ValueError(f"{path}={shown(text)} {error}{example}") from None
    return _replaced(type(config), config, tree, "")


def parse(kind: Any, text: str) -> Any:
    """The value of type `kind` that `text` spells. ValueError, "must be an integer" if none."""
    choices = _choices(kind)
    text = text.strip()
    if type(None) in choices and text.lower() == "none":
        return None
    list_kind = next((k for k in choices if typing.get_origin(k) is tuple), None)
    scalars = [k for k in choices if k in _NOUNS]
    if list_kind and not (scalars and "," not in text):
        item_kind = typing.get_args(list_kind)[0]
        items = text.split(",") if text else []
        return tuple(_parsed(item_kind, item.strip(), kind) for item in items)
    return _parsed(scalars[0] if scalars else None, text, kind)


def spell(value: Any) -> str:
    """The text that `parse` reads back as `value`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(map(spell, value))
    return str(value)


def encode(config: Any) -> dict[str, Any]:
    """A config as plain JSON values: groups as objects, tuples as lists."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return encode(value)
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return {name: plain(getattr(config, name)) for name in kinds(type(config))}


def decode(cls: type, data: Any, path: str = "") -> Any:
    """The config of class `cls` that `encode` wrote; a missing field takes its default."""
    if not isinstance(data, dict):
        where = f"{path}=" if path else ""
        raise ValueError(f"{where}{shown(data)} must be an object, the fields of {cls.__name__}")
    values = {}
    for name, value in data.items():
        if name not in kinds(cls):
            guess = nearest(cls, name)
            raise _unknown(path, cls, join(path, name), guess and join(path, guess))
        values[name] = _decoded(kinds(cls)[name], value, join(path, name))
    return _made(path, cls, values)


def check_types(config: Any, path: str = "") -> None:
    """Raise ValueError unless every field holds a value of its annotated type.

    Python does not look at the annotations when a recipe makes a config, and the string
    sources="books" would be taken for five sources.
    """
    for name, kind in kinds(type(config)).items():
        value, inner, where = getattr(config, name), group(kind), join(path, name)
        if inner is None:
            plain = list(value) if isinstance(value, tuple) else value
            if isinstance(value, list):
                raise ValueError(f"{where}={shown(value)} must be a tuple, not a list")
            _decoded(kind, plain, where)
        elif type(value) is inner:
            check_types(value, where)
        elif not (value is None and type(None) in _choices(kind)):
            raise ValueError(f"{where}={shown(value)} must be a {inner.__name__}")


def noun(kind: Any) -> str:
    """What a value of this type is called in a message."""
    words = []
    for choice in _choices(kind):
        if choice is type(None):
            words.append("none")
        elif typing.get_origin(choice) is tuple:
            words.append(f"comma-separated {_NOUNS[typing.get_args(choice)[0]][1]}")
        elif group(choice):
            words.append(f"a {group(choice).__name__}")
        else:
            words.append(_NOUNS[choice][0])
    return " or ".join(words)


def join(path: str, name: str) -> str:
    """The path of the field `name` of the group at `path`."""
    return f"{path}.{name}" if path else name


def shown(value: Any) -> str:
    """`value` as a message shows it: quoted if text, and short."""
    return brief(repr(value))


def brief(text: str) -> str:
    """`text` on one line, without control characters, and short."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 80 else text[:60] + "..." + text[-15:]


def _choices(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    is_union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return typing.get_args(kind) if is_union else (kind,)


def _corrected(cls: type, path: str) -> list[str]:
    """The existing path whose every name is the closest to the one in `path`, or nothing."""
    done, kind = "", cls
    for step in path.split("."):
        if group(kind) is None:
            return []
        names = kinds(group(kind))
        close = [step] if step in names else difflib.get_close_matches(step, names, 1)
        if not close:
            return []
        done, kind = join(done, close[0]), names[close[0]]
    return [done]


def _find(root: type, path: str) -> Any:
    """The type of the field at `path`."""
    done, kind = "", root
    for step in path.split("."):
        inner = group(kind)
        if inner is None:
            raise ValueError(f"{path}: {done} is {noun(kind)} and has no fields")
        if step not in kinds(inner):
            raise _unknown(done, inner, path, nearest(root, path))
        done, kind = join(done, step), kinds(inner)[step]
    if group(kind) and type(None) not in _choices(kind) and not hasattr(kind, "by_name"):
        inside = ", ".join(join(path, name) for name in kinds(group(kind)))
        raise ValueError(f"{path} is a group of fields, not a field; set one of {inside}")
    return kind


def _unknown(path: str, cls: type, wrong: str, guess: str | None) -> ValueError:
    """The error for the field `wrong`, which the group `cls` at `path` does not have."""
    hint = f", did you mean {guess}?" if guess else ";"
    there = f"{path} has" if path else "there are"
    return ValueError(f"no field {brief(wrong)}{hint} {there} {', '.join(kinds(cls))}")


def _parsed(kind: Any, text: str, whole: Any) -> Any:
    """One item. ValueError says what the `whole` field must be."""
    value: Any = None
    if kind is bool:
        value = _BOOLS.get(text.lower())
    elif kind is int:
        value = _integer(text)
    elif kind is float:
        value = _number(text)
    elif kind is str:
        value = text or None
    if value is None:
        raise ValueError(f"must be {noun(whole)}")
    return value


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _integer(text: str) -> int | None:
    """Also 1_000, and 1e6 where integral."""
    try:
        value = int(text)
    except ValueError:
        number = _number(text)
        if number is None or not number.is_integer():
            return None
        value = int(number)
    return value if abs(value) <= _EXACT else None


def _decoded(kind: Any, data: Any, path: str) -> Any:
    """The value of one field from JSON."""
    for choice in _choices(kind):
        if group(choice) and data is not None:
            return decode(choice, data, path)
        if typing.get_origin(choice) is tuple and isinstance(data, list):
            item_kind = typing.get_args(choice)[0]
            return tuple(_decoded(item_kind, item, path) for item in data)
        if choice is float and type(data) is float and math.isfinite(data):
            return data
        if choice is float and type(data) is int and abs(data) <= _EXACT:
            return float(data)
        if choice is int and type(data) is int and abs(data) <= _EXACT:
            return data
        if choice in (bool, str, type(None)) and type(data) is choice:
            return data
    raise ValueError(f"{path}={shown(data)} must be {noun(kind)}")


def _replaced(cls: type, config: Any, tree: dict[str, Any], path: str) -> Any:
    """`config` (None: the defaults of `cls`) with nested values put in, from the inside out."""
    changes = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            inner = group(kinds(cls)[name])
            value = _replaced(inner, getattr(config, name, None), value, join(path, name))
        changes[name] = value
    make = cls if config is None else functools.partial(dataclasses.replace, config)
    return _made(path, make, changes)


def _made(path: str, make: Callable[..., Any], values: dict[str, Any]) -> Any:
    """`make(**values)`, whose own check names the fields but not the path."""
    try:
        return make(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path else str(error)) from error
