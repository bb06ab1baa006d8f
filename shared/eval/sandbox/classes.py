"""The classes that a prompt defines: both sides have them, under the names of the module that they stand in."""

from collections.abc import Iterable, Mapping
from typing import Any

from shared.eval.sandbox import library


def defined(namespace: Mapping[str, Any]) -> dict[str, type]:
    """The classes that a module has defined, by where it has them, such as `Outer.Inner`."""
    found: dict[str, type] = {}
    places = [(name, value) for name, value in namespace.items()]
    for name, value in places:  # grows
        if isinstance(value, type) and value not in found.values() and _is_own(value):
            found[name] = value
            places += [(f"{name}.{inner}", of_it) for inner, of_it in vars(value).items() if not inner.startswith("__")]
    return found


def resolved(names: Iterable[str], namespace: Mapping[str, Any]) -> dict[str, type]:
    """What another module has at those places, as far as these are classes."""
    found = {}
    for name in names:
        first, *rest = name.split(".")
        value = namespace.get(first)
        for inner in rest:
            value = vars(value).get(inner) if isinstance(value, type) else None
        if isinstance(value, type):
            found[name] = value
    return found


def _is_own(kind: type) -> bool:
    """Whether a class is the module's own: neither of the library nor of Python."""
    return library.name_of(kind, any_of_library=True) is None
