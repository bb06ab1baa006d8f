"""What a program may use: memory, time, descriptors, and the part of the file system that Python itself needs."""

import contextlib
import resource
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# What most programs import, so that it is loaded once. Only the standard library exists for them.
PRELOADED: tuple[str, ...] = ("bisect", "copy", "dataclasses", "enum", "functools", "hashlib", "heapq", "itertools")
PRELOADED += ("inspect", "math", "operator", "random", "re", "string", "typing", "zoneinfo")

# What a test may use of numpy. It is loaded before the walls are there; no program has it.
NUMPY: tuple[str, ...] = ("numpy", "numpy.fft", "numpy.linalg", "numpy.ma", "numpy.polynomial", "numpy.random", "numpy.testing")

_MEMORY_BYTES = 2 << 30
_STACK_BYTES = 8 << 20
_MAX_DESCRIPTORS = 64
_MAX_THREADS = 4096
_PACKAGES = ("site-packages", "dist-packages")  # not Python's own, and a benchmark's answers may lie there


@dataclass(frozen=True, kw_only=True, slots=True)
class Walls:
    """What stands between programs and the machine.

    Args:
        namespaces: own network, processes, IPC and mounts; only `library_folders` are left of the file system.
        landlock: the kernel's Landlock confines reads and refuses writes.
        seccomp: only listed system calls.
        bubblewrap: bubblewrap makes the namespaces.
    """

    namespaces: bool = False
    landlock: bool = False
    seccomp: bool = False
    bubblewrap: bool = False

    @property
    def name(self) -> str:
        """Such as `Landlock, seccomp, namespaces`."""
        names = {"Landlock": self.landlock, "seccomp": self.seccomp, "namespaces": self.namespaces}
        names["bubblewrap"] = self.bubblewrap
        return ", ".join(name for name, there in names.items() if there) or "none"

    @property
    def confine_reads(self) -> bool:
        """Whether programs see nothing of the machine's files but Python's own."""
        return self.landlock or self.namespaces or self.bubblewrap


def limit_resources(cpu_seconds: int) -> None:
    """Limit this process for good, never above the hard limits already there."""
    limits = {
        "RLIMIT_AS": _MEMORY_BYTES,
        "RLIMIT_DATA": _MEMORY_BYTES,
        "RLIMIT_STACK": _STACK_BYTES,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_NOFILE": _MAX_DESCRIPTORS,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": _MAX_THREADS,  # of all programs together, which have one user; root is exempt
        "RLIMIT_CPU": cpu_seconds,
    }
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        if sys.platform == "darwin":  # refuses some of these; there are no walls there anyway
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(kind, (value, value))
        else:
            resource.setrlimit(kind, (value, value))


def library_folders() -> list[Path]:
    """The folders of Python's standard library, its time zones, and the shared libraries that it loads."""
    stdlib = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    return list(dict.fromkeys([*stdlib, *_shared_library_folders(), *_time_zones()]))


def package_folders() -> list[Path]:
    """Folders of installed packages inside `library_folders`."""
    patterns = [f"{depth}{name}" for depth in ("", "*/") for name in _PACKAGES]
    found = (path for folder in library_folders() for pattern in patterns for path in folder.glob(pattern))
    return sorted({path for path in found if path.is_dir()})


def library_files() -> list[Path]:
    """What of `library_folders` is Python's own: files, and folders with all that is in them."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    own = [path for path in stdlib.iterdir() if path.name not in _PACKAGES]
    shared = [path for folder in _shared_library_folders() for path in folder.glob("*.so*") if path.is_file()]
    return [*own, Path(sysconfig.get_path("platstdlib")) / "lib-dynload", *shared, *_time_zones()]


def _time_zones() -> list[Path]:
    """The system's time zones, which `zoneinfo` reads."""
    import zoneinfo

    return [folder for folder in map(Path, zoneinfo.TZPATH) if folder.is_dir()]


def _shared_library_folders() -> list[Path]:
    """Where libraries are mapped from, and where those lie that extension modules load later."""
    maps = Path("/proc/self/maps")
    mapped = {Path(f"/{line.partition('/')[2]}").parent for line in maps.read_text().splitlines() if ".so" in line}
    triplet = sysconfig.get_config_var("MULTIARCH") or ""
    usual = {Path(root) / triplet for root in ("/lib", "/usr/lib")} if triplet else set()
    usual |= {Path(root) for root in ("/lib64", "/usr/lib64")} | {Path(sys.base_prefix) / "lib"}
    return sorted(path for path in mapped | usual if path.is_dir() and path.name != "lib-dynload")
