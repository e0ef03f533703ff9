"""The folder that keeps work which can be repeated: trained tokenizers, unpacked files, indexes.

`$MESHLM_CACHE`, or `~/.cache/meshlm`. A folder that cannot be written costs time, never a run.
"""

import atexit
import functools
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path


def folder() -> Path:
    """Where cached files live; it need not exist."""
    return Path(os.environ.get("MESHLM_CACHE") or Path.home() / ".cache" / "meshlm")


@functools.cache
def scratch() -> Path:
    """A folder that lives as long as this process, for what the cache folder refused."""
    path = tempfile.mkdtemp(prefix="meshlm-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


def write(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a file that appears at `path` whole or not at all; OSError if it cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        fill(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
