"""What a program may use: memory, time, descriptors, and the part of the file system that Python itself needs."""

import contextlib
import enum
import resource
import sys
import sysconfig
from pathlib import Path

# What most programs import, so that it is loaded once. Only the standard library exists for them.
PRELOADED: tuple[str, ...] = ("bisect", "copy", "dataclasses", "enum", "functools", "hashlib", "heapq", "itertools")
PRELOADED += ("inspect", "math", "operator", "random", "re", "string", "typing", "zoneinfo")

# What a test may use of numpy. It is loaded before isolation; no program has it.
NUMPY = ("numpy", "numpy.fft", "numpy.linalg", "numpy.ma", "numpy.polynomial", "numpy.random", "numpy.testing")
# What a checker notes the time of: messages that belong to calls by the test, and by the program.
OF_TEST, OF_PROGRAM = "calls", "callbacks"

_MEMORY_BYTES = 2 << 30
_STACK_BYTES = 8 << 20
_MAX_DESCRIPTORS = 64
_MAX_THREADS = 4096
_PACKAGES = ("site-packages", "dist-packages")  # not Python's own, and a benchmark's answers may lie there


class Isolation(enum.Enum):
    """The layers between programs and the machine. They are put up together or not at all."""

    FULL = "Landlock, seccomp, namespaces"
    WITHOUT_NAMESPACES = "Landlock, seccomp"
    NONE = "none"


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
        # macOS refuses some of these; there is no isolation there anyway.
        with contextlib.suppress(*(ValueError, OSError) if sys.platform == "darwin" else ()):
            resource.setrlimit(kind, (value, value))


def library_folders() -> list[Path]:
    """The folders of Python's standard library, its time zones, and the shared libraries that it loads."""
    stdlib = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    return list(dict.fromkeys([*stdlib, *_shared_library_folders(), *_time_zones()]))


def package_folders() -> list[Path]:
    """Folders of installed packages inside `library_folders`."""
    patterns = [f"{depth}{name}" for depth in ("", "*/") for name in _PACKAGES]
    paths = (path for folder in library_folders() for pattern in patterns for path in folder.glob(pattern))
    return sorted({path for path in paths if path.is_dir()})


def library_files() -> list[Path]:
    """What of `library_folders` is Python's own: files, and folders with all that is in them."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    library = [path for path in stdlib.iterdir() if path.name not in _PACKAGES]
    shared = [path for folder in _shared_library_folders() for path in folder.glob("*.so*") if path.is_file()]
    return [*library, Path(sysconfig.get_path("platstdlib")) / "lib-dynload", *shared, *_time_zones()]


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
