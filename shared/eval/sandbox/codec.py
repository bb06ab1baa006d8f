"""Values between solver and checker as bytes: typed, bounded, and never code.

A message is a row of operations on a stack, so that nothing nests and depth has no limit: plain values are pushed; an
object takes what it is made of from the stack and is pushed itself. Both sides number the objects that have crossed, in
the same order, and keep them in a `Table`. An object crosses once; from then on it is named by its number, so that it
keeps its identity for the whole check.

Plain data crosses (`kinds.py`), and so do instances of the classes that the prompt defines, which both sides have.
Whatever else a side owns stays where it is; the other side gets a proxy or a class like it (`proxies.py`).
"""

import enum
import io
import itertools
import math
import struct
import types
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from shared.eval.sandbox import exceptions, library, proxies
from shared.eval.sandbox.kinds import CHANGING, FIXED, PLAIN
from shared.eval.sandbox.outlines import class_outline, form_of, function_outline
from shared.eval.sandbox.table import Table, base_among

if TYPE_CHECKING:
    from shared.eval.sandbox.peer import Peer

MAX_BYTES = 256 << 20


class NotPlainError(Exception):
    """A value that cannot cross, or bytes that are none; `kind` is the type that cannot cross."""

    def __init__(self, text: str, kind: type | None = None) -> None:
        super().__init__(text)
        self.kind = kind


class TooLargeError(NotPlainError):
    """A value that cannot cross because of its size."""

    def __init__(self) -> None:
        super().__init__(f"more than {MAX_BYTES >> 20} MiB")


def _text_bytes(text: str) -> bytes:
    if len(text) > MAX_BYTES:
        raise TooLargeError
    return text.encode("utf-8", "surrogatepass")


def _int_bytes(value: int) -> bytes:
    if value.bit_length() > 8 * MAX_BYTES:
        raise TooLargeError
    return value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)


