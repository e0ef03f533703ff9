"""Watch: ends a run that cannot go on, because another process is lost or a step never ends.

The main thread may wait for ever then, in a collective of a device. So another one ends the
process, with exit code 4, the stacks of all threads and one line that names who and where; with
the code of another process where that is a verdict on the run.
"""

import atexit
import contextlib
import faulthandler
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from configs import command
from configs.run import Run, to_json
from sharding.cluster import join
from sharding.cluster.line import GRACE_S, PLACES
from sharding.cluster.member import Member

READS, COMPUTES = range(len(PLACES))
# What one process finds of the whole run, so that the same command would find it again.
VERDICTS = {
    error.code: error
    for error in (command.UserError, command.Unhealthy, command.Unsaved, command.Corrupt)
}


class Watch:
    """While entered, this process is watched, and so are the others that it joined."""

    def __init__(self, step_timeout: float):
        """A step may take `step_timeout` s, counted from the end of the one before; 0: any time."""
        if step_timeout < 0:
            raise ValueError(f"--step_timeout={step_timeout} must be at least 0; 0 sets no limit")
        self._step_timeout = step_timeout
        self._member: Member | None = None
        self._since: float | None = None  # when the step began that must end in time
        self._place = (0, READS)
        self._closed = threading.Event()
        self._ending = threading.Lock()

    def join(
        self, coordinator: str | None, processes: int | None, process: int | None, run: Run,
        *, timeout: float | None, heartbeat: float,
    ) -> None:  # fmt: skip
        """Join the other processes of the run, if there are any, before the first use of a device.

        ValueError, naming who is missing or has another `run`, if they do not come together in
        `timeout` s.
        """
        for name, value in (("connect_timeout", timeout), ("heartbeat", heartbeat)):
            if value is not None and not 1 <= value <= 1e6:
                raise ValueError(f"--{name}={value:g} must be at least 1 second, 1e6 at most")
        own = join.place(coordinator, processes, process)
        if own is None:
            return
        if timeout is None:
            timeout = join.FOUND_S if coordinator is None else join.TYPED_S
        self._member, service = join.meet_all(
            own, parts(run), timeout=timeout, heartbeat=heartbeat, lost=self._lost
        )
        join.start_jax(own, service, heartbeat)

    def at(self, step: int, place: int) -> None:
        """The main thread READS or COMPUTES `step`."""
        self._place = (step, place)
        if place == READS:
            self._since = time.monotonic()
        if self._member:
            self._member.at(step, place)

    @contextlib.contextmanager
    def rest(self) -> Iterator[None]:
        """Time that belongs to no step, and has no limit."""
        self._since = None
        yield
        self._since = time.monotonic()

    def done(self) -> None:
        """There are no more steps."""
        self._since = None

    def stop(self, step: int, signum: int) -> int:
        """The signal for which the run stops at the end of `step`, the same in all processes; 0 if
        it goes on. `signum`: a signal that this process received, or 0."""
        return self._member.stop(step, signum) if self._member else signum

    def __enter__(self) -> "Watch":
        if self._step_timeout:
            threading.Thread(target=self._time_steps, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, _: Any) -> None:
        """All end together, or else those that do not are told why."""
        self._since = None
        if self._member and (error is None or isinstance(error, command.Stopped)):
            if self._member.end():
                jax.distributed.shutdown()
            else:
                leave_at_exit(getattr(error, "code", 0))
        elif self._member:
            code = error.code if isinstance(error, command.Exit) else command.OURS
            self._member.fail(code, f"{error}" or repr(error))
            leave_at_exit(code)
        self._closed.set()
        if self._member:
            self._member.leave()

    def _time_steps(self) -> None:
        """Ends the process when a step takes too long."""
        while not self._closed.wait(min(self._step_timeout / 10, 1)):
            since = self._since
            if since is None or time.monotonic() - since < self._step_timeout:
                continue
            if self._member:
                self._member.stuck(self._step_timeout)
                self._closed.wait(2 * GRACE_S)  # in which it is said whose fault it is
            step, place = self._place
            self._lost(
                f"no step has ended for {self._step_timeout:g} s: still {PLACES[place]} step {step}"
            )

    def _lost(self, why: str, code: int = 0) -> None:
        """End the process; called by other threads than the main one. `code`: that of a process
        that failed."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # another thread is at it
        why = " ".join(why.split())
        if code in VERDICTS:
            command.leave(VERDICTS[code](why))
        stacks = threading.Thread(target=dump_stacks, daemon=True)  # perhaps nobody reads them
        stacks.start()
        stacks.join(2)
        again = "the same command goes on from the last save"
        command.leave(command.LostPeer(f"{why}; {again}"))


def dump_stacks() -> None:
    """Where every thread is, on stderr."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        faulthandler.dump_traceback(sys.__stderr__)


def parts(run: Run) -> dict[str, str]:
    """What must be the same in all processes, each part in few bytes."""
    made = {**to_json(run), "jax": jax.__version__}
    return {
        part: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
        for part, value in made.items()
    }


def leave_at_exit(code: int) -> None:
    """End with `code` before JAX would wait at exit for processes that do not come."""

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)  # the last that is registered is the first that is called
