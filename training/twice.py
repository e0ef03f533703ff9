"""Twice: a step computed two times from the same bits, which must give the same bits.

Hardware that computes wrong without saying so is found by nothing else. Dixit et al. 2021,
arXiv:2102.11245.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from configs import command
from configs.run import Run
from monitor.progress import Progress
from sharding.digest import differing, digests, odd_copies, probe
from sharding.offload import HOST

Step = Callable[[Any, Any], tuple[Any, dict]]
Aside = Callable[[], contextlib.AbstractContextManager]


def check(run: Run) -> None:
    """ValueError where a step that is computed twice may rightly give other bits."""
    if run.guard.twice and jax.default_backend() == "gpu" and not run.deterministic:
        raise ValueError(
            f"guard.twice={run.guard.twice} compares the bits of steps, which may differ on a GPU "
            f"by the order of sums; add --config.deterministic=true"
        )


class Twice:
    """A compiled step, of which some are computed twice. The state waits in the memory of the host
    meanwhile, not of a device.

    Price: of each step that is checked the state's way to the host and back, and a step's time;
    the host's memory for what its devices hold of the state.
    """

    def __init__(self, compute: Step, every: int, aside: Aside, progress: Progress):
        """Every so many steps, 0: never; `aside` is entered for what a step would not take."""
        self._compute, self._every = compute, every
        self._aside, self._progress = aside, progress
        self._good = 0  # the last step that gave the same bits

    def __call__(self, step: int, state: Any, batch: Any) -> tuple[Any, dict]:
        """The next state and the metrics; takes over the memory of `state`.

        command.Corrupt, naming the devices, if the step gave other bits the first time, or if
        devices that hold copies hold other bits.
        """
        if not self._every or step % self._every:
            return self._compute(state, batch)
        start, mesh = time.perf_counter(), jax.sharding.get_mesh()
        with jax.transfer_guard("allow"):
            with self._aside():
                kept = keep(state)
                first = digests(self._compute(state, batch), mesh)
                state = jax.tree.map(Kept.array, kept)
            made = self._compute(state, batch)
            again = digests(made, mesh)
            wrong = differing(first, again)
            if wrong.any():
                raise command.Corrupt(self._verdict(step, "computed twice gave other bits", wrong))
            odd = odd_copies(again, mesh)
            if odd.any():
                raise command.Corrupt(self._verdict(step, "left copies that differ", odd))
        if not self._good:
            seconds = time.perf_counter() - start
            self._progress.print(
                f"twice      step {step}: the same bits on {mesh.size} devices, in {seconds:.2g} s"
            )
        self._good = step
        return made

    def _verdict(self, step: int, what: str, wrong: np.ndarray) -> str:
        """What happened and what to do, where `wrong` says so of the mesh's devices."""
        mesh = jax.sharding.get_mesh()
        where = names(mesh.devices[wrong])
        if wrong.all() and wrong.size > 1:
            odd = odd_copies({(): probe(mesh)}, mesh)
            found = names(mesh.devices[odd]) if odd.any() else "no fault"
            where = (
                f"all {wrong.size} devices, so before they shared their gradients; a short test of "
                f"each device by itself finds {found}"
            )
        since = f"step {self._good} was the last with equal bits" if self._good else (
            "no step was checked before in this process"
        )  # fmt: skip
        return (
            f"silent data corruption: step {step} {what} on {where}. Nothing of the step is "
            f"saved, and {since}; a save after that may hold damage. Take the hardware out, "
            f"then the same command goes on from the last save, or "
            f"--restore=WORKDIR@STEP in another --workdir from an older one"
        )


def names(devices: Iterable[jax.Device]) -> str:
    return "; ".join(map(named, devices))


def named(device: jax.Device) -> str:
    """A device, its process and, if it is this process' own, the host."""
    own = device.process_index == jax.process_index()
    host = f" on {socket.gethostname()}" if own else ""
    return f"device {device.id} ({device.device_kind}) of process {device.process_index}{host}"


def keep(state: Any) -> Any:
    """A Kept of every array, with its bits."""
    direct = jax.default_backend() != "cpu"  # whose memory is the host's already
    try:
        kept = jax.tree.map(lambda a: Kept.of(a, direct=direct), state)
        jax.block_until_ready([part for one in jax.tree.leaves(kept) for part, _ in one.parts])
    except jax.errors.JaxRuntimeError:  # that memory has a limit of its own
        return jax.tree.map(Kept.of, state)
    return kept


@dataclass(frozen=True)
class Kept:
    """An array in the memory of the host: what each device of this process holds, copies too."""

    shape: tuple[int, ...]
    sharding: jax.sharding.Sharding
    parts: list[tuple[np.ndarray | jax.Array, jax.sharding.Sharding]]

    @classmethod
    def of(cls, a: jax.Array, *, direct: bool = False) -> "Kept":
        """`direct`: on its way when this returns, to memory that devices copy from and to
        without the processor (54 GB/s on an H200; LOG.md), and not through fresh pages."""

        def part(held: jax.Array) -> np.ndarray | jax.Array:
            if not direct or held.sharding.memory_kind == HOST:
                return np.array(held)
            return jax.device_put(held, held.sharding.with_memory_kind(HOST))

        parts = [(part(shard.data), shard.data.sharding) for shard in a.addressable_shards]
        return cls(a.shape, a.sharding, parts)

    def array(self) -> jax.Array:
        """The same bits on the same devices."""
        placed = jax.device_put(*map(list, zip(*self.parts, strict=True)))
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, placed)
