"""The command line: which arguments set fields of the Run and which are absl flags.

Every error is a ValueError that names the argument and what would be right.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from absl import flags

from configs import fields
from configs.run import Run

HELP = ("help", "h", "helpshort", "helpfull", "?")
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2212"  # what word processors make of "-"


@dataclass
class Arguments:
    """A command line taken apart."""

    source: str = ""  # of --config
    overrides: dict[str, str] = field(default_factory=dict)  # of --config.PATH
    help: str = ""  # "help" or "helpfull" if asked for


@dataclass(frozen=True)
class Known:
    """The flags that a command has."""

    values: flags.FlagValues
    own: tuple[str, ...] = ()  # defined by the command itself
    config: bool = True  # takes --config

    def is_config(self, name: str) -> bool:
        return self.config and (name == "config" or name.startswith("config."))


def parse(args: Sequence[str], known: Known) -> Arguments:
    """Take `args` apart, and set the absl flags among them."""
    asked = [name for name in HELP if {f"-{name}", f"--{name}"} & set(args)]
    if asked:
        return Arguments(help="helpfull" if "helpfull" in asked else "help")
    try:
        expanded = known.values.read_flags_from_files(list(args))
    except (flags.Error, UnicodeDecodeError) as error:
        raise ValueError(f"--flagfile: {str(error).removeprefix('ERROR:: ')}") from error
    may_repeat = expanded != list(args)  # what a flag file sets is a default: the later value wins
    result, seen, plain = Arguments(), set(), []
    for name, value in _pairs(expanded, known):
        flag = None if known.is_config(name) else known.values[name]
        key = name if flag is None else flag.name
        if key in seen and not (may_repeat or isinstance(flag, flags.MultiFlag)):
            raise ValueError(f"--{name} is given twice, a flag can be given once")
        seen.add(key)
        if flag is not None:
            plain.append(_checked(name, value, flag))
        elif name == "config":
            result.source = value
        else:
            result.overrides[name.removeprefix("config.")] = value
    try:
        known.values(["command", *plain])
    except flags.Error as error:
        raise ValueError(_reworded(str(error), known.values)) from error
    return result


def _pairs(args: list[str], known: Known) -> Iterator[tuple[str, str]]:
    """Name and value of every flag, however it is written."""
    rest = list(reversed(args))
    while rest:
        arg = rest.pop()
        if arg == "--" and not rest:
            return
        if not re.match(r"--?[A-Za-z_]", arg):
            raise _positional(arg, known)
        name, equals, value = arg.lstrip("-").partition("=")
        negated = name.removeprefix("no")
        if not known.is_config(name):
            if name not in known.values and _is_boolean(negated, known) and not equals:
                name, equals, value = negated, "=", "false"
            elif name not in known.values:
                raise _unknown(name, known)
            elif _is_boolean(name, known) and not equals:
                equals, value = "=", "true"
        if not equals and rest and not re.match(r"--|-[A-Za-z_]", rest[-1]):
            equals, value = "=", rest.pop()
        if not equals:
            raise ValueError(f"--{name} has no value, write --{name}=VALUE")
        if not value and (name == "config" or not known.is_config(name)):
            raise ValueError(f"--{name}= is empty, write a value or leave the flag out")
        yield name, value


def _is_boolean(name: str, known: Known) -> bool:
    return name in known.values and bool(known.values[name].boolean)


def _checked(name: str, value: str, flag: flags.Flag) -> str:
    """The flag as absl reads it. ValueError if its parser refuses the value."""
    try:
        flag.parser.parse(value)
    except (ValueError, TypeError) as error:
        allowed = getattr(flag.parser, "enum_values", ())
        right = "true or false" if flag.boolean else flag.parser.syntactic_help or str(error)
        right = f"one of {', '.join(allowed)}" if allowed else right
        raise ValueError(f"--{name}={fields.brief(value)} must be {right}") from None
    return f"--{name}={value}"


def _reworded(error: str, values: flags.FlagValues) -> str:
    """What an absl validator said, in our words where it is a required flag."""
    required = re.match(r"flag --(\w+)=None: .*must have a value other than None", error)
    if not required:
        return error.removeprefix("flag ")
    return f"--{required[1]}=VALUE is required: {values[required[1]].help}"


def _positional(arg: str, known: Known) -> ValueError:
    """The error for an argument that is no flag."""
    arg = fields.brief(arg)
    name, equals, _ = arg.lstrip("-" + _DASHES).partition("=")
    path = fields.nearest(Run, name.removeprefix("config.")) if equals else None
    if arg[0:1] in tuple(_DASHES):
        return ValueError(f"{arg} does not begin with the dash of the keyboard, write --{name}")
    if equals and (name == "config" or name in known.own):
        return ValueError(f"{arg} is no flag, write --{arg.lstrip('-')}")
    if known.config and path:
        return ValueError(f"{arg} is no flag, write --config.{path}=VALUE")
    if known.config and re.search(r"\.(py|json)(:|$)", arg):
        return ValueError(f"{arg} stands without a flag, write --config={arg}")
    return ValueError(f"{arg!r} stands without a flag, every argument is --NAME=VALUE; see --help")


def _unknown(name: str, known: Known) -> ValueError:
    """The error for a flag that does not exist, with the nearest that does."""
    own = [*known.own, *(["config"] if known.config else []), "help"]
    guess = difflib.get_close_matches(name, own, 1)
    if known.config:
        head, _, tail = name.partition(".")
        is_prefix = bool(tail) and difflib.get_close_matches(head, ["config"], 1)
        path = tail if is_prefix else name
        meant = path if path in fields.paths(Run) else fields.nearest(Run, path)
        if meant and (is_prefix or not guess or meant.rpartition(".")[2] == name):
            guess = [f"config.{meant}"]
    guess = guess or difflib.get_close_matches(name, list(known.values), 1)
    hint = f", did you mean --{guess[0]}?" if guess else ";"
    return ValueError(
        f"no flag --{fields.brief(name)}{hint} there are {', '.join(f'--{flag}' for flag in own)}"
    )
