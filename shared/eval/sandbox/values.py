"""Values between solver and checker, as bytes: typed, bounded, and never code.

Both sides number the objects that have crossed, in the same order, and keep them in a `Table`. An object crosses once;
from then on it is named by its number, so that it keeps its identity for the whole check. Before each message a side
finds what has changed in the objects that both know, and the message begins with that.

Decoded are None, booleans, numbers, text, bytes, the standard containers, dates, exceptions, and instances of the
classes that the prompt defines, which both sides have. Whatever else a side owns (functions, iterators, objects of
other classes) stays where it is; the other side gets a proxy, made by `proxies.py`.
"""

import collections
import datetime
import decimal
import enum
import fractions
import io
import itertools
import math
import operator
import struct
import sys
import types
import zoneinfo
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from shared.eval.sandbox import exceptions, library

MAX_BYTES = 64 << 20
MAX_DEPTH = 150

# What bytes that are no value may raise.
_MALFORMED = (TypeError, ValueError, ArithmeticError, struct.error, LookupError, AttributeError, OSError, ImportError)
_MUTABLE = (list, set, dict, bytearray, collections.deque, library.ARRAY, *library.STREAMS)
_DATES = {"date": datetime.date, "datetime": datetime.datetime, "time": datetime.time, "timedelta": datetime.timedelta}


class NotPlainError(Exception):
    """A value that cannot cross, or bytes that are none.

    Attributes:
        too_large: because of its size or depth, not of its type.
        kind: the type that cannot cross.
    """

    def __init__(self, text: str, *, too_large: bool = False, kind: type | None = None) -> None:
        super().__init__(text)
        self.too_large, self.kind = too_large, kind


class KeyedDict(dict[Any, Any]):
    """A dictionary of a class of the program's own that says what a missing key gives."""

    missing: Callable[[Any], Any]

    def __missing__(self, key: Any) -> Any:
        return self.missing(key)


class Table:
    """The objects that have crossed, as one side knows them, by the numbers that both sides give them.

    Args:
        classes: the prompt's classes, as this side has them, by the names that both sides give them.
        namespace: where this side finds classes of exceptions.
    """

    def __init__(self, classes: Mapping[str, type] | None = None, namespace: Mapping[str, Any] | None = None) -> None:
        self.objects: dict[int, Any] = {}
        self.next_number = 0
        self.exported: set[int] = set()  # of this side's own that the other has a proxy of
        self.namespace = {} if namespace is None else namespace
        self._classes = {**library.ATTRIBUTE_CLASSES, **(classes or {})}
        self._class_names = {id(kind): name for name, kind in self._classes.items()}
        self._numbers: dict[int, int] = {}  # by id; `objects` keeps the objects alive
        # What each object that can change holds on both sides, and how to see what it holds now.
        self._agreed: dict[int, tuple[Callable[[Any], Sequence[Any]], list[Any]]] = {}
        self._unreachable: set[int] = set()

    def add(self, value: Any) -> int:
        """Number an object."""
        number = self.next_number
        self.next_number += 1
        self.set(number, value)
        return number

    def set(self, number: int, value: Any) -> None:
        """Say which object a number stands for."""
        self.objects[number] = value
        self._numbers[id(value)] = number

    def number(self, value: Any) -> int | None:
        """The number of an object that has crossed."""
        return self._numbers.get(id(value))

    def forget(self, number: int) -> None:
        """Give up an object."""
        value = self.objects.pop(number, None)
        self.exported.discard(number)
        if value is not None and self._numbers.get(id(value)) == number:
            del self._numbers[id(value)]
        self._agreed.pop(number, None)

    def forget_from(self, number: int) -> None:
        """Give up all objects from a number on, whose message was not sent."""
        for later in range(number, self.next_number):
            self.forget(later)
        self.next_number = number

    def changed(self) -> list[int]:
        """The objects that no longer hold what both sides agreed on, or may not."""
        found, objects, unreachable, same = [], self.objects, self._unreachable, operator.is_
        for number, (held_by, agreed) in self._agreed.items():  # of all objects, before every message
            if number not in unreachable:
                held = held_by(objects[number])
                if len(held) != len(agreed) or not all(map(same, held, agreed)):
                    found.append(number)
        return found

    def agree(self, numbers: Iterable[int]) -> None:
        """Take what these objects hold now as what the other side has."""
        for number in numbers:
            value = self.objects.get(number)
            if self.can_change(value):
                held_by = self._held_by(type(value))
                self._agreed[number] = held_by, list(held_by(value))

    def can_change(self, value: Any) -> bool:
        """Whether a call may change an object in place."""
        if self.class_name(type(value)) is None:
            return isinstance(value, _MUTABLE)
        return not isinstance(value, enum.Enum)

    def unreferenced(self) -> list[int]:
        """The objects that only this table refers to, so that nobody on this side can tell them from new ones."""
        return [number for number in self._lone() if number not in self.exported and number != 0]

    def note_unreachable(self) -> None:
        """Take what only this table refers to as out of reach of this side's code until the next message is sent."""
        self._unreachable = set(self._lone())

    def _lone(self) -> list[int]:
        objects, count = self.objects, sys.getrefcount
        lone = self.add([])
        try:
            least = count(objects[lone])
            return [number for number in objects if count(objects[number]) <= least and number != lone]
        finally:
            self.forget(lone)
            self.next_number = lone

    def _held_by(self, kind: type) -> Callable[[Any], Sequence[Any]]:
        """How to see which objects one of this type holds, shallow."""
        base = _base(kind, _HELD)
        of_base = _HELD[base] if base else lambda value: ()
        if self.class_name(kind) is None:
            return of_base
        return lambda value: [*of_base(value), *itertools.chain.from_iterable(_attributes(value).items())]

    def class_name(self, kind: type) -> str | None:
        """The name of a class that both sides have; None of any other."""
        return self._class_names.get(id(kind))

    def class_named(self, name: str) -> Any:
        """The class of this side, whatever the other has made of its own.

        Raises:
            LookupError: there is none.
        """
        return self._classes[name]


