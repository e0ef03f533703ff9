"""The process in which a program of a model runs: `python -I confine.py`, the job on its stdin.

checker.py starts it, in a folder of its own; it imports the standard library alone. It confines
itself and then forks twice: this process watches the clock, the next is the first of the process
namespace (when it ends, all in it end), and the last runs the program.

What confines a program: limits of CPU time, memory, file size, open files and processes (root has
no limit of processes); namespaces of users, processes and network (nothing outside can be reached
or signalled); Landlock (nothing outside its folder can be written). The last two need Linux and a
system that grants them: `confined` in the answer says which were had. What does not: it can read
what the user can read, and one made for the purpose could forge its verdict. This guards against
accidents of a model, not against attacks.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys
import time

FILE_BYTES, FILES, PROCESSES = 16 << 20, 256, 64
ANSWER = 4096  # bytes of an answer at most: what one write to a pipe leaves whole
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 8, 38  # linux/prctl.h
NEWUSER, NEWPID, NEWNET, NEWIPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000  # linux/sched.h
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # system calls of every machine


def main() -> None:
    """Run the job and print the answer: {"passed", "why", "confined"}."""
    job = json.load(sys.stdin)
    confined = confine(job)
    reader, writer = os.pipe()
    first = os.fork()
    if not first:
        os.close(reader)
        be_first(job, writer)
    os.close(writer)
    deadline = time.monotonic() + job["timeout"]
    said = listen(reader, deadline)
    status = end(first, deadline if said == b"" else 0)
    if said is None:
        why = f"timed out after {job['timeout']:g} s"
    else:
        why = read(said, job["key"], status)
    print(json.dumps({"passed": why == "", "why": why, "confined": confined}))


def confine(job: dict) -> list[str]:
    """Give up, for this process and all after it, what a program needs not; tells what went."""
    gone = ["limits"]
    limits = {
        resource.RLIMIT_CPU: int(job["timeout"]) + 1,
        resource.RLIMIT_AS: job["memory"] << 20,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_CORE: 0,
    }
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if landlock(libc):
            gone.append("landlock")
        if namespaces(libc):
            gone.append("namespaces")
            limits[resource.RLIMIT_NPROC] = PROCESSES  # elsewhere it counts all of the user's
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for limit, most in limits.items():
        with contextlib.suppress(ValueError, OSError):  # lower already, or another system
            resource.setrlimit(limit, (most, most))
    return gone


def namespaces(libc: ctypes.CDLL) -> bool:
    """See no process and no network but one's own; of root, be a user that nobody else is.

    The kernel limits the processes of anybody but root. What is kept of root is to read all files:
    Python itself may lie where only root can read.
    """
    own = NEWPID | NEWNET | NEWIPC
    if os.getuid() or libc.unshare(own):
        return libc.unshare(NEWUSER | own) == 0
    uid = 1 << 30 | os.getpid()
    with contextlib.suppress(OSError):  # a container that knows few users
        os.chown(".", uid, uid)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
        os.setresuid(uid, uid, uid)
        read_all = struct.pack("=6I", 1 << 2, 1 << 2, 0, 0, 0, 0)  # CAP_DAC_READ_SEARCH
        libc.capset(struct.pack("=Ii", 0x20080522, 0), read_all)
    return True


def landlock(libc: ctypes.CDLL) -> bool:
    """Forbid to write outside the current folder and to use TCP. linux/landlock.h."""
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 3:  # before it, files could be truncated all the same
        return False
    writes = 1 << 1 | sum(1 << bit for bit in range(4, 15))  # write, remove, make, move, truncate
    tcp = 3 if version >= 4 else 0
    rules = struct.pack("=QQ", writes, tcp)[: 16 if tcp else 8]
    ruleset = libc.syscall(LANDLOCK_CREATE, rules, len(rules), 0)
    for path, allowed in ((".", writes), (os.devnull, 1 << 1 | 1 << 14)):
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        libc.syscall(LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", allowed, folder), 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # without it, only root may
    return libc.syscall(LANDLOCK_RESTRICT, ruleset, 0) == 0


def be_first(job: dict, writer: int) -> None:
    """Fork the program, bury whatever ends, and end as the program does."""
    program = os.fork()
    if not program:
        run(job, writer)
    os.close(writer)
    while True:
        pid, status = os.wait()
        if pid == program:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def run(job: dict, writer: int) -> None:
    """Run the program and say how it ended."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    try:
        exec(compile(job["program"], "program", "exec"), {"__name__": "program"})
        why = ""
    except BaseException as error:  # SystemExit too: it did not come to its end
        why = f"{type(error).__name__}: {str(error)[:200]}".rstrip(": ")
    os.write(writer, json.dumps({"key": job["key"], "why": why}).encode()[:ANSWER])
    os._exit(0)


def listen(reader: int, deadline: float) -> bytes | None:
    """What the program says before all who could say something have ended; None: that is late."""
    while (left := deadline - time.monotonic()) > 0:
        if select.select([reader], [], [], left)[0]:
            return os.read(reader, ANSWER)
    return None


def end(first: int, deadline: float) -> int:
    """How the process ended, which is killed at the deadline."""
    while time.monotonic() < deadline:
        pid, status = os.waitpid(first, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(first, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])


def read(said: bytes, key: str, status: int) -> str:
    """Why the program failed; "" if it did not."""
    try:
        told = json.loads(said)
        if told["key"] == key:
            return told["why"]
    except (ValueError, TypeError, KeyError):
        pass
    return f"killed by signal {status - 128}" if status > 128 else "it ended before its checks"


if __name__ == "__main__":
    main()