_COUNT, _SIZED, _DOUBLE, _DOUBLES = (struct.Struct(f"<{form}") for form in ("I", "cI", "d", "dd"))
# Values that have no identity: the operation that pushes one, the way to bytes and the way back.
_ATOMS: dict[type, tuple[bytes, Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    **dict.fromkeys((type(None), types.TracebackType), (b"N", lambda value: b"", lambda data: None)),
    bool: (b"t", lambda value: b"1" if value else b"", bool),
    int: (b"i", _int_bytes, lambda data: int.from_bytes(data, "little", signed=True)),
    str: (b"s", _text_bytes, lambda data: data.decode("utf-8", "surrogatepass")),
    float: (b"d", _DOUBLE.pack, lambda data: _DOUBLE.unpack(data)[0]),
    bytes: (b"b", bytes, bytes),
    complex: (b"c", lambda value: _DOUBLES.pack(value.real, value.imag), lambda data: complex(*_DOUBLES.unpack(data))),
}
_READERS = {ord(operation): read for operation, _, read in _ATOMS.values()}
_FIXED = {kind: tag for tag, kind in enumerate(FIXED)}
_CHANGING = {kind: tag for tag, kind in enumerate(CHANGING)}
_REFERENCE = ord("r")
# Many values of one type at once, which is fast.
_MANY = {int: (b"Q", "q"), float: (b"W", "d")}


class _Later(NamedTuple):
    """An operation to be written once the items that it takes have been."""

    operation: bytes
    tag: int
    num_items: int
    value: Any  # the object that it makes


class Encoder:
    """Values to bytes.

    Args:
        table: the objects that the other side knows; new ones are added.
        exact: of the test's side: refuse what is no plain data, and name what the library has. The program's side
            writes instances of other classes as what they are built on, and exports anything else.
    """

    def __init__(self, table: Table, *, exact: bool) -> None:
        self.table, self.exact = table, exact
        self._written: list[bytes] = []
        self._num_bytes = 0
        self._work: list[Any] = []  # values, and operations on them; the last comes first
        self._unmade: set[int] = set()  # ids of objects that are made once their items are there

    def encode(self, value: Any) -> None:
        """Append a value; a `NotPlainError` says that it is no plain data, or too large."""
        self._work.append(value)
        self._finish()

    def change(self, number: int) -> None:
        """Append what an object that both sides know holds now."""
        self._put_contents(number)
        self._finish()

    def release(self, numbers: Sequence[int]) -> None:
        """Append objects to give up."""
        if numbers:
            self._put(struct.pack(f"<cI{len(numbers)}I", b"U", len(numbers), *numbers))

    def take(self) -> bytes:
        """What has been appended."""
        return b"".join(self._written)

    def _finish(self) -> None:
        while self._work:
            item = self._work.pop()
            if type(item) is _Later:
                self._make(item)
            else:
                self._value(item)

    def _put(self, data: bytes) -> None:
        self._num_bytes += len(data)
        if self._num_bytes > MAX_BYTES:
            raise TooLargeError
        self._written.append(data)

    def _value(self, value: Any) -> None:
        kind = type(value)
        if kind in _ATOMS and (kind is not float or value == value):  # a NaN is told from others by its identity
            operation, write, _ = _ATOMS[kind]
            data = write(value)
            self._put(_SIZED.pack(operation, len(data)) + data)
        elif (number := self.table.number(value)) is not None:
            self._put(_SIZED.pack(b"r", number))
        elif (name := library.name_of(value, any_of_library=self.exact)) is not None:
            self._put(_SIZED.pack(b"P", len(name)) + name.encode())
        elif id(value) in self._unmade:
            raise NotPlainError("an immutable object inside itself")
        else:
            self._object(value, kind)

    def _object(self, value: Any, kind: type) -> None:
        """An object that has not crossed yet."""
        base = self.table.base_of(kind)
        if kind in _FIXED and (items := FIXED[kind].take(value)) is not None:
            self._later(b"M", items, value, _FIXED[kind])
        elif kind in _CHANGING:
            self._later(b"O", CHANGING[kind].made_with(value), value, _CHANGING[kind])
        elif isinstance(value, type) and (not self.exact or issubclass(value, BaseException)):
            self._later(b"K", class_outline(value, with_names=not self.exact), value)
        elif isinstance(value, BaseException):
            self._later(b"E", [kind, *exceptions.outline(value)], value)
        elif issubclass(kind, enum.Enum) and (base is kind or library.is_value_class(kind)):
            self._later(b"Y", [kind, *_member(value, kind)], value)
        elif base is None or not (base is kind or self._has_class(kind)):
            self._export(value, kind)
        else:
            plain, changing = base_among(kind, PLAIN), base_among(kind, CHANGING)
            made_with = CHANGING[changing].made_with(value) if changing else [PLAIN[plain](value)] if plain else []
            self._later(b"I", [kind, *made_with], value)

    def _has_class(self, kind: type) -> bool:
        """Whether the other side has, or may be told of, a class that is built on one of data."""
        return not self.exact or self.table.number(kind) is not None or library.is_value_class(kind)

    def _export(self, value: Any, kind: type) -> None:
        """Something that stays on this side."""
        form = form_of(value)
        # A test's iterator is only asked for items, so it must be nothing more; of an `object()` nothing can be asked.
        if self.exact and (form in "oc" or isinstance(value, io.IOBase)) and kind is not object:
            raise NotPlainError(f"a value of type {kind.__name__}", kind)
        has_class = not self.exact and form in "iko"
        self._later(b"X", [kind] if has_class else function_outline(value), value, ord(form))

    def _later(self, operation: bytes, items: Sequence[Any], value: Any, tag: int = 0) -> None:
        """Write the items, and then the operation that makes an object of them."""
        self._unmade.add(id(value))
        self._items(items, _Later(operation, tag, len(items), value))

    def _put_contents(self, number: int) -> None:
        items = self.table.contents(self.table.objects[number])
        self._items(items, _Later(b"C", 0, len(items), number))

    def _items(self, items: Sequence[Any], then: _Later) -> None:
        kinds = set(map(type, items))
        many = _packed(items, kinds.pop()) if len(kinds) == 1 else None
        if many is None:
            self._work.append(then)
            self._work.extend(reversed(items))
        else:
            self._put(many)
            self._make(then)

    def _make(self, later: _Later) -> None:
        operation, tag, num_items, value = later
        if operation == b"C":
            self._put(struct.pack("<cII", b"C", value, num_items))
            return
        self._put(struct.pack("<cBI", operation, tag, num_items))
        number = self.table.add(value)
        self._unmade.discard(id(value))
        if operation in (b"X", b"K"):
            self.table.exported.add(number)
        elif operation in (b"O", b"I"):
            self._put_contents(number)


def _member(value: enum.Enum, kind: Any) -> list[Any]:
    """A member's name and value; of one without a name of its own, such as two flags, only the value."""
    name = getattr(value, "_name_", None)
    return [name if kind.__members__.get(name) is value else None, value._value_]


def _packed(items: Sequence[Any], kind: type) -> bytes | None:
    """Items of one type at once; None where that cannot be."""
    if kind is str:
        texts = list(map(_text_bytes, items))
        return struct.pack(f"<cI{len(items)}I", b"S", len(items), *map(len, texts)) + b"".join(texts)
    if kind is int or (kind is float and not math.isnan(sum(items))):
        operation, form = _MANY[kind]
        try:
            return struct.pack(f"<cI{len(items)}{form}", operation, len(items), *items)
        except struct.error:  # an integer beyond 64 bits
            pass
    return None


class Decoder:
    """Bytes to values.

    Args:
        table: the objects that references may name; new ones are added.
        data: what an `Encoder` wrote, or anything.
        peer: what proxies of the other side's objects call.
        exact: of the test's side: take from the library only what a program may name.
        start: where in the data it begins.

    Attributes:
        changed: the objects known before that now hold something else.
    """

    def __init__(self, table: Table, data: bytes, peer: "Peer", *, exact: bool, start: int = 0) -> None:
        self.table, self._peer, self._exact = table, peer, exact
        self.first_new = table.next_number
        self.changed: list[int] = []
        self._data, self._at = data, start
        self._stack: list[Any] = []

    def decode(self) -> list[Any]:
        """The values, in order; a `NotPlainError` says that the bytes are none."""
        stack = self._stack
        try:
            while self._at < len(self._data):
                operation = self._data[self._at]
                self._at += 1
                if operation in _READERS:
                    stack.append(_READERS[operation](self._bytes(self._count())))
                elif operation == _REFERENCE:
                    stack.append(self.table.objects[self._count()])
                else:
                    self._do(bytes([operation]))
        except NotPlainError:
            raise
        except Exception as error:  # whatever a hostile message makes anything do
            raise NotPlainError(f"malformed data: {error}") from None
        return stack

    def _do(self, operation: bytes) -> None:
        """One of the rarer operations."""
        if operation == b"P":
            name = self._bytes(self._count()).decode()
            self._stack.append(library.named(name, any_of_library=not self._exact))
        elif operation in b"QWS":
            self._stack += self._many(operation, self._count())
        elif operation == b"C":
            self._refill(self._count(), self._count())
        elif operation == b"U":
            self.table.forget(self._unpack(f"{self._count()}I"))
        else:
            (tag,) = self._bytes(1)
            value = self._made(operation, tag, self._taken(self._count()))
            self.table.add(value)
            self._stack.append(value)

    def _count(self) -> int:
        (count,) = _COUNT.unpack_from(self._data, self._at)
        self._at += _COUNT.size
        return int(count)

    def _bytes(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise NotPlainError("cut short")
        self._at += size
        return self._data[self._at - size : self._at]

    def _unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack("<" + form, self._bytes(struct.calcsize("<" + form)))

    def _many(self, operation: bytes, count: int) -> Iterable[Any]:
        if operation != b"S":
            return self._unpack(f"{count}{'q' if operation == b'Q' else 'd'}")
        ends = list(itertools.accumulate(self._unpack(f"{count}I"), initial=0))
        texts = self._bytes(ends[-1])
        return [texts[i:j].decode("utf-8", "surrogatepass") for i, j in itertools.pairwise(ends)]

    def _taken(self, count: int) -> list[Any]:
        """What the last so many operations have pushed."""
        start = len(self._stack) - count
        if start < 0:
            raise NotPlainError("cut short")
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _refill(self, number: int, count: int) -> None:
        self.table.refill(self.table.objects[number], self._taken(count))
        if number < self.first_new:
            self.changed.append(number)

    def _made(self, operation: bytes, tag: int, items: list[Any]) -> Any:
        """A new object, or one whose contents come next."""
        match operation:
            case b"M":
                return list(FIXED.values())[tag].make(items)
            case b"O":
                kind = list(CHANGING)[tag]
                return CHANGING[kind].new(kind, *items)
            case b"K":
                return proxies.made_class(self._peer, items)
            case b"E":
                return exceptions.rebuilt(*items)
            case b"X":
                return proxies.made_proxy(self._peer, self.table.next_number, chr(tag), items)
            case b"Y":
                return self._member(*items)
            case b"I":
                return self._instance(*items)
        raise NotPlainError("an unknown operation")

    def _member(self, kind: Any, name: Any, value: Any) -> Any:
        """A member of an enumeration of the prompt or the library; of one not loaded here, what it is built on."""
        if issubclass(kind, enum.Enum) and (self.table.base_of(kind) is kind or library.is_value_class(kind)):
            return kind(value) if name is None else kind[name]
        plain = base_among(kind, PLAIN)
        return value if plain is None else plain.__new__(kind, value)

    def _instance(self, kind: Any, *made_with: Any) -> Any:
        """An empty instance of a class that both sides have."""
        if self.table.base_of(kind) is None or issubclass(kind, enum.Enum | BaseException):
            raise NotPlainError("an instance of no class of data")
        if (changing := base_among(kind, CHANGING)) is not None:
            return CHANGING[changing].new(kind, *made_with)
        if (plain := base_among(kind, PLAIN)) is not None and list(map(type, made_with)) != [plain]:
            raise NotPlainError("an instance of another form")
        return (plain or base_among(kind, (types.SimpleNamespace, object))).__new__(kind, *made_with)
