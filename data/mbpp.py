"""MBPP (Austin et al. 2021, CC BY 4.0): recognised by its columns, split by `task_id`; as documents and as problems."""

import ast
import builtins
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from data.hub import open_hub
from data.records import Document, Problem
from data.syntax import NOT_PYTHON, parse
from data.tabular import FILES, SUFFIXES, Row, read_rows
from data.templates import mbpp_document, normalise
from shared.errors import ConfigError, require

T = TypeVar("T", Document, Problem)

NAME = "mbpp"
HUB_ID = "google-research-datasets/mbpp"
CONFIG = "full"  # of the two that the Hub has
LICENSE = "CC-BY-4.0"
ATTRIBUTION = (
    "MBPP by J. Austin, A. Odena, M. Nye et al., Google Research: Program Synthesis with Large Language Models, 2021, "
    "arXiv:2108.07732, https://github.com/google-research/google-research/tree/master/mbpp"
)
COLUMNS = ("task_id", "text", "prompt", "code", "test_list", "test_setup_code", "test_imports")
SPLITS = {
    "prompt": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
}


def is_mbpp(columns: Iterable[str]) -> bool:
    """Whether a data set has MBPP's columns, full or sanitized."""
    return {"task_id", "code", "test_list"} <= set(columns)


def load_problems(
    dataset: str, split: str, *, revision: str | None = None, offline: bool = False
) -> tuple[tuple[Problem, ...], str | None]:
    """The problems of one split, and the Hub's commit that they are of (None for a file).

    Args:
        dataset: `mbpp` for the Hub's, or a file of one of `SUFFIXES` with MBPP's columns, full or sanitized.
        split: a key of `SPLITS`.
        revision, offline: of the Hub's a branch, tag or commit; only what was fetched before.

    Raises:
        ConfigError: the Hub or the file cannot be read, a row is malformed, or the split has no rows.
    """
    if dataset == NAME:
        found = open_hub(HUB_ID, split, revision, CONFIG, offline=offline)
        return tuple(read_split(found.table.read(COLUMNS), split, mbpp_problem)), found.commit
    known = dataset.endswith(SUFFIXES)
    require(known, "unknown data set", where="dataset", expected=f"mbpp, {FILES}", got=repr(dataset))
    return tuple(read_split(read_rows(Path(dataset), COLUMNS), split, mbpp_problem)), None


def read_split(rows: Iterable[Row], split: str, of_row: Callable[[Row], T]) -> list[T]:
    """What `of_row` makes of the rows of one split, in their order; the rows of other splits are checked, too.

    Raises:
        ConfigError: a malformed row, a `task_id` twice or outside MBPP, or a split without rows.
    """
    seen: dict[int, str] = {}
    by_split: dict[str, list[T]] = {}
    for row in rows:
        item, task_id = of_row(row), row.integer("task_id")
        row.require_once("task_id", task_id, seen)
        home = next((name for name, ids in SPLITS.items() if task_id in ids), None)
        if home is None:
            raise row.error("task_id", expected="1 to 974", got=task_id)
        by_split.setdefault(home, []).append(item)
    if split not in by_split:
        available = ", ".join(name for name in SPLITS if name in by_split) or "none"
        raise ConfigError("no rows in the split", where="MBPP", expected=f"one of: {available}", got=repr(split))
    return by_split[split]


def mbpp_problem(row: Row) -> Problem:
    """A row as a problem: its prompt, that of the document, shows `test_list`, and `check` asserts the same.

    The challenge tests are not used. The entry point is what the tests call and the reference solution defines.

    Raises:
        ConfigError: code or tests are no Python, or the tests call nothing that the code defines.
    """
    document = mbpp_document(row)
    setup = row.text("test_setup_code") if "test_setup_code" in row.fields else "\n".join(row.texts("test_imports"))
    tests = normalise("\n".join(row.texts("test_list")))
    body = f"{normalise(setup).strip()}\n{tests}".lstrip("\n")
    tree, program = _parsed(row, "test_list", body), _parsed(row, "code", document.completion)
    defined = {node.name for node in program.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    calls = [
        node.func.id
        for node in ast.walk(_parsed(row, "test_list", tests))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    entry_point = next((name for name in calls if name in defined), None)
    if entry_point is None:
        raise row.error("test_list", expected=f"a call of {', '.join(sorted(defined))}", got=f"{tests!r:.60}")
    # Bound inside `check`, so that entry points called `check` or `sum` hide nothing outside it.
    test = f"def check(candidate):\n    {entry_point} = candidate\n{textwrap.indent(body, '    ')}\n"
    (check,) = _parsed(row, "test_list", test).body
    if not isinstance(check, ast.FunctionDef) or list(map(ast.dump, check.body[1:])) != list(map(ast.dump, tree.body)):
        raise row.error("test_list", expected="statements that mean the same when indented", got=f"{body!r:.60}")
    return Problem(
        task_id=document.id,
        prompt=document.prompt,
        test=test,
        entry_point=entry_point,
        canonical_solution=document.completion,
        same_process=bool(_free_names(tree) - {entry_point}),
    )


def _parsed(row: Row, field: str, text: str) -> ast.Module:
    try:
        return parse(text)
    except NOT_PYTHON as error:
        raise row.error(field, expected="Python", got=error) from error


def _free_names(tree: ast.Module) -> set[str]:
    """The names that statements use and neither they nor Python's builtins define."""
    used, bound = set[str](), set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
    return used - bound
