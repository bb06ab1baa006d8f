"""What both sides have of Python's standard library: values under a name, and classes whose instances cross as data.

From the program only the names listed here are taken, so that a test never calls or compares by what a program chose
from the whole library. From the test any function or class of the library is: a program has them all anyway.
"""

import array
import builtins
import collections
import datetime
import decimal
import enum
import fractions
import importlib
import io
import ipaddress
import math
import pathlib
import sys
import time
import types
import uuid
from collections.abc import Callable
from typing import Any

_CONTAINERS = (collections.Counter, collections.OrderedDict, collections.defaultdict, collections.deque, bytearray)
_DATES = (datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone)
_TYPES = (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, range, slice, object, type(None))
NAMED: dict[str, Any] = {
    **{kind.__qualname__: kind for kind in (*_TYPES, *_CONTAINERS, *_DATES, decimal.Decimal, fractions.Fraction)},
    **{name: kind for name, kind in vars(builtins).items()
       if isinstance(kind, type) and issubclass(kind, BaseException)},
    "NotImplemented": NotImplemented,
    "math.nan": math.nan,
}  # fmt: skip
_NAMES = {id(value): name for name, value in NAMED.items()}
# Classes whose instances are their attributes.
ATTRIBUTE_CLASSES: dict[str, type] = {
    f"{kind.__module__}.{kind.__qualname__}": kind
    for kind in (collections.ChainMap, collections.UserDict, collections.UserList, collections.UserString,
                 types.SimpleNamespace)
}  # fmt: skip
# Classes whose instances do not change: the items that one is written as, and the way back.
_IMMUTABLE: dict[type, tuple[Callable[[Any], list[Any]], Callable[..., Any]]] = {
    slice: (lambda value: [value.start, value.stop, value.step], slice),
    uuid.UUID: (lambda value: [value.int], lambda number: uuid.UUID(int=number)),
    types.MappingProxyType: (lambda value: [dict(value)], types.MappingProxyType),
    time.struct_time: (lambda value: [tuple(value)], time.struct_time),
    **{kind: (lambda value: [str(value)], kind) for kind in (
        pathlib.PurePosixPath, pathlib.PosixPath, pathlib.PureWindowsPath, ipaddress.IPv4Address, ipaddress.IPv6Address,
        ipaddress.IPv4Network, ipaddress.IPv6Network)},
}  # fmt: skip
_BY_NAME = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in _IMMUTABLE}
STREAMS = (io.StringIO, io.BytesIO)
ARRAY = array.array


def name_of(value: Any, *, any_of_library: bool) -> str | None:
    """The name under which the other side has this very value.

    Args:
        value: anything.
        any_of_library: also of functions and classes that are not in `NAMED`, as `module:name`.
    """
    if (name := _NAMES.get(id(value))) is not None:
        return name
    return _path(value) if any_of_library and callable(value) else None


def named(name: str) -> Any:
    """What a program may name.

    Raises:
        LookupError: it is not in `NAMED`.
    """
    return NAMED[name]


def any_named(name: str) -> Any:
    """What a test may name.

    Raises:
        LookupError, AttributeError, ImportError: there is no such thing.
    """
    module, colon, path = name.partition(":")
    return _found(importlib.import_module(module), path) if colon else NAMED[name]


def state(value: Any) -> tuple[str, list[Any]] | None:
    """An instance of one of the library's immutable classes as that class's name and plain items."""
    kind = type(value)
    if kind in _IMMUTABLE:
        return f"{kind.__module__}.{kind.__qualname__}", _IMMUTABLE[kind][0](value)
    if (_is_record(kind) or issubclass(kind, enum.Enum)) and (path := _path(kind)) is not None:
        return path, [value.value] if isinstance(value, enum.Enum) else list(tuple.__iter__(value))
    return None


def restored(name: str, items: list[Any]) -> Any:
    """An instance from its class's name and items; as plain a value as it is built on where the class is not loaded.

    Raises:
        LookupError, ValueError, TypeError: there is no such class, or no such instance.
    """
    if (kind := _BY_NAME.get(name)) is not None:
        return _IMMUTABLE[kind][1](*items)
    module, _, path = name.partition(":")
    found = _found(sys.modules[module], path) if _is_library(module) and module in sys.modules else None
    if isinstance(found, type) and issubclass(found, enum.Enum):
        (value,) = items
        return found(value)
    return tuple.__new__(found, items) if isinstance(found, type) and _is_record(found) else tuple(items)


def _is_record(kind: type) -> bool:
    """Whether a class is a named tuple that is compared as a tuple."""
    return issubclass(kind, tuple) and hasattr(kind, "_fields") and kind.__eq__ is tuple.__eq__


def _path(value: Any) -> str | None:
    """Where the library has a function or class, as `module:name`."""
    owner = getattr(value, "__objclass__", value)
    module, path = getattr(owner, "__module__", None), getattr(value, "__qualname__", None)
    if type(module) is not str or type(path) is not str or not _is_library(module) or module not in sys.modules:
        return None
    try:
        return f"{module}:{path}" if _found(sys.modules[module], path) is value else None
    except AttributeError:
        return None


def _found(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names