class Encoder:
    """Values to bytes.

    Args:
        table: the objects that the other side knows; new ones are added.
        exact: refuse what is no plain data; otherwise instances of subclasses are written as what they are built on,
            and anything else is exported.
    """

    def __init__(self, table: Table, *, exact: bool) -> None:
        self.table, self.exact = table, exact
        self._parts: list[bytes] = []
        self._num_bytes = 0

    def encode(self, value: Any) -> None:
        """Append a value.

        Raises:
            NotPlainError: it is no plain data, too large or too deep.
        """
        self._value(value, 0)

    def changes(self, released: list[int], changed: list[int]) -> None:
        """Append the objects to give up, and what those that have changed hold now."""
        self._put(struct.pack(f"<II{len(released)}I", len(released), len(changed), *released))
        for number in changed:
            self._put(struct.pack("<I", number))
            self._contents(self.table.objects[number], 0)

    def take(self) -> bytes:
        """What has been appended."""
        return b"".join(self._parts)

    def _put(self, part: bytes) -> None:
        self._num_bytes += len(part)
        if self._num_bytes > MAX_BYTES:
            raise NotPlainError(f"more than {MAX_BYTES} bytes", too_large=True)
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
            self._int(value)
        elif kind is float and value == value:  # a NaN is told from others by its identity
            self._put(struct.pack("<cd", b"d", value))
        elif kind is str:
            if len(value) > MAX_BYTES:
                raise NotPlainError(f"more than {MAX_BYTES} characters", too_large=True)
            self._sized(b"s", value.encode("utf-8", "surrogatepass"))
        elif kind is bytes:
            self._sized(b"b", value)
        elif kind is complex:
            self._put(struct.pack("<cdd", b"c", value.real, value.imag))
        elif value is Ellipsis:
            self._put(b".")
        elif (number := self.table.number(value)) is not None:
            self._put(struct.pack("<cI", b"r", number))
        elif (name := library.name_of(value, any_of_library=self.exact)) is not None:
            self._sized(b"P", name.encode())
        elif not self.exact and (base := self._atom(value, kind)):
            self._value(_PLAIN_ATOMS[base](value), depth)
        else:
            self._object(value, kind, depth + 1)

    def _int(self, value: int) -> None:
        if value.bit_length() > 8 * MAX_BYTES:
            raise NotPlainError("too large an integer", too_large=True)
        if -(1 << 63) <= value < 1 << 63:
            self._put(struct.pack("<cq", b"j", value))
        else:
            self._sized(b"i", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))

    def _object(self, value: Any, kind: type, depth: int) -> None:
        """An object that has not crossed yet, numbered before what it holds is written, which may refer to it."""
        if depth > MAX_DEPTH:
            raise NotPlainError(f"nested more than {MAX_DEPTH} deep", too_large=True)
        self.table.add(value)
        if (name := self.table.class_name(kind)) is not None:
            self._instance(value, name, depth)
        elif isinstance(value, type) and (name := self.table.class_name(value)) is not None:
            self._sized(b"U", name.encode())
        elif kind is float:
            self._put(struct.pack("<cd", b"a", value))
        elif known := library.state(value):
            self._sized(b"L", known[0].encode())
            self._items(known[1], depth)
        elif base := kind if kind in _TAGS else None if self.exact else _base(kind, _TAGS):
            if base is dict and hasattr(kind, "__missing__"):
                base = KeyedDict
            self._put(_TAGS[base])
            if base is KeyedDict:
                self._value(value.__missing__, depth)
            elif base is library.ARRAY:
                self._value(value.typecode, depth)
            elif base is collections.deque:
                self._value(value.maxlen, depth)
            elif base is collections.defaultdict:
                self._value(value.default_factory, depth)
            self._contents(value, depth)
        elif kind is range:
            self._put(b"R")
            for part in (value.start, value.stop, value.step):
                self._value(part, depth)
        elif view := next((tag for tag, view in _VIEWS.items() if isinstance(value, view)), None):
            self._put(view)
            self._items(list(value), depth)
        elif kind is decimal.Decimal:
            self._sized(b"M", str(value).encode())
        elif kind is fractions.Fraction:
            self._put(b"Q")
            self._items([value.numerator, value.denominator], depth)
        elif kind in _DATES.values() and _has_known_zone(value):
            self._sized(b"A", kind.__name__.encode())
            self._items(_date_parts(value), depth)
            self._value(getattr(value, "tzinfo", None), depth)
        elif kind is datetime.timezone:
            self._put(b"z")
            self._items(list(value.__getinitargs__()), depth)
        elif kind is zoneinfo.ZoneInfo and value.key:
            self._sized(b"Y", value.key.encode())
        elif isinstance(value, BaseException):
            self._put(b"e")
            self._items(list(exceptions.outline(value)), depth)
        else:
            self._export(value, depth)

    def _instance(self, value: Any, name: str, depth: int) -> None:
        """An instance of a class that both sides have, without a call of its own methods."""
        if isinstance(value, enum.Enum):
            self._sized(b"n", name.encode())
            self._value(value._value_, depth)
        elif isinstance(value, BaseException):
            self._put(b"e")
            self._items(list(exceptions.outline(value)), depth)
        else:
            self._sized(b"o", name.encode())
            base = _base(type(value), _IMMUTABLE)
            self._value(_IMMUTABLE[base](value) if base else None, depth)
            self._contents(value, depth)

    def _export(self, value: Any, depth: int) -> None:
        """Something that stays on this side."""
        form = _form(value)
        # A test's iterator is only asked for items, so it must be nothing more; of an `object()` nothing can be asked.
        if self.exact and (form in (b"o", b"c", b"s") or isinstance(value, io.IOBase)) and type(value) is not object:
            raise NotPlainError(f"a value of type {type(value).__name__}", kind=type(value))
        self.table.exported.add(self.table.next_number - 1)
        self._put(b"x" + form)
        described = (getattr(value, name, None) for name in ("__name__", "__doc__"))
        for text in (type(value).__name__, *described):
            self._value(text[:1000] if type(text) is str else None, depth)

    def _contents(self, value: Any, depth: int) -> None:
        """What an object holds: the items of the container that it is, its attributes where it is an instance."""
        if isinstance(value, bytearray | library.ARRAY):
            self._sized(b"", bytes(value))
        elif isinstance(value, library.STREAMS):
            self._items([None, 0] if value.closed else [value.getvalue(), value.tell()], depth)
        elif (base := _base(type(value), _ITEMS)) and (base not in _IMMUTABLE or not self._is_shared(type(value))):
            self._items(_ITEMS[base](value), depth)
        if self.table.class_name(type(value)) is not None:
            self._items(list(itertools.chain.from_iterable(_attributes(value).items())), depth)

    def _atom(self, value: Any, kind: type) -> type | None:
        """What an instance of the program's own subclass of a number or text is written as."""
        base = None if kind is float else _base(kind, _PLAIN_ATOMS)
        return base if base and not self._is_shared(kind) and library.state(value) is None else None

    def _is_shared(self, kind: type) -> bool:
        """Whether both sides have a class; other classes' instances are written as the container they are built on."""
        return self.table.class_name(kind) is not None

    def _items(self, items: list[Any], depth: int) -> None:
        if len(items) > MAX_BYTES:
            raise NotPlainError(f"more than {MAX_BYTES} items", too_large=True)
        kinds = set(map(type, items))
        if kinds == {str}:
            texts = [text.encode("utf-8", "surrogatepass") for text in items]
            self._put(struct.pack(f"<cI{len(items)}I", b"s", len(items), *map(len, texts)))
            self._put(b"".join(texts))
            return
        form = "q" if kinds == {int} else "d" if kinds == {float} and not math.isnan(sum(items)) else ""
        if form:  # fast, for there may be many
            try:
                self._put(struct.pack(f"<cI{len(items)}{form}", form.encode(), len(items), *items))
                return
            except struct.error:  # an integer beyond 64 bits
                pass
        self._put(struct.pack("<cI", b"m", len(items)))
        for item in items:
            self._value(item, depth)


