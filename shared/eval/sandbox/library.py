"""What both sides have of Python's standard library, by name.

From the program only what is listed here is taken, so that a test never calls or compares by what a program chose from
the whole library. From the test any function or class of the library is: a program has them all anyway.
"""

import builtins
import collections.abc
import dataclasses
import enum
import importlib
import math
import operator
import sys
from typing import Any

from shared.eval.sandbox.kinds import CHANGING, FIXED, OF_ATTRIBUTES, PLAIN

# Of `builtins`: without side effects, and no way to anything that is not an argument.
_FUNCTIONS: tuple[Any, ...] = (
    abs, all, any, ascii, bin, callable, chr, divmod, format, hash, hex, isinstance, issubclass, iter, len, max, min,
    next, oct, ord, pow, repr, round, sorted, sum)  # fmt: skip
_DATA = {*CHANGING, *PLAIN, *OF_ATTRIBUTES}
_TYPES = (
    *_DATA, *(k for k in FIXED if k.__module__ != "builtins"), bool, enumerate, filter, map, object, range, reversed,
    slice, type, type(None), zip)  # fmt: skip
_ABSTRACT = {getattr(collections.abc, name) for name in collections.abc.__all__}
NAMED: dict[str, Any] = {
    **{f"{value.__module__}:{value.__qualname__}": value for value in (*_FUNCTIONS, *_TYPES, *_ABSTRACT)},
    **{f"builtins:{name}": value for name, value in vars(builtins).items()
       if isinstance(value, type) and issubclass(value, BaseException)},
    **{f"{module.__name__}:{name}": value for module in (math, operator) for name, value in vars(module).items()
       if callable(value) and not name.startswith("_")},
    **{f"{kind.__name__}:{name}": value for kind in (str, list, dict, set, int) for name, value in vars(kind).items()
       if callable(value) and not name.startswith("_")},
    "math:nan": math.nan,
    **{f"dataclasses:{name}": getattr(dataclasses, name) for name in ("MISSING", "_FIELD", "_FIELD_CLASSVAR")},
    **{repr(value): value for value in (NotImplemented, ...)},
}  # fmt: skip
_NAMES = {id(value): name for name, value in NAMED.items()}


def name_of(value: Any, *, any_of_library: bool) -> str | None:
    """The name under which the other side has this very value; `any_of_library`: also what is not in `NAMED`."""
    if (name := _NAMES.get(id(value))) is not None:
        return name
    return path_of(value) if any_of_library and callable(value) else None


def named(name: str, *, any_of_library: bool) -> Any:
    """What the other side names, as `name_of` gives it.

    Raises:
        LookupError, AttributeError, ImportError: there is no such thing.
    """
    if name in NAMED or not any_of_library:
        return NAMED[name]
    module, _, path = name.partition(":")
    return _found(importlib.import_module(module), path)


def base_named(places: str) -> type | None:
    """The first of these classes that instances of the other side's classes may be built on here; None: no such class.

    These are the classes of data, exceptions of loaded modules, and `collections.abc`. By those of `unittest` a program
    would have its test skipped.
    """
    for place in places.split("|"):
        kind = None if place.startswith("unittest") else _loaded(place)
        if kind is not None and (kind in _DATA or kind in _ABSTRACT or issubclass(kind, BaseException)):
            return kind
    return None


def value_class_named(place: str) -> type | None:
    """The enumeration or named tuple that the library has there; None where its module is not loaded here."""
    kind = _loaded(place)
    return kind if kind is not None and is_value_class(kind) else None


def is_value_class(kind: type) -> bool:
    """Whether a class is an enumeration of the library, or a named tuple of it that is compared as a tuple."""
    is_record = issubclass(kind, tuple) and hasattr(kind, "_fields") and kind.__eq__ is tuple.__eq__
    return (is_record or issubclass(kind, enum.Enum)) and path_of(kind) is not None


def path_of(value: Any) -> str | None:
    """Where the library has a function or class, as `module:name`."""
    owner = getattr(value, "__objclass__", value)
    module, path = getattr(owner, "__module__", None), getattr(value, "__qualname__", None)
    if type(module) is not str or type(path) is not str or not is_library(module) or module not in sys.modules:
        return None
    return f"{module}:{path}" if _found(sys.modules[module], path, None) is value else None


def is_library(module: str) -> bool:
    """Whether a module is of the standard library."""
    return module.partition(".")[0] in sys.stdlib_module_names


def _loaded(place: str) -> type | None:
    """A class of the library, where its module is loaded."""
    module, _, path = place.partition(":")
    kind = _found(sys.modules[module], path, None) if is_library(module) and module in sys.modules else None
    return kind if isinstance(kind, type) else None


def _found(place: Any, path: str, *default: Any) -> Any:
    for name in path.split("."):
        place = getattr(place, name, *default)
    return place
