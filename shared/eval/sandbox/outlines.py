"""What one side tells of its functions and classes, so that the other can make something like them."""

import enum
import inspect
import types
from collections.abc import Awaitable, Iterator
from typing import Any

from shared.eval.sandbox import library

# The methods with special names that only tell something of an object. They are asked of the object itself.
OBSERVED = frozenset(
    ("__abs__", "__aenter__", "__aexit__", "__aiter__", "__anext__", "__bool__", "__call__", "__ceil__",
     "__complex__", "__dataclass_fields__", "__delattr__", "__delitem__", "__dir__", "__enter__", "__exit__",
     "__float__", "__floor__", "__format__", "__getattr__", "__getitem__", "__index__", "__int__", "__invert__",
     "__iter__", "__len__", "__length_hint__", "__match_args__", "__missing__", "__neg__", "__pos__", "__repr__",
     "__reversed__", "__round__", "__setattr__", "__setitem__", "__str__", "__trunc__")
)  # fmt: skip
# Those by which an object is compared with another, so that they may decide what a test asserts.
_ARITHMETIC = ("add", "and", "divmod", "floordiv", "lshift", "matmul", "mod", "mul", "or", "pow", "rshift", "sub",
               "truediv", "xor")  # fmt: skip
JUDGED = frozenset(
    {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__contains__"}
    | {f"__{prefix}{name}__" for name in _ARITHMETIC for prefix in ("", "r", "i")}
)
CODE = ("co_name", "co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_flags", "co_varnames")


def form_of(value: Any) -> str:
    """What a proxy of a value must be able to do."""
    if isinstance(value, types.GeneratorType):
        return "g"
    if isinstance(value, Awaitable):
        return "c"
    if isinstance(value, types.FunctionType | types.MethodType | types.BuiltinFunctionType):
        return "f"
    return _form_of_instances(type(value))


def function_outline(value: Any) -> list[Any]:
    """A function's name and text, and what of its code does not lead to the code itself."""
    texts = [_text(getattr(value, name, None)) for name in ("__name__", "__doc__")]
    code = getattr(value, "__code__", None)
    if not isinstance(code, types.CodeType):
        return texts
    *known, variables = (getattr(code, name) for name in CODE)
    return [*texts, (*known, variables[: code.co_argcount + code.co_kwonlyargcount])]


def class_outline(kind: type, *, with_names: bool) -> list[Any]:
    """A class's name, the form of its instances, whether it is the library's, what it is built on, and its names.

    What it is built on are classes, and places of a class of the library and of that class's own bases. A name that is
    set through the class, such as a property's, begins with `=`.
    """
    is_library = library.path_of(kind) is not None
    bases: list[Any] = []
    described = [kind]
    for base in (kind,) if is_library else kind.__bases__:
        if library.is_library(base.__module__):
            bases.append("|".join(map(_place, base.__mro__)))
            described += [c for c in base.__mro__ if library.base_named(_place(c)) is None and c is not object]
        elif not issubclass(base, enum.Enum):
            bases.append(base)
    names = {name: value for c in reversed(described) for name, value in vars(c).items() if is_told(name)}
    attributes = [marked(name, value) for name, value in names.items()] if with_names else []
    return [_text(kind.__name__), _form_of_instances(kind), is_library, len(bases), *bases, *attributes]


def is_told(name: str) -> bool:
    """Whether an attribute of a class is something that another object can do in its place."""
    return not name.startswith(("__", "_abc_")) or name in OBSERVED or name in JUDGED


def marked(name: str, value: Any) -> str:
    """A name in a class, with `=` before it where an object sets it through its class."""
    return f"={name}" if inspect.isdatadescriptor(value) else name


def signature_outline(function: Any, *, with_defaults: bool) -> tuple[list[Any], Any]:
    """A function's parameters, as name, kind, default and annotation, and what it returns; nothing is `()`."""
    signature = inspect.signature(function)
    parameters = [
        (p.name, int(p.kind), _given(p.default if with_defaults or p.default is p.empty else ...), _given(p.annotation))
        for p in signature.parameters.values()
    ]
    return parameters, _given(signature.return_annotation)


def _given(value: Any) -> tuple[Any, ...]:
    return () if value is inspect.Signature.empty else (value,)


def _place(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _form_of_instances(kind: type) -> str:
    if issubclass(kind, Iterator):
        return "i"
    return "k" if any("__call__" in vars(base) for base in kind.__mro__) else "o"


def _text(value: Any) -> str | None:
    return value[:1000] if type(value) is str else None
