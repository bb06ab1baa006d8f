"""Where the report's numbers come from: the files read, their digests, and the commands that make such files."""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.errors import ConfigError
from shared.eval.report.tables import mapping
from shared.files import read_json, sha256_file

Result = Mapping[str, Any]


OBJECTS = {"cache", "settings", "machine", "machines", "versions", "reasons", "models", "batches", "config",
           "pass_at_k", "pass_at_k_ci95", "verdicts", "identity", "statistics", "files"}  # fmt: skip
LISTS = {"per_document", "ece_bins", "caches", "sources", "variants"}  # of objects


def read_result(path: Path) -> dict[str, Any]:
    """A result's JSON object, whose parts have the shape that readers count on; any may be missing or null.

    Raises:
        ConfigError: it has not; names file and key.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ConfigError(
            "a result file of another form", where=path, expected="a JSON object", got=type(value).__name__
        )
    for key, part in value.items():
        if key in OBJECTS and not isinstance(part, dict | None):
            raise ConfigError("a result file of another form", where=f"{path}, {key}", expected="an object")
        if key in LISTS and not (part is None or (isinstance(part, list) and all(isinstance(p, dict) for p in part))):
            raise ConfigError("a result file of another form", where=f"{path}, {key}", expected="a list of objects")
    return value


class Files:
    """Reads result files and remembers each one's size and digest, named relative to the report's parent folder."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.files: dict[str, dict[str, Any]] = {}

    def read(self, path: Path) -> dict[str, Any] | None:
        """The JSON object in a file; None where there is no file."""
        if not path.is_file():
            return None
        value = read_result(path)
        self.remember(path)
        return value

    def read_lines(self, path: Path) -> list[dict[str, Any]]:
        """The objects of a JSONL file, without a last line cut short by a kill; empty where there is no file."""
        if not path.is_file():
            return []
        self.remember(path)
        records = []
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ConfigError("a log line is not valid JSON", where=f"{path}, line {number}", got=error) from error
            if not isinstance(records[-1], dict):
                raise ConfigError("a log line is no JSON object", where=f"{path}, line {number}", got=line[:80])
        return records

    def name(self, path: Path) -> str:
        """A path as the report shows it."""
        return Path(os.path.relpath(path, self.base)).as_posix()

    def remember(self, path: Path) -> None:
        """List a file with its size and digest."""
        self.files[self.name(path)] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}

    def say(self, path: Path, figures: str, command: str) -> None:
        """Say which figures come from a file that was read, and what makes such a file."""
        if (entry := self.files.get(self.name(path))) is not None:
            entry |= {"figures": figures, "command": command}


def fidelity_command(result: Result, caches: Sequence[Result]) -> str:
    """The `eval fidelity` behind a result; the cache by its name where its manifest's digest is that of one given."""
    digest = (result.get("cache") or {}).get("manifest_sha256")
    cache = next((c["name"] for c in caches if c.get("manifest_sha256") == digest and digest), "CACHE")
    teacher = mapping(result.get("teacher")).get("path")
    return _command(
        "eval fidelity",
        model=mapping(result.get("model")).get("path"),
        cache=cache,
        teacher=teacher,
        dtype=result.get("dtype"),
    )


def latency_command(result: Result) -> str:
    """The `eval latency` behind a result."""
    settings = result.get("settings") or {}
    names = " ".join(f"--model {shlex.quote(name)}=DIR" for name in result.get("models") or {})
    options = {key: settings.get(key) for key in ("prompt_tokens", "new_tokens", "repeats")}
    return " ".join([_command("eval latency", **options), names]).strip()


def draft_command(result: Result) -> str:
    """The `eval draft` behind a result."""
    settings = result.get("settings") or {}
    paths = {key: mapping(result.get(key)).get("path") for key in ("teacher", "student")}
    options = {key: settings.get(key) for key in ("new_tokens", "draft_tokens", "repeats")}
    return _command("eval draft", **paths, **options)


def benchmark_command(result: Result) -> str:
    """The `eval humaneval` or `eval mbpp` behind a result."""
    settings = result.get("settings") or {}
    keys = ("samples", "temperature", "top_p", "seed", "max_new_tokens", "batch_size", "limit", "dtype")
    name = "mbpp" if result.get("benchmark") == "MBPP" else "humaneval"
    options = {key: settings.get(key) for key in keys} | {"timeout": settings.get("timeout_seconds")}
    return _command(f"eval {name}", model=result.get("model"), **options)


def train_command(record: Result, run: str, caches: Sequence[Result]) -> str:
    """The `student train` behind a run, with the settings that matter most; run.json has them all."""
    by_shards = {json.dumps(c["shards"], sort_keys=True): c["name"] for c in caches if c.get("shards")}
    parts = [*(record.get("caches") or []), record.get("validation")]
    names = [by_shards.get(json.dumps((part or {}).get("shards"), sort_keys=True)) for part in parts]
    config = record.get("config") or {}
    keys = ("preset", "loss", "alpha", "temperature", "k", "learning_rate", "num_train_epochs", "max_steps", "seed")
    words = [_command("student train")]
    words += [f"--cache {shlex.quote(name or 'CACHE')}" for name in names[:-1]]
    words += [f"--validation {shlex.quote(names[-1] or 'CACHE')}"] if parts[-1] else []
    words += [f"--set {shlex.quote(f'{key}={config[key]}')}" for key in keys if config.get(key) is not None]
    return " ".join([*words, f"--out {shlex.quote(run)}"])


def build_command(manifest: Result) -> str:
    """The command that made a cache."""
    derived = manifest.get("derived_from")
    if isinstance(derived, dict):
        return f"codedistill {derived.get('command', 'cache')}"
    sources = [source for source in manifest.get("sources") or [] if isinstance(source, dict)]
    first: Result = sources[0] if sources else {}
    teacher = ((manifest.get("identity") or {}).get("teacher") or {}).get("name")
    return _command(
        "teacher build",
        teacher=teacher,
        dataset=first.get("name"),
        split=first.get("split"),
        top_k=manifest.get("top_k"),
        codec=manifest.get("codec"),
    )


def _command(name: str, **options: Any) -> str:
    words = [f"--{key.replace('_', '-')} {shlex.quote(str(v))}" for key, v in options.items() if v is not None]
    return " ".join([f"codedistill {name}", *words])
