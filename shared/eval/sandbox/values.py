"""Plain data between solver and checker, as bytes: typed, bounded, and never code.

What is decoded is None, booleans, numbers, text, bytes, the standard containers, ranges, dates and iterators (as their
items), nothing else, whatever the bytes. Containers keep their identity: one that occurs twice is written once, and a
reply may refer to the containers of the request by number. Iterators of a program stay where they are and are asked for
one item at a time; those of a test cross as their items.
"""

import collections
import datetime
import decimal
import fractions
import itertools
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

MAX_BYTES = 64 << 20
MAX_DEPTH = 150
MAX_ITERATOR_ITEMS = 100_000

_MUTABLE = (list, set, dict, bytearray, collections.deque)
_DATES = {"date": datetime.date, "datetime": datetime.datetime, "time": datetime.time, "timedelta": datetime.timedelta}


class NotPlainError(Exception):
    """A value that cannot cross, or bytes that are none."""


class Encoder:
    """Values to bytes.

    Args:
        known: containers that the reader has already; they are written as references.
        exact: refuse instances of subclasses; otherwise they are written as what they are built on.
        iterators: takes iterators, which are written as their place in this list; where None, as their items.
    """

    def __init__(
        self,
        known: Iterable[Any] = (),
        *,
        exact: bool,
        iterators: list[Iterator[Any]] | None = None,
        opaque: bool = False,
    ) -> None:
        self._opaque = opaque
        self.exact, self._iterators = exact, iterators
        self.objects: list[Any] = list(known)  # kept alive, so that no id is used twice
        self._index = {
            id(value): i for i, value in enumerate(self.objects) if iterators is None or not isinstance(value, Iterator)
        }
        self._parts: list[bytes] = []
        self._num_bytes = 0

    def encode(self, value: Any) -> None:
        """Append a value.

        Raises:
            NotPlainError: it is no plain data, too large or too deep.
        """
        self._value(value, 0)

    def contents(self, container: Any) -> None:
        """Append what a container holds now."""
        self._items(container, 0)

    def take(self) -> bytes:
        """What has been appended."""
        return b"".join(self._parts)

    def _put(self, part: bytes) -> None:
        self._num_bytes += len(part)
        if self._num_bytes > MAX_BYTES:
            raise NotPlainError(f"more than {MAX_BYTES} bytes")
        self._parts.append(part)

    def _sized(self, tag: bytes, data: bytes) -> None:
        self._put(tag + struct.pack("<I", min(len(data), 0xFFFFFFFF)))
        self._put(data)

    def _value(self, value: Any, depth: int) -> None:
        kind = type(value)
        if value is None:
            self._put(b"N")
        elif kind is bool:
            self._put(b"T" if value else b"F")
        elif kind is int:
            if value.bit_length() > 8 * MAX_BYTES:
                raise NotPlainError("too large an integer")
            if -(1 << 63) <= value < 1 << 63:
                self._put(struct.pack("<cq", b"j", value))
            else:
                self._sized(b"i", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
        elif kind is float:
            self._put(struct.pack("<cd", b"d", value))
        elif kind is str:
            if len(value) > MAX_BYTES:
                raise NotPlainError(f"more than {MAX_BYTES} characters")
            self._sized(b"s", value.encode("utf-8", "surrogatepass"))
        elif kind is bytes:
            self._sized(b"b", value)
        elif kind is complex:
            self._put(struct.pack("<cdd", b"c", value.real, value.imag))
        elif value is Ellipsis:
            self._put(b".")
        elif (index := self._index.get(id(value))) is not None:
            self._put(struct.pack("<cI", b"r", index))
        else:
            self._index[id(value)] = len(self.objects)
            self.objects.append(value)
            self._compound(value, kind, depth + 1)

    def _compound(self, value: Any, kind: type, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise NotPlainError(f"nested more than {MAX_DEPTH} deep")
        if tag := _TAGS.get(kind):
            self._put(tag)
            if kind is collections.deque:
                self._value(value.maxlen, depth)
            self._items(value, depth)
        elif kind is range:
            self._put(b"R")
            for part in (value.start, value.stop, value.step):
                self._value(part, depth)
        elif self._opaque and isinstance(value, Iterator):
            self._put(b"X")
        elif self._iterators is not None and isinstance(value, Iterator):
            self._iterators.append(value)
            self._put(struct.pack("<cI", b"G", len(self._iterators) - 1))
        elif isinstance(value, Iterator):
            items = list(itertools.islice(value, MAX_ITERATOR_ITEMS + 1))
            if len(items) > MAX_ITERATOR_ITEMS:
                raise NotPlainError(f"an iterator of more than {MAX_ITERATOR_ITEMS} items")
            self._put(b"X")
            self._items(items, depth)
        elif view := next((tag for tag, view in _VIEWS.items() if isinstance(value, view)), None):
            self._put(view)
            self._items(list(value), depth)
        elif kind is decimal.Decimal:
            self._sized(b"M", str(value).encode())
        elif kind is fractions.Fraction:
            self._put(b"Q")
            self._items([value.numerator, value.denominator], depth)
        elif kind is type and value in _TYPES.values():
            self._sized(b"P", value.__name__.encode())
        elif kind in _DATES.values() and getattr(value, "tzinfo", None) is None:
            self._sized(b"A", kind.__name__.encode())
            self._items(_date_parts(value), depth)
        elif not self.exact and (base := next((b for b in kind.__mro__ if b in _PLAIN), None)):
            plain = _PLAIN[base](value)
            if base in _TAGS:
                self._compound(plain, base, depth)  # under the number it has already
            else:  # has no number
                del self._index[id(self.objects.pop())]
                self._value(plain, depth)
        else:
            raise NotPlainError(f"a value of type {kind.__name__}")

    def _items(self, value: Any, depth: int) -> None:
        if isinstance(value, bytearray):
            self._sized(b"", bytes(value))
            return
        if len(value) > MAX_BYTES:
            raise NotPlainError(f"more than {MAX_BYTES} items")
        items = list(value.items()) if isinstance(value, dict) else list(value)
        kinds = set(map(type, items))
        if form := "q" if kinds == {int} else "d" if kinds == {float} else "":  # fast, for there may be many
            try:
                self._put(struct.pack(f"<cI{len(items)}{form}", form.encode(), len(items), *items))
                return
            except struct.error:  # an integer beyond 64 bits
                pass
        self._put(struct.pack("<cI", b"m", len(items)))
        if isinstance(value, dict):
            items = list(itertools.chain.from_iterable(items))
        for item in items:
            self._value(item, depth)


class Decoder:
    """Bytes to values.

    Args:
        data: what an `Encoder` wrote, or anything.
        known: containers that references may name, as the encoder's `known`.
        iterator: makes an iterator of its place.
    """

    def __init__(
        self, data: bytes, known: Iterable[Any] = (), *, iterator: Callable[[int], Iterator[Any]] | None = None
    ) -> None:
        self.objects: list[Any] = list(known)
        self._iterator = iterator
        self._data, self._at = memoryview(data), 0

    def decode(self) -> Any:
        """The next value.

        Raises:
            NotPlainError: the bytes are no value.
        """
        try:
            return self._value(0)
        except (TypeError, ValueError, ArithmeticError, struct.error, LookupError, AttributeError) as error:
            raise NotPlainError(f"malformed data: {error}") from None

    def write_back(self, container: Any) -> None:
        """Give a container the contents that come next.

        Raises:
            NotPlainError: the bytes are not its contents.
        """
        try:
            items = self._items(type(container), 0)
            if isinstance(container, list | bytearray):
                container[:] = items
            else:
                container.clear()
                getattr(container, "extend" if isinstance(container, collections.deque) else "update")(items)
        except (TypeError, ValueError, ArithmeticError, struct.error, LookupError, AttributeError) as error:
            raise NotPlainError(f"malformed data: {error}") from None

    def _unpack(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from("<" + form, self._data, self._at)
        self._at += struct.calcsize("<" + form)
        return found

    def _sized(self) -> bytes:
        (size,) = self._unpack("I")
        if size > len(self._data) - self._at:
            raise NotPlainError("cut short")
        self._at += size
        return bytes(self._data[self._at - size : self._at])

    def _value(self, depth: int) -> Any:
        (tag,) = self._unpack("c")
        match tag:
            case b"N":
                return None
            case b"T" | b"F":
                return tag == b"T"
            case b"j":
                return self._unpack("q")[0]
            case b"d":
                return self._unpack("d")[0]
            case b"s":
                return self._sized().decode("utf-8", "surrogatepass")
            case b"i":
                return int.from_bytes(self._sized(), "little", signed=True)
            case b"b":
                return self._sized()
            case b"c":
                return complex(*self._unpack("dd"))
            case b".":
                return ...
            case b"r":
                value = self.objects[self._unpack("I")[0]]
                if value is _UNFINISHED:
                    raise NotPlainError("a tuple inside itself")
                return value
        if depth >= MAX_DEPTH:
            raise NotPlainError("nested too deep")
        return self._compound(tag, depth + 1)

    def _compound(self, tag: bytes, depth: int) -> Any:
        index = len(self.objects)
        self.objects.append(_UNFINISHED)
        if kind := _KINDS.get(tag):
            value = kind(maxlen=self._value(depth)) if kind is collections.deque else kind()
            if isinstance(value, _MUTABLE):  # known before its items are: they may refer to it
                self.objects[index] = value
                items = self._items(kind, depth)
                getattr(value, "update" if isinstance(value, set | dict) else "extend")(items)
                return value
            value = kind(self._items(kind, depth))
        elif tag == b"M":
            value = decimal.Decimal(self._sized().decode())
        elif tag == b"P":
            value = _TYPES[self._sized().decode()]
        elif tag == b"A":
            date = _DATES[self._sized().decode()]
            value = date(*self._items(tuple, depth))
        elif tag == b"G" and self._iterator is not None:
            value = self._iterator(self._unpack("I")[0])
        elif tag == b"R":
            value = range(*(self._value(depth) for _ in range(3)))
        else:
            make = _MAKERS.get(tag)
            if make is None:
                raise NotPlainError("an unknown tag")
            value = make(self._items(list, depth))
        self.objects[index] = value
        return value

    def _items(self, kind: type, depth: int) -> Any:
        if issubclass(kind, bytearray):
            return self._sized()
        form, count = self._unpack("cI")
        if count > len(self._data) - self._at:  # an item has a byte at least
            raise NotPlainError("cut short")
        if form in (b"q", b"d"):
            return list(self._unpack(f"{count}{form.decode()}"))
        if not issubclass(kind, dict):
            return [self._value(depth) for _ in range(count)]
        return {self._value(depth): self._value(depth) for _ in range(count)}


def is_mutable(value: Any) -> bool:
    """Whether a call may change a container."""
    return isinstance(value, _MUTABLE)


def _date_parts(value: Any) -> list[int]:
    if isinstance(value, datetime.timedelta):
        return [value.days, value.seconds, value.microseconds]
    names = ("year", "month", "day", "hour", "minute", "second", "microsecond")
    return [getattr(value, name) for name in names if hasattr(value, name)]


def _items_view(items: list[Any]) -> Any:
    return dict(items).items()


_UNFINISHED = object()
_TYPES = {t.__name__: t for t in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)}
_TAGS: dict[type, bytes] = {
    list: b"l",
    tuple: b"t",
    set: b"S",
    frozenset: b"Z",
    dict: b"D",
    bytearray: b"B",
    collections.Counter: b"C",
    collections.OrderedDict: b"O",
    collections.deque: b"q",
}
_KINDS: dict[bytes, Any] = {tag: kind for kind, tag in _TAGS.items()}
_VIEWS: dict[bytes, type] = {b"K": type({}.keys()), b"V": type({}.values()), b"I": type({}.items())}
_MAKERS: dict[bytes, Callable[[list[Any]], Any]] = {
    b"X": iter,
    b"K": lambda items: dict.fromkeys(items).keys(),
    b"V": lambda items: dict(enumerate(items)).values(),
    b"I": _items_view,
    b"Q": lambda items: fractions.Fraction(*items),
}
# What an instance of a subclass is written as.
_PLAIN: dict[type, Callable[[Any], Any]] = {
    int: lambda value: int.__index__(value),
    float: lambda value: float.__add__(value, -0.0),
    complex: lambda value: complex(value.real, value.imag),
    str: lambda value: str.__str__(value) if type(str.__str__(value)) is str else "".join(list(value)),
    bytes: lambda value: bytes(bytearray(value)),
    collections.Counter: lambda value: collections.Counter(dict(value)),
    collections.OrderedDict: collections.OrderedDict,
    dict: dict,
    list: list,
    tuple: tuple,
    set: set,
    frozenset: frozenset,
    bytearray: bytearray,
    collections.deque: lambda value: collections.deque(value, value.maxlen),
}
