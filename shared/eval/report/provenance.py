"""Where the report's numbers come from: the files read, with their digests and the commands that wrote them."""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

from shared.errors import ConfigError, require
from shared.eval.results import Result
from shared.files import read_json, sha256_file

REPORT_FORMAT = "codedistill-report"
R = TypeVar("R", bound=Result)


class Files:
    """Reads result files and lists each one, named relative to the report's parent folder.

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
        """A result; None where there is no file.

        Raises:
            ConfigError: the file is not such a result.
        """
        if not path.is_file():
            return None
        result = cls.read(path)
        self.remember(path, figures, result.command)
        return result

    def record(self, path: Path, figures: str, command: str = "") -> dict[str, Any] | None:
        """A JSON object that records its own `command`, or is written by the given one; None where there is no file."""
        if not path.is_file():
            return None
        value = read_json(path)
        require(isinstance(value, dict), "a result of another form", where=path, expected="a JSON object")
        self.remember(path, figures, command or str(value.get("command", "")))
        return dict(value)

    def lines(self, path: Path, figures: str, command: str) -> list[dict[str, Any]]:
        """The objects of a JSONL file, without a last line cut short by a kill; empty where there is no file."""
        if not path.is_file():
            return []
        self.remember(path, figures, command)
        records = []
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ConfigError("a line is not valid JSON", where=f"{path}, line {number}", got=error) from error
            require(isinstance(records[-1], dict), "a line is no JSON object", where=f"{path}, line {number}",
                    got=line[:80])  # fmt: skip
        return records