class Decoder:
    """Bytes to values.

    Args:
        table: the objects that references may name; new ones are added.
        data: what an `Encoder` wrote, or anything.
        proxy: makes the proxy of something that stays on the other side, of its number, form, type, name and text.
        named: finds what the other side may name; see `library.py`.
    """

    def __init__(
        self, table: Table, data: bytes, *, proxy: Callable[..., Any], named: Callable[[str], Any] = library.named
    ) -> None:
        self.table, self._named = table, named
        self.first_new, self.deepest = table.next_number, 0
        self._proxy = proxy
        self._data, self._at = memoryview(data), 0

    def decode(self) -> Any:
        """The next value.

        Raises:
            NotPlainError: the bytes are no value.
        """
        return self._checked(lambda: self._value(0))

    def changes(self) -> list[int]:
        """Give up what the other side has given up, and take over what has changed. Returns the objects that have.

        Raises:
            NotPlainError: the bytes are no changes.
        """
        changed: list[int] = self._checked(self._changes)
        return changed

    def _checked(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except _MALFORMED as error:
            raise NotPlainError(f"malformed data: {error}") from None

    def _changes(self) -> list[int]:
        num_released, num_changed = self._unpack("II")
        if 4 * (num_released + num_changed) > len(self._data):
            raise NotPlainError("cut short")
        for number in self._unpack(f"{num_released}I"):
            self.table.forget(number)
        changed = []
        for _ in range(num_changed):
            (number,) = self._unpack("I")
            value = self.table.objects[number]
            if not self.table.can_change(value):
                raise NotPlainError("a change of what cannot change")
            self._read_contents(value, 0)
            changed.append(number)
        return changed

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
            case b"P":
                return self._named(self._sized().decode())
            case b"r":
                value = self.table.objects[self._unpack("I")[0]]
                if value is _UNFINISHED:
                    raise NotPlainError("an immutable object inside itself")
                return value
        if depth >= MAX_DEPTH:
            raise NotPlainError("nested too deep", too_large=True)
        return self._object(tag, depth + 1)

    def _object(self, tag: bytes, depth: int) -> Any:
        """A new object: numbered first, since what it holds may refer to it, or to later ones."""
        self.deepest = max(self.deepest, depth)
        number = self.table.next_number
        self.table.next_number += 1
        self.table.objects[number] = _UNFINISHED
        value: Any
        if tag == b"x":
            (form,) = self._unpack("c")
            value = self._proxy(number, form, *(self._value(depth) for _ in range(3)))
        elif tag == b"o":
            value = self._instance(number, depth)
        elif (kind := _KINDS.get(tag)) in (tuple, frozenset):
            value = kind(self._items(depth))
        elif kind is not None:
            if kind is collections.deque:
                value = kind(maxlen=self._value(depth))
            else:
                value = kind(self._value(depth)) if kind is library.ARRAY else kind()
            self.table.set(number, value)
            if kind is KeyedDict:
                value.missing = self._value(depth)
            elif kind is collections.defaultdict:
                value.default_factory = self._value(depth)
            self._read_contents(value, depth)
            return value
        else:
            value = self._immutable(tag, depth)
        self.table.set(number, value)
        return value

    def _immutable(self, tag: bytes, depth: int) -> Any:
        match tag:
            case b"a":
                return self._unpack("d")[0]
            case b"L":
                return library.restored(self._sized().decode(), self._items(depth))
            case b"M":
                return decimal.Decimal(self._sized().decode())
            case b"Q":
                numerator, denominator = self._items(depth)
                if type(numerator) is not int or type(denominator) is not int:
                    raise NotPlainError("a fraction of something else than integers")
                return fractions.Fraction(numerator, denominator)
            case b"A":
                date = _DATES[self._sized().decode()]
                parts, zone = self._items(depth), self._value(depth)
                fold = {"fold": parts.pop()} if date in (datetime.datetime, datetime.time) else {}
                return date(*parts, tzinfo=zone, **fold) if fold else date(*parts)
            case b"z":
                return datetime.timezone(*self._items(depth))
            case b"Y":
                return zoneinfo.ZoneInfo(self._sized().decode())
            case b"R":
                return range(*(self._value(depth) for _ in range(3)))
            case b"n":
                return self.table.class_named(self._sized().decode())(self._value(depth))
            case b"U":
                return self.table.class_named(self._sized().decode())
            case b"e":
                return exceptions.rebuild(self._items(depth), self.table.namespace)
        make = _MAKERS.get(tag)
        if make is None:
            raise NotPlainError("an unknown tag")
        return make(self._items(depth))

    def _instance(self, number: int, depth: int) -> Any:
        kind = self.table.class_named(self._sized().decode())
        items = self._value(depth)
        base = _base(kind, _IMMUTABLE)
        if (base is None) != (items is None) or issubclass(kind, enum.Enum | BaseException):
            raise NotPlainError("an instance of another form")
        new: Any = (base or _base(kind, _ITEMS) or _base(kind, {types.SimpleNamespace: 0}) or object).__new__
        value = new(kind) if base is None else new(kind, items)
        self.table.set(number, value)
        self._read_contents(value, depth)
        return value

    def _read_contents(self, value: Any, depth: int) -> None:
        """Give an object the contents that come next, in place and without a call of its own methods."""
        if isinstance(value, bytearray):
            bytearray.__setitem__(value, slice(None), self._sized())
        elif isinstance(value, library.ARRAY):
            del value[:]
            value.frombytes(self._sized())
        elif isinstance(value, library.STREAMS):
            _refill(value, *self._items(depth))
        elif (base := _base(type(value), _ITEMS)) and base not in _IMMUTABLE:
            items = self._items(depth)
            if issubclass(base, dict):
                dict.clear(value)
                for i in range(0, len(items), 2):
                    base.__setitem__(value, items[i], items[i + 1])
            elif base is list:
                list.__setitem__(value, slice(None), items)
            elif base is set:
                set.clear(value)
                set.update(value, items)
            else:
                collections.deque.clear(value)
                collections.deque.extend(value, items)
        if self.table.class_name(type(value)) is not None:
            items = self._items(depth)
            _set_attributes(value, dict(zip(items[::2], items[1::2], strict=True)))

    def _items(self, depth: int) -> list[Any]:
        form, count = self._unpack("cI")
        if count > len(self._data) - self._at:  # an item has a byte at least
            raise NotPlainError("cut short")
        if form in (b"q", b"d"):
            return list(self._unpack(f"{count}{form.decode()}"))
        if form == b"s":
            ends = list(itertools.accumulate(self._unpack(f"{count}I"), initial=0))
            if ends[-1] > len(self._data) - self._at:
                raise NotPlainError("cut short")
            start, self._at = self._at, self._at + ends[-1]
            texts = bytes(self._data[start : self._at])
            return [texts[i:j].decode("utf-8", "surrogatepass") for i, j in itertools.pairwise(ends)]
        return [self._value(depth) for _ in range(count)]


def _base(kind: type, among: Mapping[type, Any]) -> type | None:
    """The first class of these that a class is or is built on."""
    return next((base for base in kind.__mro__ if base in among), None)


def _form(value: Any) -> bytes:
    """What a proxy of a value must be able to do."""
    if isinstance(value, types.GeneratorType):
        return b"g"
    if isinstance(value, types.CoroutineType):
        return b"c"
    if isinstance(value, AsyncIterator):
        return b"s"
    if isinstance(value, Iterator):
        return b"i"
    if isinstance(value, types.FunctionType | types.MethodType | types.BuiltinFunctionType):
        return b"f"
    return b"k" if callable(value) else b"o"


def _stream_bytes(stream: Any) -> bytes:
    if stream.closed:
        return b""
    content = stream.getvalue()
    text = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return bytes(text + stream.tell().to_bytes(8, "little"))


def _refill(stream: Any, content: Any, place: Any) -> None:
    """Give a stream in memory its content and its place; without content, close it."""
    if content is None:
        stream.close()
        return
    stream.seek(0)
    stream.truncate()
    stream.write(content)
    stream.seek(place)


def _attributes(value: Any) -> dict[str, Any]:
    """An instance's attributes, in its `__dict__` and in slots."""
    found = dict(object.__getattribute__(value, "__dict__")) if hasattr(type(value), "__dict__") and hasattr(
        value, "__dict__"
    ) else {}  # fmt: skip
    for name, slot in _slots(type(value)):
        try:
            found[name] = slot.__get__(value)
        except AttributeError:  # not set
            continue
    return found


def _set_attributes(value: Any, attributes: dict[str, Any]) -> None:
    slots = dict(_slots(type(value)))
    for name, slot in slots.items():
        if name in attributes:
            slot.__set__(value, attributes[name])
    if others := {name: attributes[name] for name in attributes if name not in slots}:
        own = object.__getattribute__(value, "__dict__")
        own.clear()
        own.update(others)
    elif hasattr(value, "__dict__"):
        object.__getattribute__(value, "__dict__").clear()


def _slots(kind: type) -> Iterator[tuple[str, Any]]:
    for base in kind.__mro__:
        for name, slot in vars(base).items():
            is_slot = isinstance(slot, types.MemberDescriptorType) and name != "__dict__"
            if is_slot and base.__module__ == kind.__module__:
                yield name, slot


def _has_known_zone(value: Any) -> bool:
    zone = getattr(value, "tzinfo", None)
    return zone is None or type(zone) in (datetime.timezone, zoneinfo.ZoneInfo)


def _date_parts(value: Any) -> list[int]:
    if isinstance(value, datetime.timedelta):
        return [value.days, value.seconds, value.microseconds]
    names = ("year", "month", "day", "hour", "minute", "second", "microsecond", "fold")
    return [getattr(value, name) for name in names if hasattr(value, name)]


def _flat(value: Any) -> list[Any]:
    return list(itertools.chain.from_iterable(dict(value).items()))


def _items_view(items: list[Any]) -> Any:
    return dict(items).items()


_UNFINISHED = object()
_TAGS: dict[type, bytes] = {
    list: b"l",
    tuple: b"t",
    set: b"S",
    frozenset: b"Z",
    dict: b"D",
    bytearray: b"B",
    collections.Counter: b"C",
    collections.OrderedDict: b"O",
    collections.defaultdict: b"h",
    collections.deque: b"q",
    KeyedDict: b"k",
    library.ARRAY: b"J",
    io.StringIO: b"G",
    io.BytesIO: b"H",
}
_KINDS: dict[bytes, Any] = {tag: kind for kind, tag in _TAGS.items()}
_VIEWS: dict[bytes, type] = {b"K": type({}.keys()), b"V": type({}.values()), b"I": type({}.items())}
_MAKERS: dict[bytes, Callable[[list[Any]], Any]] = {
    b"K": lambda items: dict.fromkeys(items).keys(),
    b"V": lambda items: dict(enumerate(items)).values(),
    b"I": _items_view,
}
# What a container holds, of itself and of instances of its subclasses.
_ITEMS: dict[type, Callable[[Any], list[Any]]] = {
    list: list,
    tuple: list,
    set: list,
    frozenset: list,
    collections.deque: list,
    collections.Counter: _flat,
    collections.OrderedDict: _flat,
    collections.defaultdict: _flat,
    dict: _flat,
}
# The objects that a container holds; of a set in its order, which only a change disturbs.
_HELD: dict[type, Callable[[Any], Sequence[Any]]] = {
    list: lambda value: value if type(value) is list else list(list.__iter__(value)),
    set: lambda value: list(set.__iter__(value)),
    dict: lambda value: [*dict.keys(value), *dict.values(value)],
    collections.deque: lambda value: list(collections.deque.__iter__(value)),
    bytearray: bytes,  # of small integers, of which there is one each
    library.ARRAY: lambda value: [value.typecode, *value.tobytes()],
    io.StringIO: lambda value: _stream_bytes(value),
    io.BytesIO: lambda value: _stream_bytes(value),
}
# What an instance of a subclass of something immutable is built on.
_PLAIN_ATOMS: dict[type, Callable[[Any], Any]] = {
    int: lambda value: int.__index__(value),
    float: lambda value: float.__add__(value, -0.0),
    complex: lambda value: complex(value.real, value.imag),
    str: lambda value: str.__str__(value) if type(str.__str__(value)) is str else "".join(list(value)),
    bytes: lambda value: bytes(bytearray(value)),
}
_IMMUTABLE: dict[type, Callable[[Any], Any]] = {
    **_PLAIN_ATOMS,
    tuple: lambda value: tuple(tuple.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
}
