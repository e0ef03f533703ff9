"""Checker: runs the programs that a model wrote, each in a process with limits, and judges them.

What confines them, and what does not, is said in confine.py.
"""

import concurrent.futures
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SPARE = 10.0  # seconds beyond its limit that a child has to start and to clean up
ENVIRONMENT = {"PATH": os.defpath, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Verdict:
    """How a program ended."""

    passed: bool
    why: str  # it did not pass
    confined: tuple[str, ...] = ()  # by what, of "limits", "namespaces", "landlock"


def check(program: str, timeout: float, memory: int) -> Verdict:
    """Run a Python program; it passes if it comes to its end within `timeout` s and `memory` MiB.

    Nothing of what it prints is kept, and nothing that it starts outlives it.
    """
    job = {"program": program, "timeout": timeout, "memory": memory, "key": secrets.token_hex(16)}
    with tempfile.TemporaryDirectory(prefix="meshlm-", ignore_cleanup_errors=True) as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-B", str(Path(__file__).with_name("confine.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        try:
            out, _ = child.communicate(json.dumps(job).encode(), timeout=timeout + SPARE)
        except subprocess.TimeoutExpired:
            out = b""
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    try:
        answer = json.loads(out)
    except ValueError:
        return Verdict(False, "its process was killed")
    return Verdict(answer["passed"], answer["why"], tuple(answer["confined"]))


def check_all(programs: Sequence[str], timeout: float, memory: int) -> list[Verdict]:
    """`check` of each, as many at a time as there are processors."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda program: check(program, timeout, memory), programs))
