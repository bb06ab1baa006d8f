"""Domain errors: what went wrong, where, what was expected, what was found, how to fix it.

Every error a user can cause derives from `DistillError`; the command line prints it as one line and exits with 1.
"""

import math


class DistillError(Exception):
    """An error with a readable one-line message.

    Args:
        what: what went wrong, as a sentence without a full stop.
        where: file, shard, row, option or document it happened at.
        expected: the value or state that would have been right.
        got: the value or state that was found.
        fix: what the user can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.got, self.fix = what, where, expected, got, fix
        labelled = [("where", where), ("expected", expected), ("got", got), ("fix", fix)]
        parts = [what] + [f"{label}: {value}" for label, value in labelled if value is not None]
        self._parts = [" ".join(part.split()) for part in parts]
        super().__init__("; ".join(self._parts))

    def for_terminal(self) -> str:
        """The message with where, expected, got and fix on lines of their own."""
        return "\n  ".join(self._parts)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by fields (worker processes send errors back), since `args` holds the joined message."""
        return (_rebuild, (type(self), self.what, self.where, self.expected, self.got, self.fix))


def _rebuild(
    cls: type[DistillError], what: str, where: object, expected: object, got: object, fix: str | None
) -> DistillError:
    return cls(what, where=where, expected=expected, got=got, fix=fix)


class ConfigError(DistillError, ValueError):
    """An option, configuration key or input row that cannot be used."""


class CacheFormatError(DistillError, ValueError):
    """Bytes that are not a cache of a known format version, or labels that may not be written."""


class CacheCorruptError(DistillError, OSError):
    """A cache whose bytes differ from what its manifest says."""


class CacheMismatchError(DistillError, ValueError):
    """A cache and something used with it (tokenizer, vocabulary, options) that do not belong together."""


class ResumeError(DistillError, RuntimeError):
    """Work that cannot be continued under the options given."""


class PeerEndedError(DistillError, RuntimeError):
    """Another process of the same job has ended; its own message says why."""


class NonFiniteLossError(DistillError, RuntimeError):
    """A loss that is NaN or infinite."""


class SandboxError(DistillError, RuntimeError):
    """Generated programs cannot be run as safely as asked for."""


def require(
    condition: object,
    what: str,
    *,
    error: type[DistillError] = ConfigError,
    where: object = None,
    expected: object = None,
    got: object = None,
    fix: str | None = None,
) -> None:
    """Raise `error` with this message unless the condition holds.

    For checks of input. All arguments are evaluated whether or not the condition holds, so messages that are costly or
    that only make sense in the failing case belong behind an `if` and a `raise`.
    """
    if not condition:
        raise error(what, where=where, expected=expected, got=got, fix=fix)


def require_range(
    value: float,
    where: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Raise `ConfigError` naming `where` unless the value is finite and within all of the bounds given."""
    bounds = [
        ("at least", at_least, lambda bound: value >= bound),
        ("above", above, lambda bound: value > bound),
        ("at most", at_most, lambda bound: value <= bound),
        ("below", below, lambda bound: value < bound),
    ]
    given = [(f"{name} {bound:g}", holds(bound)) for name, bound, holds in bounds if bound is not None]
    if not math.isfinite(value) or not all(holds for _, holds in given):
        expected = ", ".join(text for text, _ in given) or "a finite number"
        raise ConfigError("a value out of range", where=where, expected=expected, got=value)
