"""Exceptions between solver and checker: an outline in plain data, and the nearest exception that it can become."""

import builtins
import sys
from collections.abc import Mapping
from typing import Any


def outline(error: BaseException) -> tuple[Any, ...]:
    """Its classes' names, the arguments shown and those made with, attributes, members, cause and context."""
    names = [(kind.__module__, kind.__qualname__) for kind in type(error).__mro__ if kind is not object]
    try:
        _, made_with, *state = tuple(error.__reduce__())
        found = names, tuple(error.args), tuple(made_with), dict(state[0]) if state and state[0] else {}
    except BaseException:  # whatever its own methods do
        found = names, (described(error),), (described(error),), {}
    members = tuple(error.exceptions) if isinstance(error, BaseExceptionGroup) else ()
    return *found, members, error.__cause__, None if error.__suppress_context__ else error.__context__


def rebuild(parts: list[Any], classes: Mapping[str, Any]) -> BaseException:
    """An exception as near as may be to the one outlined: of the first of its classes that this side can name."""
    names, shown, made_with, attributes, members, cause, context = parts
    error = _made(names, shown, made_with, attributes, members, classes)
    for name, other in (("__cause__", cause), ("__context__", context)):
        if isinstance(other, BaseException):
            setattr(error, name, other)
    return error


def described(error: BaseException) -> str:
    """Its class and text."""
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:
        text = "an exception without a readable text"
    return text[:500]


def _made(
    names: Any, shown: Any, made_with: Any, attributes: Any, members: Any, classes: Mapping[str, Any]
) -> BaseException:
    try:
        for module, name in names:
            kind = classes.get(name, getattr(builtins, name, None))
            if kind is None and module.partition(".")[0] in sys.stdlib_module_names:
                kind = getattr(sys.modules.get(module), name, None)
            if not (isinstance(kind, type) and issubclass(kind, BaseException)):
                continue
            if members and issubclass(kind, BaseExceptionGroup):
                error: BaseException = kind(str(shown[0]), list(members))
            else:
                try:
                    error = kind(*made_with)
                except Exception:  # made with others
                    error = kind.__new__(kind, *shown)
                error.args = tuple(shown)
            error.__dict__.update(attributes)
            return error
    except (TypeError, ValueError, AttributeError, IndexError):
        pass
    return RuntimeError(f"the program raised {names!r:.200}")
