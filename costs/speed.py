"""The clock of a run's steps, held against what the hardware can do."""

import contextlib
import time
from collections.abc import Iterator

import jax

from costs import devices, flops
from model.config import ModelConfig


class Speed:
    """Times steps; stands still while something else is done.

    Measures the matmul rate when made (half a second), so make it before the machine is busy.
    """

    def __init__(self, model: ModelConfig, seq: int):
        found = jax.devices()
        self.flops = flops.flops_per_token(model, seq)
        self.rate = devices.together(devices.measured_matmul_rate(model.dtype), found)
        peak = devices.peak_flops(found[0], model.dtype)
        self.peak = peak and devices.together(peak, found)
        self._since = time.perf_counter()

    def start(self) -> None:
        """The first step begins."""
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time that belongs to no step."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def over(self, steps: int, tokens: int) -> dict[str, float | None]:
        """The figures of the `steps`, of `tokens` in all, that ended since the last call."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        work = tokens / seconds * self.flops
        return {
            "tokens_per_s": tokens / seconds,
            "step_s": seconds / steps,
            "mfu": work / self.peak if self.peak else None,
            "matmul_fraction": work / self.rate,
        }
