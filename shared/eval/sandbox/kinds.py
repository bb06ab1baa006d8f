"""How values of each class cross as data: what one is taken apart into, and how the other side puts it together."""

import array
import collections
import contextlib
import dataclasses
import datetime
import decimal
import fractions
import gc
import io
import ipaddress
import pathlib
import re
import struct
import time
import types
import uuid
import zoneinfo
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Fixed(NamedTuple):
    """A class whose instances never change."""

    take: Callable[[Any], Sequence[Any] | None]  # the items of an instance; None of one that cannot cross
    make: Callable[[list[Any]], Any]  # an instance from its items


class Changing(NamedTuple):
    """A class whose instances change in place. None of these functions calls a method of a subclass."""

    take: Callable[[Any], Sequence[Any]]  # the items that an instance holds now
    fill: Callable[[Any, list[Any]], None]  # have an instance hold these items and no others
    new: Callable[..., Any]  # an empty instance of a class built on this one, made with what `made_with` gives
    made_with: Callable[[Any], list[Any]] = lambda value: []  # what of an instance never changes


def _of_fields(kind: Callable[..., Any], *names: str) -> Fixed:
    return Fixed(lambda value: [getattr(value, name) for name in names], lambda items: kind(*items))


def _of_text(kind: Callable[[str], Any]) -> Fixed:
    return Fixed(lambda value: [str(value)], lambda items: kind(*items))


def _of_object(view: Callable[[Any], Any]) -> Fixed:
    """What shows another object as it is now."""
    return Fixed(gc.get_referents, lambda items: view(*items))


def _with_zone(kind: Any, *names: str) -> Fixed:
    """A time; where its zone is of a class of one side's own, with what that zone is then."""

    def take(value: Any) -> list[Any]:
        zone, offset = value.tzinfo, value.utcoffset()
        if type(zone) not in (type(None), datetime.timezone, zoneinfo.ZoneInfo):
            zone = None if offset is None else datetime.timezone(offset, value.tzname() or "")
        return [*(getattr(value, name) for name in names), zone, value.fold]

    return Fixed(take, lambda items: kind(*items[:-1], fold=items[-1]))


def _fraction(items: list[Any]) -> fractions.Fraction:
    if list(map(type, items)) != [int, int]:  # of a text it would compute `1e400000000`
        raise TypeError("a fraction of something else than integers")
    return fractions.Fraction(*items)


def _viewed_bytes(view: memoryview) -> list[Any] | None:
    """What a view of bytes is made of: the object itself where all of it is seen."""
    if view.format != "B" or view.ndim != 1:
        return None
    return [view.obj] if view.contiguous and view.nbytes == len(view.obj) else [bytes(view)]  # type: ignore[arg-type]


_CLOCK = ("hour", "minute", "second", "microsecond")
_DAY = ("year", "month", "day")
FIXED: dict[type, Fixed] = {
    tuple: Fixed(list, tuple),
    frozenset: Fixed(list, frozenset),
    float: Fixed(  # only a NaN, which is told from others by its identity
        lambda value: [struct.pack("<d", value)], lambda items: struct.unpack("<d", *items)[0]
    ),
    range: _of_fields(range, "start", "stop", "step"),
    slice: _of_fields(slice, "start", "stop", "step"),
    decimal.Decimal: _of_text(decimal.Decimal),
    fractions.Fraction: Fixed(lambda value: [value.numerator, value.denominator], _fraction),
    datetime.date: _of_fields(datetime.date, *_DAY),
    datetime.time: _with_zone(datetime.time, *_CLOCK),
    datetime.datetime: _with_zone(datetime.datetime, *_DAY, *_CLOCK),
    datetime.timedelta: _of_fields(datetime.timedelta, "days", "seconds", "microseconds"),
    datetime.timezone: Fixed(lambda value: value.__getinitargs__(), lambda items: datetime.timezone(*items)),
    zoneinfo.ZoneInfo: Fixed(lambda value: [value.key] if value.key else None, lambda items: zoneinfo.ZoneInfo(*items)),
    re.Pattern: Fixed(lambda value: [value.pattern, value.flags], lambda items: re.compile(*items)),
    uuid.UUID: Fixed(lambda value: [value.int], lambda items: uuid.UUID(int=items[0])),
    memoryview: Fixed(_viewed_bytes, lambda items: memoryview(*items)),
    types.MappingProxyType: _of_object(types.MappingProxyType),
    time.struct_time: Fixed(lambda value: [tuple(value)], lambda items: time.struct_time(*items)),
    **{type(view(base())): _of_object(view)
       for base in (dict, collections.OrderedDict) for view in (base.keys, base.values, base.items)},
    **{kind: _of_text(kind) for kind in (
        pathlib.PurePosixPath, pathlib.PosixPath, pathlib.PureWindowsPath, ipaddress.IPv4Address, ipaddress.IPv6Address,
        ipaddress.IPv4Network, ipaddress.IPv6Network)},
}  # fmt: skip


