"""The members of a sweep: the product of a TOML grid, each with a readable name and a resolved config."""

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config import read_toml, to_dict
from shared.errors import ConfigError, DistillError
from shared.files import sha256_json
from stage2_student.config import StudentConfig, student_config

LONGEST_NAME = 120  # bytes; file systems take 255, and logs and temporary files add to it


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One student of a sweep.

    Attributes:
        name: its run's folder inside the sweep's.
        swept: the values that the grid, or its own `[[run]]`, gives it.
        settings: all values that it is given, the fixed ones first.
        config: the same with every default.
    """

    name: str
    swept: dict[str, Any]
    settings: dict[str, Any]
    config: StudentConfig


def read_grid(path: Path) -> list[Member]:
    """Read a sweep's members in the file's order.

    A training config (`student train --config`) becomes a grid by a table `[grid]` of lists, of which every
    combination is a member, or by tables `[[run]]` that each describe one more. A name depends on what the grid says of
    its member alone, so a grid that grows finds the students that it has trained.

    Raises:
        ConfigError: no TOML, no member, one twice, or a key or value that no run can have.
    """
    fixed = read_toml(path)
    grid, runs = fixed.pop("grid", {}), fixed.pop("run", [])
    if not isinstance(grid, dict):
        raise ConfigError("[grid] must be a table of lists", where=path, got=repr(grid))
    if not isinstance(runs, list) or not all(isinstance(run, dict) and run for run in runs):
        raise ConfigError("each [[run]] must be a table of settings", where=path, got=repr(runs))
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError("a grid's key needs a list of values", where=f"{path}: grid.{key}", got=repr(values))
    product = itertools.product(*grid.values()) if grid else ()
    swept = [*(dict(zip(grid, values, strict=True)) for values in product), *runs]
    if not swept:
        raise ConfigError("nothing to sweep over", where=path, expected="a table [grid] of lists, or tables [[run]]")
    members: list[Member] = []
    for values in swept:
        try:
            config = student_config(fixed, values)
        except DistillError as error:
            where = f"{path}: {_words(values)}"
            raise ConfigError(f"a student of the sweep is refused: {error}", where=where) from error
        twin = next((member for member in members if member.config == config), None)
        if twin:
            raise ConfigError("two members are the same", where=path, got=f"{_words(twin.swept)} and {_words(values)}")
        name = _name(values, config, members)
        members.append(Member(name=name, swept=values, settings=fixed | values, config=config))
    return members


def _words(values: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in values.items())


def _name(values: Mapping[str, Any], config: StudentConfig, others: list[Member]) -> str:
    """What differs, in characters that every file system and shell takes; a digest where that is not enough."""
    name = re.sub(r"[^\w.,=+-]", "-", _words(values), flags=re.ASCII)
    if len(name) > LONGEST_NAME or any(name == other.name for other in others):
        name = f"{name[: LONGEST_NAME - 9]}-{sha256_json(to_dict(config))[:8]}"
    return name


def to_toml(value: Any) -> str:
    """A value that TOML gave, as TOML on one line."""
    if isinstance(value, dict):
        pairs = (f"{json.dumps(key, ensure_ascii=False)} = {to_toml(item)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
