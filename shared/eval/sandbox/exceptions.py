"""Exceptions between solver and checker: what one is made of, and how the other side makes its like."""

from typing import Any


def outline(error: BaseException) -> list[Any]:
    """The arguments shown and those made with, attributes, members, cause and context."""
    try:
        _, made_with, *state = tuple(error.__reduce__())
        arguments = [tuple(error.args), tuple(made_with), dict(state[0]) if state and state[0] else {}]
    except BaseException:  # whatever its own methods do
        arguments = [(described(error),), (described(error),), {}]
    members = tuple(error.exceptions) if isinstance(error, BaseExceptionGroup) else ()
    return [*arguments, members, error.__cause__, error.__context__, error.__suppress_context__]


def rebuilt(
    kind: Any, shown: Any, made_with: Any, attributes: Any, members: Any, cause: Any, context: Any, suppress: Any
) -> BaseException:
    """An exception of a class of this side, as near as may be to the one outlined.

    Raises:
        TypeError: it is no class of exceptions, or none that can be made of this.
    """
    if not issubclass(kind, BaseException):
        raise TypeError("no class of exceptions")
    if members and issubclass(kind, BaseExceptionGroup):
        error: BaseException = kind(str(shown[0]), list(members))
    else:
        try:
            error = type.__call__(kind, *made_with)
        except Exception:  # made with others
            error = kind.__new__(kind, *shown)
        error.args = tuple(shown)
    error.__dict__.update(attributes)
    error.__cause__ = cause if isinstance(cause, BaseException) else None
    error.__context__ = context if isinstance(context, BaseException) else None
    error.__suppress_context__ = suppress is True
    return error


def described(error: BaseException) -> str:
    """Its class and text."""
    try:
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
    except BaseException:
        text = "an exception without a readable text"
    return text[:500]
