"""Lock: a folder belongs to one run at a time."""

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import Any

from sharding import mesh as meshes

NAME = "lock"
ABSENT = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # where nothing can be locked


class Lock:
    """DIR/lock, which process 0 holds until it ends, however it ends.

    The system lets go of it with the process, so what a kill leaves behind locks nobody out. The
    file stays: removing it would let two runs hold two files of one name.
    """

    def __init__(self):
        self._fd: int | None = None

    def take(self, workdir: Path) -> None:
        """Take the folder if it exists; every process calls it.

        ValueError, naming the owner, if another run has it.
        """
        refused = ""
        if meshes.is_main() and self._fd is None and workdir.is_dir():
            refused = self._take(workdir / NAME)
        if meshes.agree(int(bool(refused))):
            owner = refused or "which process 0 names"
            raise ValueError(
                f"{workdir} is in use by another run: {owner}. Wait for it, stop it, or take "
                f"another --workdir"
            )

    def _take(self, file: Path) -> str:
        """The owner, if it is another run."""
        self._fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in ABSENT:
                print(f"lock       {file}: {error.strerror}; see that no other run uses the folder")
                return ""
            owner = os.pread(self._fd, 1000, 0).decode(errors="replace").strip()
            self._let_go()
            if not isinstance(error, BlockingIOError):
                raise OSError(error.errno, error.strerror, str(file)) from None
            return owner or "it has not said which yet"
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        os.ftruncate(self._fd, 0)
        os.pwrite(
            self._fd, f"pid {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0
        )
        return ""

    def _let_go(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: Any) -> None:
        self._let_go()
