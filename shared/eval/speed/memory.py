"""How much memory running a model takes above its weights."""

import contextlib
import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

import torch

CUDA = "weights + what torch allocated at most above what was there"
CPU = (
    "weights + growth of the process's resident memory to its high-water mark (VmHWM, reset before); measured in the "
    "first run of this size; interpreter and libraries are left out"
)


class Peak:
    """Bytes above those in use before; None with a reason where the system does not tell."""

    bytes: int | None = None
    reason: str | None = None


@contextlib.contextmanager
def peak_growth(device: torch.device) -> Iterator[Peak]:
    """Measure the growth of memory inside a `with` block, in this process."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    try:
        with contextlib.suppress(AttributeError, OSError):  # glibc alone keeps freed memory and can give it back
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _resident("VmRSS")
    except OSError as error:
        peak.reason = f"the high-water mark cannot be reset: {error}"
    yield peak
    if peak.reason is None:
        peak.bytes = _resident("VmHWM") - before


def _resident(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024


def weights_in_memory(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, those of tied tensors once. On a CPU each is read, and so made resident."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values()
    for tensor in tensors:
        tensor.sum()  # weights are mapped from their files until they are read
    return sum(tensor.nbytes for tensor in tensors)
