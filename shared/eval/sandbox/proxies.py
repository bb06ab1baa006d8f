"""What stands on one side for an object or a class that stays on the other.

A proxy is equal to nothing but itself, and a class made here is compared as what it is built on: no object of the
program judges itself against what a test expects. Where a test compares two objects of the program, or uses such a
method of a class of the prompt, the program does decide; then the test does not pass, it is not judged.
"""

import inspect
import types
from collections.abc import Callable, Container, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from shared.eval.sandbox import library
from shared.eval.sandbox.outlines import CODE, JUDGED, OBSERVED, signature_outline

if TYPE_CHECKING:
    from shared.eval.sandbox.peer import Peer

# What the checker may do with an object of the program. `attribute` is asked of the entry point, of any object.
PROGRAM_METHODS: dict[str, Callable[..., Any]] = {
    "call": lambda value, *arguments, **keywords: value(*arguments, **keywords),
    "next": lambda value: next(value),
    "send": lambda value, item: value.send(item),
    "await": lambda value: _awaited(value),
    "attribute": lambda _, value, name: getattr(value, name),
    "set attribute": lambda _, value, name, item: setattr(value, name, item),
    "delete attribute": lambda _, value, name: delattr(value, name),
    "signature": lambda value: signature_outline(value, with_defaults=True),
    "turn": lambda value: None,
}
# What a program may do with an object of the test: no more, for a test's objects lead to its text.
TEST_METHODS = {name: PROGRAM_METHODS[name] for name in ("call", "next", "send")}
TEST_METHODS["signature"] = lambda value: signature_outline(value, with_defaults=False)
_PUBLIC = frozenset(
    ("__annotations__", "__closure__", "__code__", "__defaults__", "__dict__", "__doc__", "__func__", "__kwdefaults__",
     "__module__", "__name__", "__qualname__", "__self__", "__wrapped__")
)  # fmt: skip
_LOOPS: list[Any] = []
_MAX_NAMES = 5_000


def made_proxy(peer: "Peer", number: int, form: str, items: list[Any]) -> "Remote":
    """The proxy of an object, from its form and its class or what is known of a function."""
    if len(items) == 1:
        kind: type[Remote] = items[0] if issubclass(items[0], Remote) else _FORMS[form]  # of such as `map`
        return kind.__new__(kind).bind(peer, number, {})
    name, text, *code = items
    known = {"__name__": name, "__doc__": text}
    if code:
        known["__code__"] = types.SimpleNamespace(**dict(zip(CODE, *code, strict=True)))
    return _FORMS[form]().bind(peer, number, known)


def made_class(peer: "Peer", items: list[Any]) -> type:
    """A class from its outline; the library's own where instances may be of it."""
    name, form, is_library, count, *rest = items
    if len(rest) > _MAX_NAMES:
        raise ValueError("too many names in a class")
    named = [base if isinstance(base, type) else library.base_named(base) for base in rest[:count]]
    bases = list(dict.fromkeys(base for base in named if base is not None))
    if is_library:
        place = rest[0].partition("|")[0]
        if bases and library.path_of(bases[0]) == place:
            return bases[0]
        if (value_class := library.value_class_named(place)) is not None:
            return value_class
    if not any(peer.table.is_data(base) or issubclass(base, BaseException | Remote) for base in bases):
        bases.append(_FORMS[form])
    meta: type = _RemoteClass
    for base in bases:
        if not issubclass(meta, type(base)):
            meta = type("_RemoteClass", (meta, type(base)), {})
    namespace = {"__module__": "candidate", "__remote__": peer, **_forwards(peer, bases, rest[count:])}
    if any(issubclass(base, Remote) for base in bases):
        namespace["__slots__"] = ()
    if "__eq__" in namespace:
        namespace["__hash__"] = bases[0].__hash__
    made: type = meta(str(name), tuple(bases), namespace)
    return made


def give_methods(peer: "Peer", kind: type, names: Iterable[str], deciding: Container[str]) -> None:
    """Have a class of the prompt do these things by the program's class, since the prompt leaves them open.

    Args:
        names: as `outlines.marked` gives them.
        deciding: those by which the class compares its instances.
    """
    for name, forward in _forwards(peer, kind.__mro__[1:], names).items():
        forward.decides |= name in deciding
        type.__setattr__(kind, name, forward)


def _forwards(peer: "Peer", bases: Iterable[type], names: Iterable[Any]) -> dict[str, "_Forwarded"]:
    """What a class built on others gets for the names of the other side's class."""
    forwards: dict[str, _Forwarded] = {}
    for marked in names:
        name = marked.removeprefix("=")
        kind = _KINDS.get(name, _ForwardedProperty if marked.startswith("=") else _Forwarded)
        # Such a method of this side's own is the one that judges, and what a proxy does is done by itself.
        classes = [c for base in bases for c in base.__mro__ if kind is _Judged or c in _FORMS.values()]
        is_there = any(_is_whole(vars(c).get(name)) for c in classes if c is not object)
        if not is_there and (not name.startswith("__") or name in _FORWARDED):
            forwards[name] = kind(peer, name)
    return forwards


def _is_whole(method: Any) -> bool:
    return method is not None and not getattr(method, "__isabstractmethod__", False)


class _Forwarded:
    """An attribute of a class that is asked of the other side's object."""

    decides = False  # whether by it the program would decide what a test asserts

    def __init__(self, peer: "Peer", name: str) -> None:
        self._peer, self._name = peer, name

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None and self._peer.table.number(owner) is None:  # which is being made
            return self
        if self.decides:
            self._peer.doubt(f"the program's own {self._name} decides what the test asserts")
        return self._peer.call(0, "attribute", (owner if instance is None else instance, self._name))


