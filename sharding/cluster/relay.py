"""Relay: JAX's way to its service in process 0, which stays open when that process dies.

JAX aborts a process in the moment in which this connection closes, before anybody can say who is
lost. Behind a relay it sees silence instead; its own heartbeat, a longer one, is what is left if
the hub and its members should fail.
"""

import contextlib
import socket
import threading
import time

RETRY_S = 0.1


def reach(address: tuple[str, int], seconds: float) -> None:
    """Return once something listens at `address`. ValueError if nothing does in time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(address, timeout=seconds).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"process 0 answers, but not at its port {address[1]}, where JAX listens: "
                    f"{error}; let the hosts of a run reach all ports of each other"
                ) from None
            time.sleep(RETRY_S)


class Relay:
    """Listens on `port` of this host and passes on to `address`, there and back."""

    def __init__(self, address: tuple[str, int]):
        self._address = address
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._kept: list[socket.socket] = []  # open, though the other end is gone
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            try:
                far = socket.create_connection(self._address, timeout=30)
            except OSError:
                near.close()  # JAX tries again
                continue
            far.settimeout(None)
            self._kept.append(near)
            for ends in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=ends, name="relay", daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        if source in self._kept:  # JAX closed its end
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
