"""Where the report's numbers come from: the files read, with their digests and the commands that wrote them."""

import os
from pathlib import Path
from typing import Any, TypeVar

from shared.errors import require
from shared.eval.results import Result
from shared.files import read_json, read_json_lines, sha256_file

REPORT_FORMAT = "codedistill-report"
R = TypeVar("R", bound=Result)


class Files:
    """Reads files and lists each one, named relative to the report's parent folder; None or nothing for an absent one.

    Attributes:
        files: by name `bytes`, `sha256`, the `figures` that come from the file, and the `command` that wrote it.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self.files: dict[str, dict[str, Any]] = {}

    def name(self, path: Path) -> str:
        """A path as the report shows it."""
        return Path(os.path.relpath(path, self.base)).as_posix()

    def remember(self, path: Path, figures: str, command: str) -> None:
        """List a file."""
        self.files[self.name(path)] = {
            "bytes": path.stat().st_size, "sha256": sha256_file(path), "figures": figures, "command": command,
        }  # fmt: skip

    def result(self, path: Path, cls: type[R], figures: str) -> R | None:
        """A result; see `Result.read`."""
        if not path.is_file():
            return None
        result = cls.read(path)
        self.remember(path, figures, result.command)
        return result

    def record(self, path: Path, figures: str) -> dict[str, Any]:
        """A JSON object that records its own `command`; a `ConfigError` says that the file is something else."""
        if not path.is_file():
            return {}
        value = read_json(path)
        require(isinstance(value, dict), "a record of another form", where=path, expected="a JSON object")
        self.remember(path, figures, str(value.get("command", "")))
        return dict(value)

    def lines(self, path: Path, figures: str, command: str) -> list[dict[str, Any]]:
        """The objects of a JSONL file; see `read_json_lines`."""
        if not path.is_file():
            return []
        self.remember(path, figures, command)
        return read_json_lines(path)
