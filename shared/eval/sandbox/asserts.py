"""A test whose asserts are counted."""

import ast

HELD, FAILED, _ERROR = "__assert_held__", "__assert_failed__", "__assert_error__"


def count_asserts(test: str) -> ast.Module:
    """Have every assert call `HELD` once it held; those that `check` itself states call `FAILED` instead of raising.

    Asserts within `try` and `with` still raise, since these may catch it, and so do those of other functions.

    Raises:
        SyntaxError, ValueError, RecursionError: the test is no Python.
    """
    tree = ast.parse(test)
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "check":
            statement.body = _lenient(statement.body)
    _Counted().visit(tree)
    return tree


class _Counted(ast.NodeTransformer):
    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        return [node, *_copied(f"{HELD}()", node)]


def _lenient(body: list[ast.stmt]) -> list[ast.stmt]:
    lenient: list[ast.stmt] = []
    for statement in body:
        if isinstance(statement, ast.Assert):
            text = f"try: pass\nexcept BaseException as {_ERROR}: {FAILED}({_ERROR})"
            (guard,) = _copied(text, statement)
            assert isinstance(guard, ast.Try)
            guard.body = [statement]
            statement = guard
        elif isinstance(statement, ast.For | ast.While | ast.If):
            statement.body, statement.orelse = _lenient(statement.body), _lenient(statement.orelse)
        lenient.append(statement)
    return lenient


def _copied(text: str, place: ast.stmt) -> list[ast.stmt]:
    statements = ast.parse(text).body
    for statement in statements:
        for node in ast.walk(statement):
            ast.copy_location(node, place)
    return statements
