"""The child process that renders one chat template, run as a script by text/chat.py.

A template comes with a checkpoint, from whoever made it. Jinja's sandbox keeps it from Python's
objects; this process keeps it from time, memory and files: it may open none once it has begun.
Request and reply are JSON on standard input and output.
"""

import contextlib
import datetime
import encodings.unicode_escape  # noqa: F401, like jinja2.debug imported too late otherwise
import json
import sys
from typing import Any

import jinja2
import jinja2.debug
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

LONGEST = 10_000_000  # characters of a rendered dialogue


class Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what the model says, for training. Here it is what it holds."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Namespace(jinja2.utils.Namespace):
    """Jinja's, without names of Python's own attributes."""

    def __init__(*args: Any, **values: Any):  # `self` may be one of the names
        jinja2.utils.Namespace.__init__(args[0], *args[1:])
        for name, value in values.items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.sandbox.SecurityError(f"{name!r} is no name for a namespace")
        super().__setitem__(name, value)


def environment() -> jinja2.Environment:
    """What chat templates are written for: the settings and functions of transformers' own."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = now
    made.globals["namespace"] = Namespace
    made.globals["dict"] = new_dict
    return made


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON for a model to read: Jinja's own would be for HTML."""
    options = {"ensure_ascii": ensure_ascii, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, indent=indent, **options)


def new_dict(*args: Any, **values: Any) -> dict:
    """`dict` without the attributes of the type."""
    return dict(*args, **values)


def refuse(message: str) -> None:
    """`raise_exception`: how a template says what it cannot take."""
    raise jinja2.TemplateError(str(message))


def now(format: str) -> str:
    """`strftime_now`: the local time."""
    return datetime.datetime.now().strftime(format)


def render(template: str, variables: dict[str, Any]) -> str:
    """The text of a template; RuntimeError if it is too long."""
    parts, size = [], 0
    for part in environment().from_string(template).generate(variables):
        parts.append(part)
        size += len(part)
        if size > LONGEST:
            raise RuntimeError(f"it writes more than {LONGEST} characters")
    return "".join(parts)


def confine(seconds: int, megabytes: int) -> None:
    """No more time, memory or files than these from here on, where the system knows limits."""
    with contextlib.suppress(ImportError):
        import resource

        for kind, most in (
            (resource.RLIMIT_CPU, seconds + 1),
            (resource.RLIMIT_AS, megabytes * 1_000_000),
            (resource.RLIMIT_FSIZE, 0),
            (resource.RLIMIT_NOFILE, 3),  # the standard ones
            (resource.RLIMIT_CORE, 0),
        ):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(kind, (most, most))


def main() -> None:
    """One request to one reply: {"text"} or {"error"}."""
    request = json.load(sys.stdin)
    now("%d %b %Y")  # reads the time zone's file
    confine(request["seconds"], request["megabytes"])
    try:
        reply = {"text": render(request["template"], request["variables"])}
    except MemoryError:
        reply = {"error": "it needs too much memory"}
    except jinja2.TemplateSyntaxError as error:
        reply = {"error": f"line {error.lineno}: {error.message}"}
    except Exception as error:  # whatever a template does wrong
        reply = {"error": str(error) or type(error).__name__}
    json.dump(reply, sys.stdout)


if __name__ == "__main__":
    main()
