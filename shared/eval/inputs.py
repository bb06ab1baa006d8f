"""What a result follows from, as digests and settings, and whether it is still up to date.

A result is up to date while its `inputs` are those that its command would record now. Dates of files decide nothing.
Importing this module loads neither torch nor transformers.
"""

import os
from pathlib import Path
from typing import Any, TypeVar

from shared.cache.reader import Cache
from shared.errors import ConfigError, ResumeError, require
from shared.eval.results import BenchmarkResult, Result, Written
from shared.files import sha256_file
from shared.machine import machine
from shared.process import log

R = TypeVar("R", bound=Result)


def cache_digest(directory: Path) -> str:
    """SHA-256 of what a cache holds: labels, sources and shards, and not what was measured of its teacher."""
    return Cache(directory, complete=False).manifest.digest


def timing_place() -> dict[str, Any]:
    """What decides times beside models and settings: this machine and the share of it that the environment gives."""
    here = machine()
    place = {key: here[key] for key in ("host", "processor", "cores", "memory_bytes")}
    return place | {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}


def current_result(path: Path, cls: type[R], inputs: dict[str, Any]) -> R | None:
    """The result in a file, if it is of this kind and from the same inputs.

    A benchmark's result must also have a score. The files beside it, or beside documents that a model wrote, must be
    those that it was written with.
    """
    try:
        result = cls.read(path) if path.is_file() else None
        if result is None or result.inputs != inputs:
            return None
        if isinstance(result, BenchmarkResult) and (result.pass_at_1 is None or not result.files):
            return None
        files = result.files if isinstance(result, BenchmarkResult | Written) else {}
        if any(sha256_file(path.with_name(name)) != digest for name, digest in files.items()):
            return None
    except (ConfigError, OSError):  # damaged, or of another form: it is made again
        return None
    return result


def is_up_to_date(path: Path, cls: type[Result], inputs: dict[str, Any]) -> bool:
    """Whether the file holds a result of this kind from the same inputs; says so where it does."""
    if current_result(path, cls, inputs) is None:
        return False
    log(f"{path} is up to date")
    return True


def refuse_to_shrink(out: Path, num_samples: int) -> None:
    """Refuse to replace a benchmark's result by one of fewer completions, or what `generate` wrote.

    Raises:
        ResumeError: the folder's result is of more, or of `generate`.
    """
    is_data = (out / "documents.jsonl").exists()
    require(not is_data, "the folder is of generate", error=ResumeError, where=out, fix="name another --out")
    try:
        before = BenchmarkResult.read(out / "result.json").num_samples
    except ConfigError:  # none, or damaged
        return
    if before > num_samples:
        raise ResumeError("a smaller evaluation would replace a larger one", where=out,
                          expected=f"at least {before:,} completions, as in its result", got=f"{num_samples:,}",
                          fix="name another --out, or remove that result.json")  # fmt: skip
