"""The way of a process into its run: who it is, who the others are, and JAX among them."""

import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass

import jax

from sharding.cluster.hub import Hub
from sharding.cluster.line import GRACE_S
from sharding.cluster.member import Member, meet
from sharding.cluster.relay import Relay, reach

TYPED_S, FOUND_S = 20.0, 300.0  # to wait for the others, if a person or a scheduler starts them
JAX_S = 60  # how much later than the hub JAX itself gives up a process


@dataclass(frozen=True)
class Place:
    """Who this process is."""

    coordinator: str  # HOST:PORT of process 0
    processes: int
    process: int
    devices: tuple[int, ...] | None = None  # of this host that it takes; None: all

    def __post_init__(self):
        if self.processes < 1:
            raise ValueError(f"--processes={self.processes} must be at least 1")
        if not 0 <= self.process < self.processes:
            raise ValueError(f"--process={self.process} must be 0 to {self.processes - 1}")
        split(self.coordinator)


def place(coordinator: str | None, processes: int | None, process: int | None) -> Place | None:
    """As given, or else as JAX finds it in the environment (SLURM, TPU pods, Kubernetes, Open
    MPI). None: this process is alone. ValueError for arguments that do not fit."""
    given = (coordinator, processes, process)
    if all(value is None for value in given):
        found = detected()
    elif any(value is None for value in given):
        raise ValueError("--coordinator, --processes and --process go together: give all three")
    else:
        found = Place(*given)
    return found if found and found.processes > 1 else None


def detected() -> Place | None:
    """What jax.distributed.initialize() would find. JAX has no public name for it.

    ValueError if it finds a part of it only."""
    try:
        from jax._src.clusters import ClusterEnv
    except ImportError:
        return None
    coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        *found, devices = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, None, None, None, None, FOUND_S
        )
    except (RuntimeError, ValueError, LookupError, OSError) as error:
        raise ValueError(
            f"JAX finds a cluster, but not this process in it: {' '.join(str(error).split())}; "
            f"--coordinator, --processes and --process tell it"
        ) from error
    return None if None in found else Place(*found, devices and tuple(devices))


def split(coordinator: str) -> tuple[str, int]:
    """Host and port of HOST:PORT. ValueError if it is none."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"--coordinator={coordinator} must be HOST:PORT, such as node1:1234")
    return host.removeprefix("[").removesuffix("]"), int(port)


def meet_all(
    own: Place, run: dict[str, str], *, timeout: float, heartbeat: float,
    lost: Callable[[str, int], None],
) -> tuple[Member, tuple[str, int]]:  # fmt: skip
    """This process as one of the run's, and where JAX's service will listen.

    `run` says in parts what the run is, which must be the same in all processes. `lost` is called
    by another thread, as Member says, when the run cannot go on. ValueError if not all come
    within `timeout` s.
    """
    host, port = split(own.coordinator)
    hub = None
    if own.process == 0:
        try:
            hub = Hub(port, own.processes, heartbeat, timeout)
        except OSError as error:
            raise ValueError(
                f"--coordinator={own.coordinator}: process 0 cannot listen on port {port} of "
                f"{socket.gethostname()}: {error.strerror}; take another port"
            ) from error
        host = "127.0.0.1"  # an address that others see may not lead a host to itself
    try:
        line, start = meet((host, port), own.processes, own.process, run, timeout)
    except ValueError:
        if hub:  # until the others know as well
            hub.join(2 * GRACE_S)
        raise
    member = Member(line, own.process, str(start["first"]), heartbeat, hub, lost)
    return member, (host, int(start["port"]))


def start_jax(own: Place, service: tuple[str, int], heartbeat: float) -> None:
    """Start JAX among the others. ValueError if its `service` cannot be reached."""
    port = service[1]
    if own.process:
        reach(service, JAX_S / 2)
        service = ("127.0.0.1", Relay(service).port)
    before = signal.getsignal(signal.SIGTERM)
    jax.distributed.initialize(
        f"{service[0]}:{service[1]}",
        own.processes,
        own.process,
        local_device_ids=own.devices,
        cluster_detection_method="deactivate",  # `detected` did it, or the user knows better
        initialization_timeout=JAX_S,
        heartbeat_timeout_seconds=int(heartbeat) + JAX_S,
        shutdown_timeout_seconds=JAX_S,
        coordinator_bind_address=f"[::]:{port}",
    )
    signal.signal(signal.SIGTERM, before)  # which JAX has taken, to do nothing
