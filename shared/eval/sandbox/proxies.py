"""Proxies: what stands on one side for an object that stays on the other.

A proxy is equal to nothing but itself, whatever the object says: only plain values, and instances of the prompt's
classes, are compared, by the checker's own classes. Arithmetic, order and `in` are not passed on either.
"""

import contextlib
import inspect
import types
from collections.abc import Callable, Generator, Iterator
from typing import Any

from shared.eval.sandbox.peer import Peer

# What the checker may do with an object of the program.
PROGRAM_METHODS: dict[str, Callable[..., Any]] = {
    "call": lambda value, *arguments, **keywords: value(*arguments, **keywords),
    "send": lambda value, item: next(value) if item is None else value.send(item),
    "throw": lambda value, error: value.throw(error),
    "close": lambda value: value.close(),
    "await": lambda value: _awaited(value),
    "anext": lambda value: _awaited(value.__anext__()),
    "asend": lambda value, item: _awaited(value.asend(item)),
    "aclose": lambda value: _awaited(value.aclose()),
    "getattr": lambda value, name: getattr(value, name),
    "setattr": lambda value, name, item: setattr(value, name, item),
    "getitem": lambda value, key: value[key],
    "setitem": lambda value, key, item: value.__setitem__(key, item),
    "delitem": lambda value, key: value.__delitem__(key),
    "iter": lambda value: iter(value),
    "len": lambda value: len(value),
    "bool": lambda value: bool(value),
    "str": lambda value: str(value),
    "repr": lambda value: repr(value),
    "enter": lambda value: value.__enter__(),
    "exit": lambda value, *details: value.__exit__(*details),
    "describe": lambda value: _description(value),
}
# Where a StopIteration says that there is no more; elsewhere it would end a loop of the test's.
ITERATING = ("send", "throw")
_LOOPS: list[Any] = []
# What a program may do with an object of the test: no more, for a test's objects lead to its text.
TEST_METHODS = {name: PROGRAM_METHODS[name] for name in ("call", "send")}


def make_proxy(peer: Peer, number: int, form: bytes, type_name: Any, name: Any, text: Any) -> Any:
    """The proxy of an object by the form in which it was exported, of a class with the name of the object's class."""
    form_class = _FORMS.get(form, Remote)
    kind = type(str(type_name), (form_class,), {"__module__": "candidate", "__doc__": None, "__slots__": ()})
    proxy = kind(peer, number)
    if form in (b"f", b"k"):
        proxy.__name__, proxy.__doc__ = str(name), text if isinstance(text, str) else None
    return proxy


def describe_entry_point(function: Any, peer: Peer) -> None:
    """Give the stand-in of the entry point the text, signature and attributes of the program's function, as far as
    these are what they should be: where a program says nonsense of itself, nothing is known of it."""
    with contextlib.suppress(BaseException):  # also what the program raises
        text, parameters, annotations, attributes = peer.call(0, "describe")
        function.__doc__ = text if isinstance(text, str) else None
        function.__annotations__ = annotations if isinstance(annotations, dict) else {}
        for name, value in attributes.items():
            if isinstance(name, str) and not name.startswith("__"):
                setattr(function, name, value)
        if parameters is not None:
            function.__signature__ = _signature(parameters, function.__annotations__)


def _signature(parameters: Any, annotations: dict[str, Any]) -> inspect.Signature:
    return inspect.Signature(
        [
            inspect.Parameter(
                str(name),
                inspect._ParameterKind(kind),
                default=default if has_default else inspect.Parameter.empty,
                annotation=annotations.get(name, inspect.Parameter.empty),
            )
            for name, kind, has_default, default in parameters
        ],
        return_annotation=annotations.get("return", inspect.Signature.empty),
    )


