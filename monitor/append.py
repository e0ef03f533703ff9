"""AppendFile: a file that grows by whole records, whatever ends the process or fills the disk."""

import errno
import logging
import os
from pathlib import Path


class AppendFile:
    """Appends each record with one system call, so that a kill leaves it whole or absent."""

    def __init__(self, path: Path):
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._waiting = b""  # records that the disk would not take
        self._failed = False

    def write(self, record: bytes) -> None:
        """Append `record`; if the disk refuses, say so once and try again with the next record."""
        self._waiting += record
        try:
            size = os.fstat(self._fd).st_size
            if os.write(self._fd, self._waiting) < len(self._waiting):
                os.ftruncate(self._fd, size)  # no half record: all of it goes again later
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._failed:
                logging.error("cannot write %s: %s; kept for later", self._path, error.strerror)
            self._failed = True
        else:
            self._waiting = b""
            self._failed = False

    def close(self) -> None:
        """Close the file. Records that never found room are lost and said to be."""
        if self._waiting:
            self.write(b"")
        if self._waiting:
            logging.error("%d bytes never written to %s", len(self._waiting), self._path)
        os.close(self._fd)
