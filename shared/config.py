"""Configuration as data: frozen dataclasses hold the defaults, TOML and `key=value` override them."""

import tomllib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from shared.errors import ConfigError
from shared.records import convert, nearest

C = TypeVar("C")


def load_config(cls: type[C], *layers: Mapping[str, Any]) -> C:
    """Build a config from its defaults and override layers; a later layer wins.

    Args:
        cls: a frozen dataclass whose fields all have defaults.
        layers: mappings from field name to value, such as `read_toml(path)`.

    Raises:
        ConfigError: a key that is no field (the nearest one is named), or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if key not in hints:
                raise unknown_key(key, hints, cls.__name__)
            values[key] = convert(value, hints[key], where=f"{cls.__name__}.{key}")
    return cls(**values)


def unknown_key(key: str, known: Iterable[str], where: str) -> ConfigError:
    """The error for a key that is none of the known ones; it names the nearest of them."""
    return ConfigError(f"unknown configuration key {key!r}", where=where, fix=nearest(key, known))


def read_toml(path: Path) -> dict[str, Any]:
    """Read one TOML file of overrides.

    Raises:
        ConfigError: the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("cannot read the configuration file", where=path, got=error.strerror) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("the configuration file is not valid TOML", where=path, got=error) from error


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Parse `--set key=value` pairs; values are TOML, and anything that is no TOML value is a string."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key.strip():
            raise ConfigError("cannot read an assignment", where="--set", expected="key=value", got=repr(assignment))
        try:
            value = tomllib.loads(f"value = {text.strip()}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        values[key.strip()] = value
    return values
