"""What a test's text tells of its problem, whatever program it is run with.

Whether a problem can be judged in two processes is read here, not from what a program does.
"""

import ast
import functools
from collections.abc import Iterator

# What a test changes or reads of its own process, where the program, in another, would not see it.
_OF_ONE_PROCESS = frozenset(
    ("mock", "monkeypatch", "builtins", "__builtins__", "sys.modules", "os.environ", "warnings", "tracemalloc", "gc",
     "settrace", "setprofile", "getsource", "getsourcelines", "iscoroutinefunction", "isgeneratorfunction",
     "isasyncgenfunction", "__code__", "__closure__", "__globals__", "__defaults__", "__kwdefaults__")
)  # fmt: skip
# Attributes of modules that may be set, since they cross; see `surroundings.py`.
_CROSSING = frozenset(("sys.stdin", "sys.stdout", "sys.stderr"))
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Needs:
    """What a test tells of itself; read when it is asked for, for most programs need none of it.

    Args:
        test: the text.
        entry_point: a name of the program beside the one that `check` gives it.
    """

    def __init__(self, test: str, entry_point: str) -> None:
        self._test, self._entry_point = test, entry_point

    @functools.cached_property
    def one_process(self) -> str:
        """What it needs one process with the program for; empty where nothing is known."""
        return _one_process(self._tree)

    @functools.cached_property
    def bound(self) -> frozenset[str]:
        """The names that it binds itself, anywhere."""
        return frozenset(_bound(self._tree))

    @functools.cached_property
    def passes_answers_back(self) -> bool:
        """Whether an argument of a call may depend on an earlier answer."""
        return _passes_answers_back(self._tree, {self._entry_point, _parameter(self._tree)})

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
            names = [part for alias in node.names for part in alias.name.split(".")]
            names += (node.module or "").split(".") if isinstance(node, ast.ImportFrom) else ()
        elif isinstance(node, ast.Name | ast.Attribute):
            names = [_dotted(node), node.id if isinstance(node, ast.Name) else node.attr]
        else:
            continue
        if found := _OF_ONE_PROCESS.intersection(names):
            return min(found)
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


def _passes_answers_back(tree: ast.Module, program: set[str]) -> bool:
    """Follow names: what a statement binds depends on what it reads, or on what decides whether it runs.

    A name that is passed may stand for something else after the call, so what others are made of it depends on answers.
    """
    functions = [node for node in ast.walk(tree) if isinstance(node, _SCOPES) and node.name != "check"]
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and not isinstance(node, _SCOPES)]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    program, answers, before = set(program), set[str](), -1
    while before != (before := len(program) + len(answers)):
        program |= {function.name for function in functions if _read(function) & program}
        passed = {part.id for call in calls if _read(call.func) & program for part in _arguments(call)
                  if isinstance(part, ast.Name)}  # fmt: skip
        for statement in statements:
            read = set[str]().union(*map(_read, _deciding(statement)))
            if read & (program | answers):
                answers |= set(_bound(statement)) | _filled(statement, program | answers)
            elif read & passed:
                answers |= set(_bound(statement)) - read
    return any(
        _read(part) & (program | answers if _read(call.func) & program else answers)
        for call in calls
        if _read(call) & program
        for part in _arguments(call)
    )


def _deciding(statement: ast.stmt) -> list[ast.AST]:
    """What of a statement is looked at for the names that it binds: of a compound statement only its head."""
    if isinstance(statement, ast.With | ast.AsyncWith):
        return list(statement.items)
    if isinstance(statement, ast.Try):
        return []
    for head in ("iter", "test", "subject"):
        if hasattr(statement, head):
            return [getattr(statement, head)]
    return [statement]


def _filled(statement: ast.stmt, answers: set[str]) -> set[str]:
    """Names whose objects take up something of an answer: by a method's argument, an item or an attribute."""
    found = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and any(_read(part) & answers for part in _arguments(node)):
                found.add(_dotted(node.func).partition(".")[0])
        elif isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store):
            found.add(_dotted(node).partition(".")[0])
    return found - {""}


def _arguments(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def _read(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}


def _parameter(tree: ast.Module) -> str:
    """What the test calls the program."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "check" and node.args.args:
            return node.args.args[0].arg
    return "candidate"


def _dotted(node: ast.AST) -> str:
    """Such as `os.environ`; of `a[0].b` what is left of the first item."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Subscript):
        return _dotted(node.value)
    return f"{left}.{node.attr}" if isinstance(node, ast.Attribute) and (left := _dotted(node.value)) else ""
