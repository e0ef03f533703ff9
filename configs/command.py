"""The frame of every command: flags in, exit code out, one message for each way to fail."""

import contextlib
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

from absl import (
    flags,
    logging,  # noqa: F401  defines --verbosity
)

from configs import arguments, usage
from configs.load import load

OURS = 1  # exit code of any exception that is no Exit
UNREAD = 128 + signal.SIGPIPE  # of a command whose reader has left, as `| head` does
LONGEST = 3000  # characters of a message


class Exit(Exception):
    """Ends the command with `code` and one message, without a traceback."""

    code = OURS


class UserError(Exit, ValueError):
    """What the user gave is wrong: a flag, a file, a recipe."""

    code = 2


class Unhealthy(Exit):
    """Training went wrong numerically: NaN, spike."""

    code = 3


class LostPeer(Exit):
    """Another process is gone or hangs, or a step never ends."""

    code = 4


class Unsaved(Exit):
    """The last state of the run could not be saved."""

    code = 5


class Corrupt(Exit):
    """A device computed other bits than it should have."""

    code = 6


class Stopped(Exit):
    """A signal asked the command to stop, and it did so in order."""

    def __init__(self, signum: int, message: str = ""):
        self.code = 128 + signum
        super().__init__(message or f"stopped by {signal.Signals(signum).name}")


@contextlib.contextmanager
def user_input() -> Iterator[None]:
    """Around code whose ValueErrors and OSErrors come from what the user gave.

    That is the set-up: configuration, sources, tokenizer, mesh, checkpoint. Around a compiled
    step it would hide our own faults.
    """
    try:
        yield
    except (Exit, BrokenPipeError):  # `status` knows what to do if nobody reads
        raise
    except OSError as error:
        known = error.strerror and error.filename is not None
        text = f"{_short(error.filename)}: {error.strerror.lower()}" if known else str(error)
        raise UserError(text or repr(error)) from error
    except ValueError as error:
        raise UserError(str(error) or repr(error)) from error


def run(
    main: Callable[..., int | None], recipe: str | None = None, examples: Sequence[str] = ()
) -> NoReturn:
    """Run `main` as the command that sys.argv holds, and exit.

    With a `recipe`, the default of --config, the command takes --config and --config.PATH and
    its main is called with the Run. `examples` are arguments for --help, whose first lines are
    the docstring of main's module.
    """
    code = status(main, sys.argv[1:], recipe, examples)
    if code in (LostPeer.code, Unsaved.code):  # exit would wait for the peer, or for the writer
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def leave(error: Exit) -> NoReturn:
    """End the process at once, from whatever thread, though the main one may wait for ever."""

    def tell() -> None:
        os.write(2, _line(f"error: {error}").encode(errors="replace"))
        sys.stdout.flush()

    told = threading.Thread(target=tell, daemon=True)  # it may be that nobody reads any more
    told.start()
    told.join(2)
    os._exit(error.code)


def status(
    main: Callable[..., int | None],
    args: Sequence[str],
    recipe: str | None = None,
    examples: Sequence[str] = (),
    values: flags.FlagValues = flags.FLAGS,
) -> int:
    """`run` without the exit: the exit code, after everything was printed."""
    code = _status(main, args, recipe, examples, values)
    try:
        sys.stdout.flush()  # at exit it would be too late to tell
    except BrokenPipeError:
        code = code or UNREAD
    except OSError as error:
        _silence(sys.stdout)
        _tell(f"error: cannot write the output: {(error.strerror or str(error)).lower()}")
        code = code or UserError.code
    for stream in (sys.stdout, sys.stderr):
        if _unread(stream):
            _silence(stream)
    return code


def _status(
    main: Callable[..., int | None],
    args: Sequence[str],
    recipe: str | None,
    examples: Sequence[str],
    values: flags.FlagValues,
) -> int:
    known = arguments.Known(values, tuple(_own(main, values)), recipe is not None)
    try:
        with user_input():
            given = arguments.parse(args, known)
        if given.help:
            full = given.help == "helpfull"
            doc = sys.modules[main.__module__].__doc__ or ""
            print(values.get_help() if full else usage.text(doc, known, recipe, examples))
            return 0
        if recipe is None:
            return main() or 0
        with user_input():
            config = load(given.source or recipe, given.overrides)
        return main(config) or 0
    except Exit as error:
        if flags.FLAGS["verbosity"].value > 0:
            traceback.print_exc()
        _tell(f"{'' if isinstance(error, Stopped) else 'error: '}{error}")
        return error.code
    except KeyboardInterrupt:
        _tell("stopped by Ctrl-C")
        return 128 + signal.SIGINT
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _unread(sys.stdout):
            return UNREAD
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            traceback.print_exc()
        _tell("this is a fault of the program, not of your input; please report the lines above")
        return OURS


def _own(main: Callable, values: flags.FlagValues) -> list[str]:
    """The flags that the module of `main` defines, in order."""
    name = main.__module__
    defined = values.flags_by_module_dict()
    # absl files the flags of a script under the path by which it was started.
    return [flag.name for flag in defined.get(sys.argv[0] if name == "__main__" else name, [])]


def _short(path: Any) -> str:
    text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else repr(path)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-60:]}"


def _unread(stream: TextIO) -> bool:
    """Whether it leads to a pipe that nobody reads any more."""
    try:
        asked = select.poll()
        asked.register(stream, 0)
        return any(event & select.POLLERR for _, event in asked.poll(0))
    except (OSError, TypeError, ValueError):  # it is no file, or closed
        return False


def _silence(stream: TextIO) -> None:
    """Let the interpreter flush at exit what it holds for it, to nobody."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def _tell(message: str) -> None:
    with contextlib.suppress(OSError):  # `status` asks again
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        print(_line(message), end="", file=sys.stderr, flush=True)


def _line(message: str) -> str:
    if len(message) > LONGEST:  # of a hostile file, say, that it quotes
        message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
    return f"{usage.program().removeprefix('-m ')}: {message}\n"