def _mapping(base: Any) -> Changing:
    def fill(value: Any, items: list[Any]) -> None:
        base.clear(value)
        half = len(items) // 2
        for key, item in zip(items[:half], items[half:], strict=True):
            base.__setitem__(value, key, item)

    return Changing(lambda value: [*base.keys(value), *base.values(value)], fill, base.__new__)


def _stream(base: Any) -> Changing:
    def new(kind: Any) -> Any:
        stream = base.__new__(kind)
        base.__init__(stream)
        return stream

    def fill(stream: Any, items: list[Any]) -> None:
        content, place = items
        if content is None:
            base.close(stream)
            return
        base.seek(stream, 0)
        base.truncate(stream)
        base.write(stream, content)
        base.seek(stream, place)

    return Changing(lambda s: [None, 0] if s.closed else [base.getvalue(s), base.tell(s)], fill, new)


def _new_deque(kind: Any, maxlen: Any) -> Any:
    value = collections.deque.__new__(kind)
    collections.deque.__init__(value, (), maxlen)
    return value


def _fill_set(value: set[Any], items: list[Any]) -> None:
    set.clear(value)
    set.update(value, items)


def _fill_deque(value: collections.deque[Any], items: list[Any]) -> None:
    collections.deque.clear(value)
    collections.deque.extend(value, items)


def _fill_array(value: Any, items: list[Any]) -> None:
    del value[:]
    array.array.frombytes(value, *items)


_DICT, _DEFAULTDICT = _mapping(dict), _mapping(collections.defaultdict)
_factory: Any = vars(collections.defaultdict)["default_factory"]


def _fill_defaultdict(value: Any, items: list[Any]) -> None:
    _factory.__set__(value, items[0])
    _DEFAULTDICT.fill(value, items[1:])


CHANGING: dict[type, Changing] = {
    list: Changing(
        lambda value: value if type(value) is list else list(list.__iter__(value)),
        lambda value, items: list.__setitem__(value, slice(None), items),
        list.__new__,
    ),
    set: Changing(lambda value: list(set.__iter__(value)), _fill_set, set.__new__),
    dict: _DICT,
    collections.Counter: _DICT._replace(new=collections.Counter.__new__),
    collections.OrderedDict: _mapping(collections.OrderedDict),
    collections.defaultdict: _DEFAULTDICT._replace(
        take=lambda value: [_factory.__get__(value), *_DEFAULTDICT.take(value)], fill=_fill_defaultdict
    ),
    collections.deque: Changing(
        lambda value: list(collections.deque.__iter__(value)), _fill_deque, _new_deque, lambda value: [value.maxlen]
    ),
    bytearray: Changing(
        lambda value: [bytes(value)],
        lambda value, items: bytearray.__setitem__(value, slice(None), *items),
        bytearray.__new__,
    ),
    array.array: Changing(
        lambda value: [array.array.tobytes(value)], _fill_array, array.array.__new__, lambda value: [value.typecode]
    ),
    io.StringIO: _stream(io.StringIO),
    io.BytesIO: _stream(io.BytesIO),
}
# Classes that others are built on whose instances never change: such an instance as a plain value.
PLAIN: dict[type, Callable[[Any], Any]] = {
    int: lambda value: int.__add__(value, 0),
    float: lambda value: float.__add__(value, -0.0),
    complex: lambda value: complex(value.real, value.imag),
    str: lambda value: str.__getitem__(value, slice(None)),
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    tuple: lambda value: tuple(tuple.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
    decimal.Decimal: decimal.Decimal,
    fractions.Fraction: lambda value: fractions.Fraction(value.numerator, value.denominator),
}
# Classes whose instances are their attributes.
OF_ATTRIBUTES: tuple[type, ...] = (
    collections.ChainMap, collections.UserDict, collections.UserList, collections.UserString, dataclasses.Field,
    types.SimpleNamespace)  # fmt: skip


def attributes(value: Any) -> dict[str, Any]:
    """An instance's attributes, in its `__dict__` and in slots, whatever its class makes of them."""
    by_name = {name: item for name, item in _dictionary(value).items() if not _is_special(name)}
    for name, slot in _slots(type(value)).items():
        with contextlib.suppress(AttributeError):  # not set
            by_name[name] = slot.__get__(value)
    return by_name


def set_attributes(value: Any, wanted: dict[str, Any]) -> None:
    """Give an instance these attributes and no others."""
    slots, dictionary = _slots(type(value)), _dictionary(value)
    for name in [name for name in dictionary if not _is_special(name)]:
        del dictionary[name]
    for name, item in wanted.items():
        if name in slots:
            slots[name].__set__(value, item)
        else:
            dictionary[name] = item


def _dictionary(value: Any) -> dict[str, Any]:
    try:
        dictionary = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return dictionary if type(dictionary) is dict else {}


def _slots(kind: type) -> dict[str, Any]:
    return {
        name: slot
        for base in kind.__mro__
        for name, slot in vars(base).items()
        if isinstance(slot, types.MemberDescriptorType) and not _is_special(name) and base.__module__ == kind.__module__
    }


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")
