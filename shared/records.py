"""Records as types: dataclasses from JSON or TOML data and back, each value checked against its type hint."""

import dataclasses
import difflib
import enum
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from shared.errors import ConfigError, DistillError

T = TypeVar("T")


def to_dict(record: Any) -> dict[str, Any]:
    """A dataclass as JSON data: nested ones as dicts, tuples in fields as lists."""
    return dataclasses.asdict(
        record, dict_factory=lambda pairs: {key: list(v) if isinstance(v, tuple) else v for key, v in pairs}
    )


def from_dict(
    cls: type[T],
    value: Any,
    *,
    where: str,
    error: type[DistillError] = ConfigError,
    strict: bool = True,
    fix: str | None = None,
) -> T:
    """A dataclass from JSON data.

    Args:
        cls: a dataclass. Its fields are `str`, `bool`, `int`, `float` (a whole number will do, and stays one), `dict`,
            `Any`, `Literal`, dataclasses, unions, and `list`, `tuple` and `dict` (by text) of these.
        value: what JSON gave.
        where: file or record, for messages; they also name the path of the field.
        error: what is raised.
        strict: refuse keys that are no field; else they are ignored.
        fix: what the user can do about a refused record.

    Raises:
        DistillError: as `error` says. A field without a default is missing, a value has another type, or an unknown
            key is refused.
    """
    return _Reading(where, error, strict, fix).record(cls, value, "")


def convert(value: Any, hint: Any, *, where: str) -> Any:
    """One value of a configuration, read as `from_dict` reads a field; here a whole number becomes the float it is.

    Raises:
        ConfigError: a value of another type, naming `where`.
    """
    return _Reading(where, ConfigError, widen=True).value(hint, value, "")


def nearest(key: str, known: Iterable[str]) -> str:
    """A hint at the known key that an unknown one was meant to be."""
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"one of {', '.join(sorted(known))}"


@functools.cache
def _fields(cls: type) -> dict[str, tuple[Any, bool]]:
    """Hint of each field, and whether it must be given."""
    hints, missing = typing.get_type_hints(cls), dataclasses.MISSING
    fields = [each for each in dataclasses.fields(cls) if each.init]
    return {each.name: (hints[each.name], each.default is missing is each.default_factory) for each in fields}


@dataclasses.dataclass(frozen=True, slots=True)
class _Reading:
    """One call of `from_dict`; its methods get the path of the value inside the record."""

    where: str
    error: type[DistillError]
    strict: bool = True
    fix: str | None = None
    widen: bool = False

    def record(self, cls: type[T], value: Any, path: str) -> T:
        if not isinstance(value, Mapping):
            raise self.refusal(cls, value, path)
        fields, given = _fields(typing.cast(type, cls)), {}
        unknown = [key for key in value if key not in fields] if self.strict else []
        if unknown:
            at = self.at(_join(path, unknown[0]))
            raise self.error("an unknown field", where=at, fix=self.fix or nearest(unknown[0], fields))
        for name, (hint, required) in fields.items():
            if name in value:
                given[name] = self.value(hint, value[name], _join(path, name))
            elif required:
                raise self.error("a field is missing", where=self.at(path), expected=name, fix=self.fix)
        return cls(**given)

    def value(self, hint: Any, value: Any, path: str) -> Any:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if hint is Any:
            return value
        if origin in (types.UnionType, typing.Union):
            return self.union(arguments, value, path)
        if dataclasses.is_dataclass(hint):
            return self.record(typing.cast(type, hint), value, path)
        if origin in (list, tuple) and isinstance(value, list | tuple):
            many = origin is list or arguments[-1] is ...
            hints = [arguments[0]] * len(value) if many else arguments
            if len(hints) == len(value):
                return origin(self.value(each, item, f"{path}[{at}]")
                              for at, (each, item) in enumerate(zip(hints, value, strict=True)))  # fmt: skip
        elif origin is dict and isinstance(value, Mapping):
            return {key: self.value(arguments[1], item, _join(path, key)) for key, item in value.items()}
        elif origin is typing.Literal:
            if any(value == choice and type(value) is type(choice) for choice in arguments):
                return value
        elif hint is float and type(value) in (int, float) and _is_finite(value):
            return float(value) if self.widen else value
        elif hint is not float and isinstance(hint, type) and self.fits(hint, value):
            return value
        raise self.refusal(hint, value, path)

    def union(self, hints: tuple[Any, ...], value: Any, path: str) -> Any:
        """The first alternative that fits; None is never anything else."""
        *others, last = (hint for hint in hints if hint is not types.NoneType)
        if value is None and types.NoneType in hints:
            return None
        for hint in others:
            try:
                return self.value(hint, value, path)
            except self.error:
                continue
        return self.value(last, value, path)

    def fits(self, hint: type, value: Any) -> bool:
        if issubclass(hint, enum.Enum):
            return isinstance(value, str)
        return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))

    def at(self, path: str) -> str:
        return f"{self.where}, {path}" if path and path[0] != "[" else f"{self.where}{path}"

    def refusal(self, hint: Any, value: Any, path: str) -> DistillError:
        what, origin = "a value of the wrong type", typing.get_origin(hint)
        expected = hint.__name__ if isinstance(hint, type) and origin is None else str(hint)
        if origin is typing.Literal:
            what, expected = "a value that is not allowed", " | ".join(map(str, typing.get_args(hint)))
        got = f"{value!r:.60} ({type(value).__name__})"
        return self.error(what, where=self.at(path), expected=expected, got=got, fix=self.fix)


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False
