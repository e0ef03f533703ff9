"""Member: this process among those of a run."""

import os
import selectors
import socket
import threading
import time
from collections.abc import Callable

from sharding.cluster.hub import Hub
from sharding.cluster.line import GRACE_S, PLACES, Line, gone, silent, tick

RETRY_S = 0.2


def meet(
    address: tuple[str, int], processes: int, process: int, run: dict[str, str], timeout: float
) -> tuple[Line, dict]:
    """The line to the hub at `address`, and what it said when all had come, each with this `run`.

    ValueError if nobody answers within `timeout` s, or the hub refuses.
    """
    deadline, why = time.monotonic() + timeout, ""
    own = {"process": process, "processes": processes, "run": run}
    own |= {"pid": os.getpid(), "host": socket.gethostname()}
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = Line(socket.create_connection(address, timeout=max(min(left, 5), 0.1)))
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            time.sleep(RETRY_S)
            continue
        line.send("hello", **own)
        # The hub, which may have begun later, says when it has waited long enough.
        answers = listen(line, time.monotonic() + timeout + GRACE_S)
        kind = answers[0].get("kind") if answers else None
        if kind == "start":
            return line, answers[0]
        line.close()
        if kind == "refused":
            raise ValueError(str(answers[0].get("why")))
        why = "whoever listens there is not process 0 of this run, or ended"
        if kind == "late":  # before a restarted run begins, the one before may have to end
            why = "the run there has all its processes, and goes on"
        time.sleep(RETRY_S)
    host, port = address
    raise ValueError(
        f"no process 0 at --coordinator={host}:{port} within {timeout:.0f} s: {why}. Start all "
        f"processes within that time, or give them more with --connect_timeout=SECONDS"
    )


def listen(line: Line, deadline: float) -> list[dict] | None:
    """The next messages; None if none come, or the connection closes."""
    with selectors.DefaultSelector() as selector:
        selector.register(line, selectors.EVENT_READ)
        while selector.select(max(deadline - time.monotonic(), 0)):
            messages = line.receive()
            if messages or messages is None:
                return messages
    return None


class Member:
    """The thread that tells the hub that this process lives, and hears what became of others."""

    def __init__(
        self, line: Line, process: int, first: str, heartbeat: float, hub: Hub | None,
        lost: Callable[[str, int], None],
    ):  # fmt: skip
        """`lost(why, code)` is called, by this thread, when the run cannot go on; `code` is that
        of a process that failed, else 0. `first` names process 0, which alone has a `hub`."""
        self.process = process
        self._line, self._first, self._heartbeat, self._hub = line, first, heartbeat, hub
        self._lost = lost
        self._place = (0, 0)
        self._turn = threading.Condition()
        self._done = 0  # steps
        self._told = self._failing = self._cut = False
        self._promised: int | None = None
        self._halt: tuple[int, int] | None = None  # step, number of the signal
        self._over = threading.Event()
        self._well = False
        self._code = 0  # with which another process failed
        threading.Thread(target=self._run, name="member", daemon=True).start()

    def at(self, step: int, place: int) -> None:
        """This process is in `step`, doing PLACES[place]."""
        self._place = (step, place)

    def stop(self, step: int, signum: int) -> int:
        """The signal for which all stop at the end of `step`, which this process has reached, or
        0. `signum` is a signal that this process received itself, 0 for none.

        All stop after the first step that no process has left behind. A process that is asked
        promises how far it goes before it hears which that is: at most to the end of the step
        that it is in. It waits for nothing that another step of its own would have to give.
        """
        with self._turn:
            self._done = step
            if signum and not self._told:
                self._told = True
                self._line.send("signal", number=signum)
            while self._promised is not None and self._halt is None and step >= self._promised:
                self._turn.wait()
            return self._halt[1] if self._halt and self._halt[0] == step else 0

    def stuck(self, seconds: float) -> None:
        """No step has ended for so long; `lost` is called when it is known whose fault that is."""
        self._beat()
        self._line.send("stuck", seconds=seconds)

    def fail(self, code: int, why: str) -> None:
        """This process ends with an error of its own; waits until the others know.

        If the cause is that another is lost, `lost` is called instead.
        """
        self._failing = True
        self._line.send("failing", code=code, why=why[:1000])
        self._wait(2 * GRACE_S + tick(self._heartbeat))

    def end(self) -> bool:
        """This process is done; waits for the others, and says whether they are done as well."""
        self._line.send("ended")
        self._wait(None)
        return self._well

    def _wait(self, seconds: float | None) -> None:
        """Until the run is over; for ever if `lost` is called, which ends the process."""
        self._over.wait(seconds)
        if self._cut:
            threading.Event().wait()

    def leave(self) -> None:
        """Close the line, at the end; process 0 stays until the others have read its last word."""
        self._over.set()
        self._line.close()
        if self._hub:
            self._hub.join(2 * GRACE_S)

    def _run(self) -> None:
        """Until the run is over, or cannot go on."""
        try:
            why = self._listen()
        except Exception as error:  # else the run would wait for a word that never comes
            why = f"this process hears no others any more: {error!r}"
        if why and not self._over.is_set():
            self._cut = True
            self.leave()
            self._lost(why, self._code)

    def _listen(self) -> str:
        """Why the run cannot go on, "" if it is over."""
        seen = beaten = awake = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._line, selectors.EVENT_READ)
            while not self._over.is_set():
                ready = selector.select(tick(self._heartbeat))
                messages = self._line.receive() if ready else []
                now = time.monotonic()
                if messages is None:
                    return gone(self._first)
                for message in messages:
                    seen = now
                    if why := self._hear(message):
                        return why
                if now - seen > self._heartbeat and now - awake < self._heartbeat / 2:
                    return silent(self._first, now - seen)  # and it is not this one that slept
                if now - beaten >= tick(self._heartbeat):
                    beaten = now
                    self._beat()
                awake = time.monotonic()
        return ""

    def _beat(self) -> None:
        step, place = self._place
        self._line.send("beat", place=[step, min(place, len(PLACES) - 1)])

    def _hear(self, message: dict) -> str:
        """Why the run cannot go on, "" if it can."""
        match message:
            case {"kind": "promise"}:
                with self._turn:
                    self._promised = self._done + 1
                self._line.send("promised", step=self._promised)
            case {"kind": "stop", "step": int(step), "number": int(number)}:
                with self._turn:
                    self._halt = step, number
                    self._turn.notify_all()
            case {"kind": "over", "well": bool(well)}:
                self._well = well
                self._over.set()
            case {"kind": "lost", "process": self.process} if self._failing:
                self._over.set()
            case {"kind": "lost", "process": self.process, "why": str(why)}:
                return f"the other processes have given this one up: {why}"
            case {"kind": "lost", "why": str(why)}:
                self._code = int(message.get("code", 0))
                return why
        return ""
