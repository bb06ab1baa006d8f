"""Energy that a device has drawn, from its own counter: NVML on CUDA, RAPL on a CPU under Linux."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True, kw_only=True, slots=True)
class Meter:
    """An energy counter.

    Args:
        source: what it counts, for the result.
        joules: its state; only differences mean anything.
    """

    source: str
    joules: Callable[[], float]


def open_meter(device: torch.device) -> Meter | str:
    """The device's energy counter, or the reason why there is none."""
    return _nvml(device) if device.type == "cuda" else _rapl()


def _nvml(device: torch.device) -> Meter | str:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        return f"NVML cannot be loaded: {error}"
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()

    def read() -> int:
        status: int = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return status

    status = library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)) or read()
    if status:
        return f"NVML reports no energy for this GPU (status {status})"

    def joules() -> float:
        read()
        return millijoules.value / 1000

    return Meter(source="NVML total energy of the GPU", joules=joules)


def _rapl() -> Meter | str:
    """The processor packages; each counter wraps around at a range of its own."""
    packages = sorted(RAPL.glob("intel-rapl:[0-9]")) + sorted(RAPL.glob("intel-rapl:[0-9][0-9]"))
    if not packages:
        return "no RAPL counters on this machine"
    try:
        ranges = [int((package / "max_energy_range_uj").read_text()) for package in packages]
        last = [int((package / "energy_uj").read_text()) for package in packages]
    except (OSError, ValueError) as error:
        return f"RAPL counters cannot be read: {error}"
    total = 0

    def joules() -> float:
        nonlocal total
        for i, package in enumerate(packages):
            now = int((package / "energy_uj").read_text())
            total += (now - last[i]) % (ranges[i] + 1)
            last[i] = now
        return total / 1e6

    return Meter(source="RAPL energy of the processor packages, whatever else they did meanwhile", joules=joules)
