"""Python text as syntax trees."""

import ast
import warnings

Function = ast.FunctionDef | ast.AsyncFunctionDef
NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)


def parse(text: str) -> ast.Module:
    """The syntax tree of a program, without Python's warnings about escapes; raises one of `NOT_PYTHON`."""
    with warnings.catch_warnings(action="ignore"):
        return ast.parse(text)


def functions_in(tree: ast.AST) -> list[Function]:
    """The functions of a tree, at any depth."""
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def is_constant(node: ast.stmt) -> bool:
    """Whether a statement is a mere constant, as a docstring is."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def body_of(function: Function) -> list[ast.stmt]:
    """A function's statements without its docstring."""
    return function.body[is_constant(function.body[0]) :]
