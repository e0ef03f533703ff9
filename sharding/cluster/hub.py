"""Hub: the thread of process 0 that hears of every process and tells all what became of one."""

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from sharding.cluster.line import GRACE_S, PLACES, Line, gone, named, silent, tick

HELLO_S = 10.0  # in which whoever connects says who it is
SHOWN = 8  # processes that a message names


@dataclass
class Peer:
    """What the hub knows of a member."""

    line: Line
    process: int
    pid: int
    host: str
    run: dict[str, str]  # what its run is, in parts, so that those of all can be compared
    seen: float  # when it was last heard of
    place: tuple[int, int] = (0, 0)  # step, and which of PLACES
    placed: float = 0.0  # when it said so
    promised: int | None = None  # the step at whose end it waits for word where all stop
    failing: tuple[float, int, str] | None = None  # since when, exit code, why
    ended: bool = False

    def __str__(self) -> str:
        return named(self.process, self.pid, self.host)

    @property
    def failed(self) -> str:
        """How it ended, if it is failing."""
        _, code, why = self.failing
        return f"{self} ended with code {code}: {why}"


def listen(port: int) -> socket.socket:
    """A socket that takes connections of any interface. OSError if the port is taken."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
        )
    return socket.create_server(("", port), backlog=1024)


class Hub:
    """The thread of process 0."""

    def __init__(self, port: int, processes: int, heartbeat: float, timeout: float):
        """Waits `timeout` s for all to come; from then on none may be silent for more than
        `heartbeat` s. OSError if the port is taken."""
        self._listener = listen(port)
        self._processes, self._heartbeat, self._timeout = processes, heartbeat, timeout
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[int, Peer] = {}
        self._strangers: dict[Line, float] = {}  # that have not said who they are, since when
        self._refusal: tuple[float, str] | None = None  # since when, why
        self._started = self._over = self._met_first = False
        self._well = True  # none ended otherwise than all together
        self._signal = 0
        self._stuck: tuple[float, float] | None = None  # since when, seconds of the time-out
        self._thread = threading.Thread(target=self._run, name="hub", daemon=True)
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait until all have read its last word, this long at most."""
        self._thread.join(seconds)

    def _run(self) -> None:
        """Until the run is over, or cannot be."""
        begun = beaten = awake = time.monotonic()
        try:
            while not self._over:
                self._read(tick(self._heartbeat))
                now = time.monotonic()
                if self._refusal:  # those who come a little later hear it too, process 0 for sure
                    self._over = self._met_first and now > self._refusal[0] + GRACE_S
                elif not self._started and now > begun + self._timeout:
                    self._refuse(self._missing())
                elif self._started and now - awake < self._heartbeat / 2:
                    self._judge(now)  # unless this process was asleep itself
                if self._started and now - beaten >= tick(self._heartbeat):
                    beaten = now
                    self._tell("beat")
                for line in [
                    one for one, since in self._strangers.items() if now > since + HELLO_S
                ]:
                    self._close(line)
                awake = time.monotonic()
            # To close before the others do would take back what was told them last.
            while self._peers and time.monotonic() < now + GRACE_S:
                self._read(0.1)
        finally:
            for line in (*self._strangers, *(peer.line for peer in self._peers.values())):
                line.close()
            self._listener.close()
            self._selector.close()

    def _tell(self, kind: str, **values: object) -> None:
        for peer in self._peers.values():
            peer.line.send(kind, **values)

    def _end(self, kind: str, **values: object) -> None:
        """The last word to all."""
        self._tell(kind, **values)
        self._over = True

    def _end_of(self, peer: Peer, otherwise: str = "") -> None:
        """The last word is that of a peer that fails, if it does."""
        why, code = (peer.failed, peer.failing[1]) if peer.failing else (otherwise, 0)
        self._end("lost", process=peer.process, why=why, code=code)

    def _refuse(self, why: str) -> None:
        """Let nobody begin."""
        self._refusal = time.monotonic(), why
        self._tell("refused", why=why)

    def _read(self, seconds: float) -> None:
        """What comes; waits for it no longer than this."""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is not self._listener:
                self._hear(key.fileobj)
                continue
            with contextlib.suppress(OSError):
                line = Line(self._listener.accept()[0])
                self._strangers[line] = time.monotonic()
                self._selector.register(line, selectors.EVENT_READ)

    def _hear(self, line: Line) -> None:
        messages = line.receive()
        if messages and line in self._strangers:
            messages = messages[1:] if self._greet(line, messages[0]) else None
        peer = next((peer for peer in self._peers.values() if peer.line is line), None)
        if messages is None:
            self._close(line, peer)
        for message in messages or ():
            handle = self._handlers().get(str(message.get("kind")))
            if handle and peer:
                peer.seen = time.monotonic()
                handle(peer, message)

    def _close(self, line: Line, peer: Peer | None = None) -> None:
        self._selector.unregister(line)
        line.close()
        self._strangers.pop(line, None)
        if peer:
            del self._peers[peer.process]
            self._well = self._well and not peer.ended
            # Who leaves before the start may come again; in the end it is told as missing.
            if self._started and not (self._over or peer.ended):
                self._end_of(peer, gone(str(peer)))

    def _greet(self, line: Line, hello: dict) -> bool:
        """Make the sender of a hello a peer. False if it cannot be one."""
        try:
            process, processes, pid = (int(hello[key]) for key in ("process", "processes", "pid"))
            run = {str(part): str(value) for part, value in hello["run"].items()}
            peer = Peer(line, process, pid, str(hello["host"]), run, time.monotonic())
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
            return False  # somebody else
        if self._started:
            line.send("late")
            return False
        self._met_first = self._met_first or process == 0
        wrong = "" if self._refusal else self._unlike(peer, processes)
        if wrong:
            self._refuse(wrong)
        if self._refusal:
            line.send("refused", why=self._refusal[1])
            return True  # the connection stays until that was read
        del self._strangers[line]
        self._peers[process] = peer
        if len(self._peers) == self._processes:
            self._start()
        return True

    def _unlike(self, peer: Peer, processes: int) -> str:
        """What keeps `peer`, which was told this number of processes, from joining the others."""
        if processes != self._processes:
            return (
                f"{peer} was started with --processes={processes}, process 0 with "
                f"--processes={self._processes}: all take the same number"
            )
        if peer.process in self._peers:
            return (
                f"--process={peer.process} was started twice, as {self._peers[peer.process]} and "
                f"as {peer}: each takes its own number, 0 to {self._processes - 1}"
            )
        other = next(iter(self._peers.values()), peer)
        parts = sorted(peer.run.keys() | other.run.keys())
        differ = [part for part in parts if peer.run.get(part) != other.run.get(part)]
        if differ:
            return (
                f"{peer} has another configuration than {other}: {some(differ)} differ; start all "
                f"with the same flags, files and versions"
            )
        return ""

    def _start(self) -> None:
        """All are there."""
        self._started = True
        with contextlib.closing(listen(0)) as free:
            port = free.getsockname()[1]
        self._tell("start", port=port, first=str(self._peers[0]))
        for peer in self._peers.values():
            peer.seen = time.monotonic()

    def _missing(self) -> str:
        """Who has not come."""
        lacking = [str(number) for number in range(self._processes) if number not in self._peers]
        here = [str(self._peers[number]) for number in sorted(self._peers)]
        return (
            f"{len(here)} of --processes={self._processes} came within {self._timeout:.0f} s: "
            f"{some(here)}. No --process={some(lacking)}: start all within that time, or give "
            f"them more with --connect_timeout=SECONDS; --coordinator must lead to "
            f"{socket.gethostname()}"
        )

    def _judge(self, now: float) -> None:
        """The last word, if the run cannot go on or all are done."""
        peers = self._peers.values()
        quiet = [peer for peer in peers if now - peer.seen > self._heartbeat]
        failing = sorted((peer for peer in peers if peer.failing), key=lambda peer: peer.failing)
        if quiet:
            peer = quiet[0]
            self._end("lost", process=peer.process, why=silent(str(peer), now - peer.seen))
        elif all(peer.failing or peer.ended for peer in peers):
            self._end("over", well=self._well and not failing)
        elif failing and now - failing[0].failing[0] > GRACE_S:
            self._end_of(failing[0])
        elif self._stuck and all(peer.placed > self._stuck[0] for peer in peers):
            self._end("lost", process=-1, why=self._where(self._stuck[1]))

    def _where(self, seconds: float) -> str:
        """Who keeps a step from its end."""
        step, place = least = min(peer.place for peer in self._peers.values())
        last = [str(peer) for _, peer in sorted(self._peers.items()) if peer.place == least]
        who = f"{some(last)}, and the others are further"
        if len(last) == len(self._peers):
            who = f"all {len(last)} processes"
        return f"no step has ended for {seconds:g} s: still {PLACES[place]} step {step} are {who}"

    def _handlers(self) -> dict[str, Callable[[Peer, dict], None]]:
        """What is done at a message, by its kind."""
        return {
            "beat": self._on_beat,
            "signal": self._on_signal,
            "promised": self._on_promised,
            "stuck": self._on_stuck,
            "failing": self._on_failing,
            "ended": self._on_ended,
        }

    def _on_beat(self, peer: Peer, message: dict) -> None:
        step, place = (int(number) for number in message["place"])
        peer.place, peer.placed = (step, place % len(PLACES)), time.monotonic()

    def _on_signal(self, peer: Peer, message: dict) -> None:
        if not self._signal:
            self._signal = int(message["number"])
            self._tell("promise")

    def _on_promised(self, peer: Peer, message: dict) -> None:
        peer.promised = int(message["step"])
        steps = [other.promised for other in self._peers.values()]
        if None not in steps:
            self._tell("stop", step=max(steps), number=self._signal)

    def _on_stuck(self, peer: Peer, message: dict) -> None:
        self._stuck = self._stuck or (time.monotonic(), float(message["seconds"]))

    def _on_failing(self, peer: Peer, message: dict) -> None:
        peer.failing = time.monotonic(), int(message["code"]), str(message["why"])

    def _on_ended(self, peer: Peer, message: dict) -> None:
        peer.ended = True


def some(names: list[str]) -> str:
    """The first of them."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if names[SHOWN:] else "")
