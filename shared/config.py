"""Configuration as data: frozen dataclasses hold the defaults, TOML and `key=value` override them."""

import contextlib
import dataclasses
import difflib
import enum
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from shared.errors import ConfigError, require

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
            values[key] = convert(value, hints[key], f"{cls.__name__}.{key}")
    return cls(**values)


def unknown_key(key: str, known: Iterable[str], where: str) -> ConfigError:
    """The error for a key that is none of the known ones; it names the nearest of them."""
    near = difflib.get_close_matches(key, known, n=1)
    fix = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(sorted(known))}"
    return ConfigError(f"unknown configuration key {key!r}", where=where, fix=fix)


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


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved config as plain JSON data."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(config).items()}


def convert(value: Any, hint: Any, where: str) -> Any:
    """Return a TOML value as a type hint says; int widens to float and list to tuple, nothing else is coerced.

    Raises:
        ConfigError: a value of another type, naming `where`.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        expected = " | ".join(map(str, arguments))
        require(value in arguments, "a value that is not allowed", where=where, expected=expected, got=repr(value))
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        *options, last = (option for option in arguments if option is not type(None))
        for option in options:
            with contextlib.suppress(ConfigError):
                return convert(value, option, where)
        return convert(value, last, where)
    hint = origin or hint
    if hint is tuple and isinstance(value, list | tuple):
        return tuple(convert(item, arguments[0], where) for item in value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number:
        require(math.isfinite(value), "a value that is not finite", where=where, expected="a finite number", got=value)
        return float(value)
    fits = hint is Any or isinstance(value, str if issubclass(hint, enum.Enum) else hint)
    fits = fits and not (hint is int and isinstance(value, bool))
    expected, got = getattr(hint, "__name__", str(hint)), f"{value!r} ({type(value).__name__})"
    require(fits, "a value of the wrong type", where=where, expected=expected, got=got)
    return value
