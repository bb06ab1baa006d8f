"""The process's surroundings: durable files, ranks, progress, machine and versions, exit codes."""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from shared.errors import ConfigError, DistillError, PeerEndedError

# --- durable files ---------------------------------------------------------------------------------------------------


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that `path` holds either its old content or all of `data`, also after a power cut.

    Temporary name in the same folder → fsync → rename → folder fsync.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any) -> str:
    """Strict JSON (no NaN or Infinity), readable, keys in the order given; UTF-8 can hold it.

    Lone surrogates (ids in data, bytes of file names that are no UTF-8) become their escapes.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode(errors="backslashreplace").decode()


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON durably."""
    write_bytes(path, to_json(value).encode())


def read_json(path: Path) -> Any:
    """Read strict JSON.

    Raises:
        ConfigError: the file is missing or is no JSON.
    """
    try:
        return json.loads(path.read_bytes(), parse_constant=_refuse_constant, parse_float=_finite)
    except OSError as error:
        raise ConfigError("cannot read a file", where=path, got=error.strerror) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError("a file is not valid JSON", where=path, got=error) from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_constant(text)


def sha256_json(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON form: sorted keys, no spaces, ASCII."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- ranks -----------------------------------------------------------------------------------------------------------


def rank() -> int:
    """This process's rank under a launcher such as torchrun; 0 otherwise. Slurm variables alone do not count."""
    return int(os.environ["RANK"]) if _launched() else 0


def world_size() -> int:
    """The number of processes under a launcher such as torchrun; 1 otherwise."""
    return int(os.environ["WORLD_SIZE"]) if _launched() else 1


def local_rank() -> int:
    """This process's number on its machine under a launcher such as torchrun; 0 otherwise."""
    return int(os.environ["LOCAL_RANK"]) if _launched() else 0


def _launched() -> bool:
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


# --- talking to the user ---------------------------------------------------------------------------------------------


def log(message: str) -> None:
    """One line to standard error, from rank 0 alone."""
    if rank() == 0:
        sys.stderr.write(message + "\n")
        sys.stderr.flush()


class Progress:
    """Counts work done; a bar on a terminal, a log line every ten seconds elsewhere."""

    def __init__(self, description: str, total: int, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done, self.note = 0, ""
        self._start = self._last_line = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def advance(self, amount: int, note: str = "") -> None:
        """Add `amount` units to what is done; `note` is shown beside the speed from now on."""
        self.done += amount
        self.note = f", {note}" if note else ""
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, speed=self.speed())
        elif (now := time.monotonic()) - self._last_line >= 10:
            self._last_line = now
            left_seconds = (self.total - self.done) / max(self.rate(), 1e-9)
            share = self.done / max(self.total, 1)
            log(
                f"{self.description}: {self.done:,}/{self.total:,} {self.unit} ({share:.0%}), "
                f"{self.speed()}, {left_seconds:,.0f} s left"
            )

    def rate(self) -> float:
        """Units per second since the start."""
        return self.done / max(time.monotonic() - self._start, 1e-9)

    def speed(self) -> str:
        """The rate as it is shown, the note beside it."""
        rate = self.rate()
        return f"{rate:,.0f} {self.unit}/s{self.note}" if rate >= 10 else f"{rate:.2g} {self.unit}/s{self.note}"


@contextlib.contextmanager
def progress(description: str, total: int, unit: str) -> Iterator[Progress]:
    """Show the progress of long work on standard error, from rank 0 alone."""
    state = Progress(description, total, unit)
    if rank() == 0 and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        ]
        with Bar(*columns, console=Console(stderr=True)) as bar:
            state._bar, state._task = bar, bar.add_task(description, total=total, speed="")
            yield state
    else:
        yield state
    seconds = time.monotonic() - state._start
    log(f"{description}: {state.done:,} {unit} in {seconds:,.1f} s ({state.speed()})")


# --- what this runs on -----------------------------------------------------------------------------------------------


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
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory_bytes,
        "accelerators": accelerators,
        "python": platform.python_version(),
    }


def versions(*packages: str) -> dict[str, str | None]:
    """Installed versions by distribution name; None where a package is absent."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


# --- exit codes ------------------------------------------------------------------------------------------------------


class Terminated(BaseException):
    """SIGTERM arrived; raised in the main thread so that `finally` blocks run."""


def run_cli(command: Any) -> NoReturn:
    """Run a click command as a program: 0 done, 1 domain error, 2 usage, 130 and 143 after SIGINT and SIGTERM."""
    import click

    def terminate(signum: int, frame: object) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        value = command.main(standalone_mode=False)
        code = value if isinstance(value, int) else 0  # click returns the code of `Exit` instead of raising it
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        log("interrupted; nothing finished is lost, the same command continues")
        code = 130
    except Terminated:
        log("terminated; nothing finished is lost, the same command continues")
        code = 143
    except PeerEndedError as error:
        log(f"error: {error}")
        code = 1
    except DistillError as error:  # from whichever rank it comes
        sys.stderr.write(f"error: {error}\n")
        code = 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:  # a path that cannot be read or written, a full disk
        if error.filename is None:
            raise
        log(f"error: {error.strerror}; where: {error.filename}; fix: check the path, the rights and the free space")
        code = 1
    sys.exit(code)
