"""The interpreter's own library, function by function: real, documented Python that every machine has.

One documented function or method makes one document: decorators, signature and docstring are the prompt, the rest of
the body the completion. The modules are split by name, so no module is in two splits.
"""

import ast
import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data.records import Document
from data.syntax import Function, parse
from data.templates import prompt_document
from shared.errors import require
from shared.files import sha256_file, sha256_json

LICENSE = "PSF-2.0"
ATTRIBUTION = "the Python standard library, © Python Software Foundation, https://docs.python.org/3/license.html"
SPLITS = ("train", "validation", "test")
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"}


def read_split(split: str, root: Path | None = None) -> list[Document]:
    """The documents of one split (of about 90, 5 and 5 % of the modules), ordered by a hash of their ids so that the
    first n are a varied sample.

    Functions that are equal but for white space are kept once, in whichever split has the first by id.
    """
    require_split(split)
    root = root or Path(sysconfig.get_path("stdlib"))
    unique: dict[str, Document] = {}
    for path in _modules(root):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for document in _read_module(path, name):
            unique.setdefault(" ".join((document.prompt + document.completion).split()), document)
    kept = [document for document in unique.values() if split_of(document.id) == split]
    require(kept, "no documented functions in the split", where=root, got=repr(split))
    return sorted(kept, key=lambda document: _hash(document.id))


def require_split(split: str) -> None:
    """Refuse a split that there is not."""
    require(split in SPLITS, "unknown split", where="stdlib", expected=f"one of: {', '.join(SPLITS)}", got=repr(split))


def files_digest(root: Path | None = None) -> str:
    """SHA-256 over the names and bytes of the files that `read_split` reads; parses nothing."""
    root = root or Path(sysconfig.get_path("stdlib"))
    return sha256_json([[path.relative_to(root).parts, sha256_file(path)] for path in _modules(root)])


def _modules(root: Path) -> list[Path]:
    """The library's files, by name."""
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in SKIPPED]  # not entered: installed packages are thousands
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def split_of(id: str) -> str:
    """The split of a document or module, which follows from the name of its top-level module."""
    module = id.partition(":")[0].partition(".")[0]
    bucket = _hash(f"stdlib/{module}") % 20
    return {0: "validation", 1: "test"}.get(bucket, "train")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest())


def _read_module(path: Path, module: str) -> Iterator[Document]:
    try:
        text = importlib.util.decode_source(path.read_bytes())
        tree = parse(text)
    except (SyntaxError, ValueError):  # files that are broken on purpose, or not UTF-8
        return
    lines = text.split("\n")
    for name, function in _functions(tree, ""):
        parts = _split_function(lines, function)
        if parts:
            yield prompt_document(f"{module}:{name}:{function.lineno}", "stdlib", *parts)


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    """Functions and methods with their qualified names; what is nested in a function is part of that function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        else:
            yield from _functions(child, prefix)


def _split_function(lines: list[str], function: Function) -> tuple[str, str] | None:
    """The dedented source up to the docstring's end, and the rest; None without docstring or body."""
    if ast.get_docstring(function, clean=False) is None or len(function.body) < 2:
        return None
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)]) - 1
    indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
    source = lines[first : function.end_lineno]
    if any(line.strip() and not line.startswith(indent) for line in source):
        return None  # a string or comment that starts left of the function: cannot be dedented
    docstring = function.body[0]
    assert docstring.end_lineno is not None
    last = docstring.end_lineno - first - 1
    column = len(source[last].encode()[: docstring.end_col_offset].decode())  # ast counts UTF-8 bytes
    before = [*source[:last], source[last][:column]]
    after = [source[last][column:], *source[last + 1 :]]
    return _dedent(before, indent), "\n".join([after[0], _dedent(after[1:], indent)]) if after[1:] else after[0]


def _dedent(lines: list[str], indent: str) -> str:
    return "\n".join(line.removeprefix(indent) if line.strip() else "" for line in lines)