class Remote:
    """An object of the program."""

    def __init__(self, peer: Peer, number: int) -> None:
        self.__dict__.update(_peer=peer, _number=number)

    def _do(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        return self._peer.call(self._number, method, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return self._do("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__"):
            object.__setattr__(self, name, value)
        else:
            self._do("setattr", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._do("getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._do("setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        self._do("delitem", key)

    def __iter__(self) -> Iterator[Any]:
        iterator: Iterator[Any] = self._do("iter")
        return iterator

    def __len__(self) -> int:
        return int(self._do("len"))

    def __bool__(self) -> bool:
        return self._do("bool") is True

    def __str__(self) -> str:
        return str(self._do("str"))

    def __repr__(self) -> str:
        return str(self._do("repr"))

    def __enter__(self) -> Any:
        return self._do("enter")

    def __exit__(self, *details: Any) -> Any:
        return self._do("exit", None, details[1], None)


class _RemoteCallable(Remote):
    __signature__ = property(lambda self: _signature(*self._do("describe")[1:3]))

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._do("call", *arguments, **keywords)

    def __bool__(self) -> bool:
        return True


class _RemoteFunction(_RemoteCallable):
    __class__ = property(lambda self: types.FunctionType)  # for isinstance


class _RemoteIterator(Remote):
    """An iterator. It is asked for an item when one is wanted, and not told when it is dropped."""

    def __iter__(self) -> "_RemoteIterator":
        return self

    def __next__(self) -> Any:
        return self._do("send", None)

    def __bool__(self) -> bool:
        return True


class _RemoteGenerator(_RemoteIterator):
    __class__ = property(lambda self: types.GeneratorType)

    def send(self, value: Any) -> Any:
        return self._do("send", value)

    def throw(self, kind: Any, value: Any = None, trace: Any = None) -> Any:
        return self._do("throw", kind if isinstance(kind, BaseException) else kind(*([] if value is None else [value])))

    def close(self) -> None:
        self._do("close")


class _RemoteCoroutine(Remote):
    """A coroutine. It runs to its end, in an event loop of the program's process, when it is first awaited."""

    __class__ = property(lambda self: types.CoroutineType)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._do("await")
        yield

    def __bool__(self) -> bool:
        return True

    def send(self, value: Any) -> Any:
        raise StopIteration(self._do("await"))

    def throw(self, kind: Any, value: Any = None, trace: Any = None) -> Any:
        raise kind if isinstance(kind, BaseException) else kind()

    def close(self) -> None:
        self._do("close")


class _RemoteAsyncIterator(Remote):
    """An asynchronous generator or iterator. Each of its steps runs to its end when it is awaited."""

    __class__ = property(lambda self: types.AsyncGeneratorType)

    def __aiter__(self) -> "_RemoteAsyncIterator":
        return self

    async def __anext__(self) -> Any:
        return self._do("anext")

    async def asend(self, value: Any) -> Any:
        return self._do("asend", value)

    async def aclose(self) -> None:
        self._do("aclose")

    def __bool__(self) -> bool:
        return True


_FORMS = {
    b"f": _RemoteFunction, b"k": _RemoteCallable, b"i": _RemoteIterator, b"g": _RemoteGenerator, b"c": _RemoteCoroutine,
    b"s": _RemoteAsyncIterator,
}  # fmt: skip


def _awaited(awaitable: Any) -> Any:
    """Run something to its end, in one loop for all: an asynchronous generator belongs to the loop that began it."""
    import asyncio

    async def run() -> Any:
        return await awaitable

    if not _LOOPS:
        _LOOPS.append(asyncio.new_event_loop())
    return _LOOPS[0].run_until_complete(run())


def _description(function: Any) -> tuple[Any, ...]:
    """What a test may ask of a function: text, parameters, annotations, and what else it is given as attributes."""
    try:
        parameters = [
            (p.name, int(p.kind), p.default is not p.empty, None if p.default is p.empty else p.default)
            for p in inspect.signature(function).parameters.values()
        ]
    except (TypeError, ValueError):
        parameters = None
    names = {*getattr(function, "__dict__", ()), "cache_info", "cache_clear", "cache_parameters"}
    attributes = {name: getattr(function, name) for name in names if name[:2] != "__" and hasattr(function, name)}
    return getattr(function, "__doc__", None), parameters, getattr(function, "__annotations__", {}), attributes
