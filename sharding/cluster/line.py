"""Line: one end of a connection between the hub and a member; a message is a line of JSON.

to the hub:   hello, beat, signal, promised, stuck, failing, ended
to a member:  late, refused, start, beat, promise, stop, lost, over

Nothing secret is said, and nothing that is read is executed.
"""

import contextlib
import json
import socket
import threading
from typing import Any

LONGEST = 1 << 14  # bytes of a message; a hostile sender fills no memory
SEND_S = 5.0  # after which a message that nobody takes is dropped
GRACE_S = 3.0  # in which the others may fail of the same cause, or the cause shows
PLACES = ("reading the data of", "computing")  # what a member does to a step


def tick(heartbeat: float) -> float:
    """Seconds between two beats."""
    return min(heartbeat / 5, 2.0)


def named(process: int, pid: int, host: str) -> str:
    """A process, for people."""
    return f"process {process} (pid {pid} on {host})"


def gone(who: str) -> str:
    """What is known of a process whose connection closed."""
    return f"{who} is gone: its connection closed, as when it is killed"


def silent(who: str, seconds: float) -> str:
    """What is known of a process that does not answer."""
    return f"{who} has been silent for {seconds:.0f} s: it is stopped, hung or cut off"


class Line:
    """One end of a connection."""

    def __init__(self, connected: socket.socket):
        connected.settimeout(SEND_S)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._rest, self._lock = connected, b"", threading.Lock()

    def fileno(self) -> int:
        """For a selector."""
        return self._socket.fileno()

    def send(self, kind: str, **values: Any) -> None:
        """Send a message; whether it arrives, the reading end will know."""
        data = json.dumps({"kind": kind, **values}).encode() + b"\n"
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(data)

    def receive(self) -> list[dict] | None:
        """The messages that have come, once there is something to read; None: it is closed."""
        try:
            data = self._socket.recv(LONGEST)
        except TimeoutError:
            return []
        except OSError:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > LONGEST:
            return None
        try:
            found = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            return None
        return found if all(isinstance(message, dict) for message in found) else None

    def close(self) -> None:
        """Let go of the connection."""
        self._socket.close()
