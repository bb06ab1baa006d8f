"""What a test's text tells of its problem, whatever program it is run with.

Whether a problem can be judged in two processes is read here, not from what a program does.
"""

import ast
import functools
from collections.abc import Iterator

# What a test changes or reads of its own process, where the program, in another, would not see it.
_OF_ONE_PROCESS = frozenset(
    ("mock", "monkeypatch", "builtins", "__builtins__", "sys.modules", "os.environ", "tracemalloc", "weakref",
     "logging", "contextvars", "get_objects", "get_referrers", "getrefcount", "settrace", "setprofile", "getsource",
     "getsourcelines", "__globals__")
)  # fmt: skip
# Attributes of modules that may be set, since they cross; see `surroundings.py`.
_CROSSING = frozenset(("sys.stdin", "sys.stdout", "sys.stderr"))
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Needs:
    """What a test's text tells of itself; read when it is asked for, for most programs need none of it."""

    def __init__(self, test: str) -> None:
        self._test = test

    @functools.cached_property
    def one_process(self) -> str:
        """What it needs one process with the program for; empty where nothing is known."""
        return _one_process(self._tree)

    @functools.cached_property
    def bound(self) -> frozenset[str]:
        """The names that it binds itself, anywhere."""
        return frozenset(_bound(self._tree))

    @functools.cached_property
    def read(self) -> frozenset[str]:
        """The names that it reads, anywhere."""
        names = (node for node in ast.walk(self._tree) if isinstance(node, ast.Name))
        return frozenset(node.id for node in names if isinstance(node.ctx, ast.Load))

    @functools.cached_property
    def _tree(self) -> ast.Module:
        return ast.parse(self._test)


def _one_process(tree: ast.Module) -> str:
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name.partition(".")[0]: alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [name_part for alias in node.names for name_part in alias.name.split(".")]
            names += (node.module or "").split(".") if isinstance(node, ast.ImportFrom) else ()
        elif isinstance(node, ast.Name | ast.Attribute):
            names = [_dotted(node), node.id if isinstance(node, ast.Name) else node.attr]
        else:
            continue
        if needs := _OF_ONE_PROCESS.intersection(names):
            return min(needs)
        name = _dotted(node)
        is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del)
        if is_set and name.partition(".")[0] in modules and name not in _CROSSING:
            return f"the {name} that it sets"
    return ""


def _bound(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield node.asname or node.name.partition(".")[0]
        elif isinstance(node, _SCOPES) or (isinstance(node, ast.ExceptHandler) and node.name):
            yield str(node.name)


def _dotted(node: ast.AST) -> str:
    """Such as `os.environ`; of `a[0].b` what is left of the first item."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Subscript):
        return _dotted(node.value)
    return f"{left}.{node.attr}" if isinstance(node, ast.Attribute) and (left := _dotted(node.value)) else ""
