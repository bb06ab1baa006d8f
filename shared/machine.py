"""What this runs on: the machine and the installed versions."""

import contextlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from shared.errors import require


def machine() -> dict[str, Any]:
    """Describe this machine: host, processor, cores, memory, accelerators (those that torch sees, if it is loaded)."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    accelerators: list[str] = []
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "processor": processor,
        "cores": num_processors(),
        "memory_bytes": memory_bytes,
        "accelerators": accelerators,
        "python": platform.python_version(),
    }


def num_processors() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(*packages: str) -> dict[str, str | None]:
    """Installed versions by distribution name; None where a package is absent."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def require_usable_card() -> None:
    """Refuse to run on the processor where torch cannot use the NVIDIA card: it would take days, silently.

    Cards that CUDA_VISIBLE_DEVICES hides are not meant to be used.

    Raises:
        ConfigError: the driver lists a card and torch sees none.
    """
    import torch

    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    try:
        import pynvml
    except ImportError:  # then nothing knows of a card
        return
    try:
        pynvml.nvmlInit()
        cards, driver = pynvml.nvmlDeviceGetCount(), pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return  # no driver, so no card
    require(
        not cards,
        "torch cannot use this machine's NVIDIA card",
        expected=f"a driver for CUDA {torch.version.cuda}" if torch.version.cuda else "a CUDA build of torch",
        got=f"torch {torch.__version__}, driver {driver}",
        fix="update the driver, or install a torch that it can run (https://pytorch.org/get-started/locally); "
        "CUDA_VISIBLE_DEVICES=-1 runs on the processor",
    )


def has_accelerator() -> bool:
    """Whether there is a GPU for all that the models do; a Mac's has no float64, in which losses are summed."""
    import torch

    device = torch.accelerator.current_accelerator()
    return torch.accelerator.is_available() and (device is None or device.type != "mps")
