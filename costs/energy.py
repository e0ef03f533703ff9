"""Joules, as the NVIDIA driver counts them."""

import contextlib
import ctypes


class Energy:
    """The energy that the visible GPUs have used; `joules` is None where no driver tells."""

    def __init__(self):
        self._devices: list[ctypes.c_void_p] = []
        with contextlib.suppress(OSError):
            self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
            self._devices = self._open()

    def _open(self) -> list[ctypes.c_void_p]:
        count = ctypes.c_uint()
        if self._nvml.nvmlInit_v2() or self._nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return []
        found = [ctypes.c_void_p() for _ in range(count.value)]
        wrong = [
            self._nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(device))
            for i, device in enumerate(found)
        ]
        return [] if any(wrong) else found

    def joules(self) -> float | None:
        """Since the driver was loaded, of all GPUs of the host."""
        total = 0.0
        for device in self._devices:
            used = ctypes.c_ulonglong()
            if self._nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(used)):
                return None
            total += used.value / 1000
        return total if self._devices else None