class _ForwardedProperty(_Forwarded):
    """One that is also set there."""

    def __set__(self, instance: Any, value: Any) -> None:
        self._peer.call(0, "set attribute", (instance, self._name, value))


class _ForwardedByName(_Forwarded):
    """What is done where an object has no such attribute, or whenever one is set. Names with two underscores, by which
    other libraries ask how to read an object's memory, are not asked for."""

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        method = {"__getattr__": "attribute", "__setattr__": "set attribute", "__delattr__": "delete attribute"}[
            self._name
        ]

        def ask(name: str, *value: Any) -> Any:
            if name.startswith("__") and name not in _PUBLIC:
                raise AttributeError(name)
            return self._peer.call(0, method, (instance, name, *value))

        return self if instance is None else ask


class _Judged(_Forwarded):
    """A comparison or the like. A proxy is compared with nothing but a proxy."""

    decides = True

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return super().__get__(instance, owner)

        def judge(*others: Any) -> Any:
            is_proxy = isinstance(instance, Remote) and self._name != "__contains__"
            if is_proxy and not all(isinstance(other, Remote) for other in others):
                return NotImplemented
            return super(_Judged, self).__get__(instance, owner)(*others)

        return judge


class _RemoteClass(type):
    """The class of classes like the program's, which makes instances there."""

    def __call__(cls, *arguments: Any, **keywords: Any) -> Any:
        if "__remote__" not in vars(cls):  # a subclass of the test's
            return super().__call__(*arguments, **keywords)
        peer = vars(cls)["__remote__"]
        return peer.call(peer.table.number(cls), "call", arguments, keywords)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") or "__remote__" not in vars(cls):
            raise AttributeError(name)
        return vars(cls)["__remote__"].call(0, "attribute", (cls, name))

    def __setattr__(cls, name: str, value: Any) -> None:
        if name.startswith("_") or "__remote__" not in vars(cls):
            super().__setattr__(name, value)
        else:
            vars(cls)["__remote__"].call(0, "set attribute", (cls, name, value))


class Remote:
    """An object of the other side."""

    __slots__ = ("__weakref__", "_known_", "_number_", "_peer_")

    def bind(self, peer: "Peer", number: int, known: dict[str, Any]) -> "Remote":
        """Say which object this stands for, and what is known of it."""
        for name, value in (("_peer_", peer), ("_number_", number), ("_known_", known)):
            object.__setattr__(self, name, value)
        return self

    def _do(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        return self._peer_.call(self._number_, method, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        if name in Remote.__slots__ or (name.startswith("__") and name.endswith("__") and name not in _PUBLIC):
            raise AttributeError(name)
        if name in self._known_:
            return self._known_[name]
        return self._peer_.call(0, "attribute", (self, name))

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer_.call(0, "set attribute", (self, name, value))

    def __delattr__(self, name: str) -> None:
        self._peer_.call(0, "delete attribute", (self, name))

    def __init_subclass__(cls) -> None:
        cls.__doc__ = property(lambda self: Remote.__getattr__(self, "__doc__"))  # type: ignore[assignment]


class _RemoteCallable(Remote):
    __slots__ = ()

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._do("call", *arguments, **keywords)

    @property
    def __signature__(self) -> inspect.Signature:
        parameters, returned = self._do("signature")
        empty = inspect.Parameter.empty
        made = []
        for name, kind, default, annotation in parameters:
            given = {"default": [empty, *default][-1], "annotation": [empty, *annotation][-1]}
            made.append(inspect.Parameter(name, inspect._ParameterKind(kind), **given))
        return inspect.Signature(made, return_annotation=[empty, *returned][-1])


class RemoteFunction(_RemoteCallable):
    """A function of the other side."""

    __slots__ = ()
    __class__ = property(lambda self: types.FunctionType)  # for isinstance


class _RemoteIterator(Remote):
    """An iterator. It is asked for an item when one is wanted, and not told when it is dropped."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._do("next")


class _RemoteGenerator(_RemoteIterator):
    __slots__ = ()
    __class__ = property(lambda self: types.GeneratorType)

    def send(self, value: Any) -> Any:
        return self._do("send", value)


class _RemoteAwaitable(Remote):
    """A coroutine or the like. It runs to its end, in an event loop of the program's process, when it is awaited."""

    __slots__ = ()
    __class__ = property(lambda self: types.CoroutineType)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._do("await")
        yield

    def send(self, value: Any) -> Any:
        """As an event loop of the test runs it."""
        raise StopIteration(self._do("await"))


_FORMS: dict[str, type[Remote]] = {
    "o": Remote, "f": RemoteFunction, "k": _RemoteCallable, "i": _RemoteIterator, "g": _RemoteGenerator,
    "c": _RemoteAwaitable,
}  # fmt: skip
_FORWARDED = OBSERVED | JUDGED | {"__init__"}
_KINDS: dict[str, type[_Forwarded]] = dict.fromkeys(JUDGED, _Judged)
_KINDS |= dict.fromkeys(("__getattr__", "__setattr__", "__delattr__"), _ForwardedByName)


def _awaited(awaitable: Any) -> Any:
    """Run something to its end, in one loop for all: an asynchronous generator belongs to the loop that began it."""
    import asyncio

    async def run() -> Any:
        return await awaitable

    if not _LOOPS:
        _LOOPS.append(asyncio.new_event_loop())
    return _LOOPS[0].run_until_complete(run())
