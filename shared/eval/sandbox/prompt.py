"""What a prompt defines, both sides have: its classes, and objects that are nothing but themselves."""

import enum
import types
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from shared.eval.sandbox import library
from shared.eval.sandbox.kinds import CHANGING, PLAIN, attributes
from shared.eval.sandbox.outlines import JUDGED, is_told, marked
from shared.eval.sandbox.table import base_among

MODULE = "candidate"
_OF_ITEMS = {**CHANGING, **PLAIN}


def defined(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The classes and sentinels that a module has defined, by where it has them, such as `Outer.Inner`."""
    by_place: dict[str, Any] = {}
    places = list(namespace.items())
    for name, value in places:  # grows
        is_new = not any(value is other for other in by_place.values())
        if isinstance(value, type) and is_new and _is_own(value) and _is_plain(value):
            by_place[name] = value
            places += [
                (f"{name}.{inner}", attribute) for inner, attribute in vars(value).items() if not inner.startswith("__")
            ]
        elif is_new and not name.startswith("__") and _is_sentinel(value):
            by_place[name] = value
    return by_place


def resolved(names: Iterable[str], namespace: Mapping[str, Any]) -> dict[str, Any]:
    """What another module has at those places, as far as it is what it should be."""
    by_place = {}
    for name in names:
        first, *rest = name.split(".")
        value = namespace.get(first)
        for inner in rest:
            value = vars(value).get(inner) if isinstance(value, type) else None
        if isinstance(value, type) or _is_sentinel(value):
            by_place[name] = value
    return by_place


def checksums(kind: type) -> dict[str, int]:
    """What a class has under each name: of a function a checksum of its code, of anything else 0."""
    return {marked(name, value): _checksum(value) for name, value in vars(kind).items() if _is_told(name)}


def is_open(kind: type, name: str) -> bool:
    """Whether a class of the prompt leaves a name to the program: it has none, or a function without a body."""
    value = next((vars(base)[name] for base in kind.__mro__[:-1] if name in vars(base)), None)
    function = _function(value)
    if function is None:
        return value is None
    code = function.__code__
    constants = (None, ..., function.__doc__)
    num_arguments = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
    return (
        code.co_nlocals == num_arguments
        and set(code.co_names) <= {"NotImplementedError"}
        and all(any(constant is known for known in constants) for constant in code.co_consts)
    )


def deciding_names(kind: type) -> set[str]:
    """The names by which a class of the prompt compares its instances, if it does; of a class that does not, none."""
    classes = [vars(base) for base in reversed(kind.__mro__) if base.__module__ == MODULE]
    functions = {name: _function(value) for names in classes for name, value in names.items()}
    deciding = {name for name in functions if name in JUDGED and not is_open(kind, name)}
    names = list(deciding)
    for name in names:  # grows
        if (function := functions.get(name)) is not None:
            new = _names(function.__code__) - deciding
            deciding |= new
            names += new
    return deciding | ({"__init__"} if deciding else set())


def empty_names(namespace: Mapping[str, Any]) -> list[str]:
    """The variables that a prompt leaves empty, for a program to keep something in."""
    kinds = (*CHANGING, *PLAIN, type(None))
    return [name for name, value in namespace.items() if type(value) in kinds and not value and name[:2] != "__"]


def _function(value: Any) -> Any:
    """The function that an attribute of a class is or is made of; None of another."""
    for name in ("fget", "__func__"):
        value = getattr(value, name, value)
    return value if isinstance(value, types.FunctionType) else None


def _names(code: types.CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _checksum(value: Any) -> int:
    function = _function(value)
    if function is None:
        return 0
    code = function.__code__
    constants = [c for c in code.co_consts if not isinstance(c, types.CodeType)]
    return zlib.crc32(repr((code.co_code, code.co_names, constants)).encode("utf-8", "replace"))


def _is_own(kind: type) -> bool:
    """Whether a class is the module's own: neither of the library nor of Python."""
    return library.name_of(kind, any_of_library=True) is None


def _is_plain(kind: type) -> bool:
    """Whether instances are no more than attributes, and items of a class of data or an exception's."""
    solid = next(base for base in kind.__mro__ if isinstance(vars(base).get("__new__"), types.BuiltinFunctionType))
    return solid in (object, types.SimpleNamespace, *_OF_ITEMS) or issubclass(solid, BaseException)


def _is_sentinel(value: Any) -> bool:
    """Whether an object is told from others by its identity alone: one without attributes or items."""
    kind = type(value)
    if kind is object:
        return True
    is_bare = kind.__module__ == MODULE and not issubclass(kind, type | enum.Enum | BaseException) and _is_plain(kind)
    return is_bare and base_among(kind, _OF_ITEMS) is None and not attributes(value)


def _is_told(name: str) -> bool:
    return is_told(name) or name == "__init__"
