"""Calls shared out over processes; one that dies takes only its own call with it."""

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any


class Crew:
    """So many processes that make calls, each one at a time; with 0, calls are made in this one.

    Processes start when there is work, each with a call of `begin`, and end with the `with` block.
    What they are given and give back is pickled.
    """

    def __init__(self, jobs: int, begin: Callable[[], Any]):
        self._jobs, self._begin = jobs, begin
        self._idle: list[tuple[BaseProcess, Connection]] = []

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: Any) -> None:
        for process, pipe in self._idle:
            pipe.close()
            process.join()

    def each(self, call: Callable[[Any], Any], pieces: Sequence) -> Iterator[tuple[int, Any]]:
        """(i, call(pieces[i])) as they are done, begun in order; an Exception stands for itself.

        Of a process that died it is a RuntimeError that says how.
        """
        if not self._jobs:
            yield from ((i, _outcome(call, piece)) for i, piece in enumerate(pieces))
            return
        left, busy = list(enumerate(pieces))[::-1], {}
        while left or busy:
            while left and len(busy) < self._jobs:
                process, pipe = self._worker()
                i, piece = left.pop()
                pipe.send((call, piece))
                busy[pipe] = i, process
            for pipe in wait(list(busy)):
                i, process = busy.pop(pipe)
                try:
                    result = pipe.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    result = RuntimeError(f"its process ended {_how(process.exitcode)}")
                else:
                    self._idle.append((process, pipe))
                yield i, result

    def _worker(self) -> tuple[BaseProcess, Connection]:
        while self._idle:
            process, pipe = self._idle.pop()
            if process.is_alive():
                return process, pipe
        fresh = multiprocessing.get_context("spawn")  # a fork of a JAX process may hang
        ours, theirs = fresh.Pipe()
        process = fresh.Process(target=_serve, args=(theirs, self._begin), daemon=True)
        process.start()
        theirs.close()
        return process, ours


def _serve(pipe: Connection, begin: Callable[[], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and that ends this
    begin()
    while True:
        try:
            call, piece = pipe.recv()
        except EOFError:
            return
        pipe.send(_outcome(call, piece))


def _outcome(call: Callable[[Any], Any], piece: Any) -> Any:
    try:
        return call(piece)
    except Exception as error:
        traceback.print_exc()
        return RuntimeError(str(error) or repr(error))  # any other may not survive a pickle


def _how(code: int | None) -> str:
    return f"by {signal.Signals(-code).name}" if code and code < 0 else f"with exit code {code}"
