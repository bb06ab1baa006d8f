"""Which documents share text with a benchmark's test problems: training on those would score what was learnt by heart.

A document matches a problem in any of three ways:

1. A run of `RUN` tokens in a row that the problem's prompt, reference solution or tests have, too. Tokens are words,
   numbers and signs; white space and comments are none.
2. The problem's whole prompt, where it is too short to have such a run.
3. A function that does the same as the reference solution, statement by statement: equal syntax trees once docstrings
   and annotations are taken away and arguments and variables are numbered as they appear. Bodies of fewer than
   `BODY_TOKENS` tokens are not compared: half of all programmers would write them alike.

Only functions are parsed that could match: those whose tokens, with all names alike, hold a run of the solution's.
"""

import ast
import contextlib
import functools
import keyword
import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.humaneval import load_exercises, load_humaneval
from data.mbpp import HUB_ID, is_mbpp, load_problems
from data.mbpp import NAME as MBPP
from data.records import Document, Problem
from data.syntax import NOT_PYTHON, Function, body_of, functions_in, parse
from data.tabular import SUFFIXES, open_table
from data.templates import normalise
from shared.cache.format import Array, is_in
from shared.errors import ConfigError, require
from shared.files import sha256_json

RUN, RUN_WORDS = 30, 10
BODY_TOKENS = 20
PROMPT_TOKENS = 12  # shorter prompts say nothing of their own
BENCHMARKS = ("humaneval", "mbpp:test", "exercises")
RULE = f"a run of {RUN} tokens, a whole prompt, or an equal solution of {BODY_TOKENS} tokens or more; version 1"

_LEXEME = re.compile(r"\#[^\n]* | [^\W\d]\w* | \d[\w.]* | [^\s\w]", re.VERBOSE)
_FENCED = re.compile(r"^[^`\n]*```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL | re.MULTILINE)
_UNCOUNTED = frozenset({"ctx", "type_comment", "returns", "annotation", "kind"})

_BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 1 << 64)

Binding = Function | ast.ClassDef | ast.ExceptHandler | ast.MatchAs | ast.MatchStar  # bind `name`


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """What a document shares: with which problem, such as `HumanEval/3`, and by which rule.

    The rule is `run`, `prompt` or `solution`.
    """

    problem: str
    rule: str


class Index:
    """The problems that documents are compared with, by benchmark; `absent` says why others are not among them."""

    def __init__(self, problems: Mapping[str, Sequence[Problem]], absent: Mapping[str, str] | None = None) -> None:
        self.problems, self.absent = problems, absent or {}

    def without(self, names: Collection[str]) -> "Index":
        """The index without these benchmarks."""
        return Index({name: self.problems[name] for name in self.problems if name not in names}, self.absent)

    def __bool__(self) -> bool:
        return bool(self.problems)

    @functools.cached_property
    def _prompts(self) -> dict[tuple[str, ...], str]:
        return {tuple(_lexemes(problem.prompt)): problem.task_id for problem in self._all()}

    @functools.cached_property
    def _runs(self) -> dict[tuple[str, ...], str]:
        """The problem of every run of `RUN` tokens with enough words in it."""
        found: dict[tuple[str, ...], str] = {}
        for problem in self._all():
            for lexemes in map(_lexemes, (_program(problem), problem.test)):
                for run in _windows(lexemes):
                    if len({word for word in run if word.isidentifier()}) >= RUN_WORDS:
                        found.setdefault(run, problem.task_id)
        return found

    @functools.cached_property
    def _short_prompts(self) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
        """The prompts without such a run, by how they begin."""
        found: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for prompt in self._prompts:
            if len(prompt) >= PROMPT_TOKENS and not any(run in self._runs for run in _windows(prompt)):
                found.setdefault(prompt[:PROMPT_TOKENS], []).append(prompt)
        return found

    @functools.cached_property
    def _solutions(self) -> dict[str, tuple[str, list[str]]]:
        """The problem of every reference solution that is long enough, and its tokens with all names alike."""
        found: dict[str, tuple[str, list[str]]] = {}
        for problem in self._all():
            for function in _functions(_program(problem)):
                body = _blind(_lexemes("\n".join(map(ast.unparse, body_of(function)))))
                if function.name == problem.entry_point and len(body) >= BODY_TOKENS:
                    found.setdefault(_canonical(function), (problem.task_id, body))
        return found

    @functools.cached_property
    def _run_hashes(self) -> Array:
        return _sorted(_hashes(run, RUN) for run in self._runs)

    @functools.cached_property
    def _prompt_hashes(self) -> Array:
        return _sorted(_hashes(beginning, PROMPT_TOKENS) for beginning in self._short_prompts)

    @functools.cached_property
    def _body_hashes(self) -> Array:
        return _sorted(_hashes(body, BODY_TOKENS) for _, body in self._solutions.values())

    def _all(self) -> Iterator[Problem]:
        return (problem for problems in self.problems.values() for problem in problems)

    @property
    def digest(self) -> str:
        """SHA-256 of the rule and of all texts that documents are compared with."""
        texts = [[p.task_id, p.prompt, p.canonical_solution, p.test] for p in self._all()]
        return sha256_json([RULE, sorted(self.problems), texts])

    def match(self, document: Document) -> Match | None:
        """The first problem that a document shares text with."""
        if document.messages is not None:
            texts = [message["content"] for message in document.messages]
            texts += [block for text in texts for block in _FENCED.findall(text)]
        else:
            texts = [document.prompt + document.completion]
        return next((found for text in texts if (found := self._match(text))), None)

    def prompt_of(self, prompt: str) -> str | None:
        """The problem that has this prompt, but for white space and comments."""
        return self._prompts.get(tuple(_lexemes(prompt)))

    def _match(self, text: str) -> Match | None:
        lexemes = _lexemes(text)
        for start in np.flatnonzero(is_in(_hashes(lexemes, RUN), self._run_hashes)).tolist():
            if found := self._runs.get(tuple(lexemes[start : start + RUN])):
                return Match(problem=found, rule="run")
        for start in np.flatnonzero(is_in(_hashes(lexemes, PROMPT_TOKENS), self._prompt_hashes)).tolist():
            for prompt in self._short_prompts.get(tuple(lexemes[start : start + PROMPT_TOKENS]), ()):
                if tuple(lexemes[start : start + len(prompt)]) == prompt:
                    return Match(problem=self._prompts[prompt], rule="prompt")
        if is_in(_hashes(_blind(lexemes), BODY_TOKENS), self._body_hashes).any():
            for function in _functions(text):
                with contextlib.suppress(RecursionError):  # deeper than any solution
                    if solution := self._solutions.get(_canonical(function)):
                        return Match(problem=solution[0], rule="solution")
        return None


def parse_names(names: str, where: str) -> list[str]:
    """Some of `BENCHMARKS`, with commas between; `where` is the option that an unknown name is blamed on."""
    chosen = [name.strip() for name in names.split(",")]
    unknown = ", ".join(repr(name) for name in chosen if name not in BENCHMARKS)
    require(not unknown, "unknown benchmark", where=where, expected=", ".join(BENCHMARKS), got=unknown)
    return chosen


def load_index(names: str, dataset: str = "", revision: str | None = None) -> Index:
    """The index of benchmarks.

    Args:
        names: of `BENCHMARKS`, with commas between; `none`; or `auto` for all that are at hand without a network.
        dataset: what is to be compared: where it is MBPP itself, its test split comes from there; revision: of it.

    Raises:
        ConfigError: an unknown name, or a benchmark that is asked for is not to be had.
    """
    special = {"auto": list(BENCHMARKS), "none": list[str]()}
    chosen = special[names] if names in special else parse_names(names, "decontaminate")
    found, absent = dict[str, Sequence[Problem]](), dict[str, str]()
    for name in chosen:
        try:
            found[name] = _load(name, dataset, revision, offline=names == "auto")
        except ConfigError as error:
            if names != "auto":
                raise
            absent[name] = str(error)
    return Index(found, absent)


def _load(name: str, dataset: str, revision: str | None, *, offline: bool) -> Sequence[Problem]:
    if name == "humaneval":
        return load_humaneval(offline=offline)
    if name == "exercises":
        return load_exercises()
    is_file = dataset.endswith(SUFFIXES) and Path(dataset).is_file()
    if is_file and is_mbpp(open_table([Path(dataset)], dataset).columns):
        return load_problems(dataset, "test")[0]
    if dataset.partition(":")[0] in (MBPP, HUB_ID):
        return load_problems(MBPP, "test", revision=revision)[0]
    return load_problems(MBPP, "test", offline=offline)[0]


def _program(problem: Problem) -> str:
    """A problem's prompt with its reference solution."""
    return problem.prompt + (problem.canonical_solution or "")


def _lexemes(text: str) -> list[str]:
    return [lexeme for lexeme in _LEXEME.findall(normalise(text)) if lexeme[0] != "#"]


def _windows(lexemes: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return (tuple(lexemes[start : start + RUN]) for start in range(len(lexemes) - RUN + 1))


def _blind(lexemes: Iterable[str]) -> list[str]:
    """Lexemes with all names but keywords alike, and both kinds of quotes; without what may stand or not."""
    return [
        "'" if lexeme == '"' else "_" if lexeme.isidentifier() and not keyword.iskeyword(lexeme) else lexeme
        for lexeme in lexemes
        if lexeme not in "(),"
    ]


def _hashes(lexemes: Sequence[str], length: int) -> Array:
    """A hash of every run of so many lexemes, u64; differs from process to process."""
    size = len(lexemes)
    if size < length:
        return np.zeros(0, np.uint64)
    powers, inverses = (np.cumprod(np.full(size, base, np.uint64)) for base in (_BASE, _INVERSE))
    sums = np.cumsum(np.fromiter(map(hash, lexemes), np.int64, size).view(np.uint64) * powers)
    sums[length:] -= sums[:-length].copy()
    hashes: Array = sums[length - 1 :] * inverses[: size - length + 1]
    return hashes


def _sorted(hashes: Iterable[Array]) -> Array:
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]))


def _functions(text: str) -> list[Function]:
    """The functions of a text, at any depth; of one that is no Python those that can be parsed by themselves."""
    with contextlib.suppress(*NOT_PYTHON):
        return functions_in(parse(text))
    found = []
    for block in re.split(r"^(?=[ \t]*(?:async[ \t]+)?def\b)", normalise(text), flags=re.MULTILINE)[1:]:
        lines = textwrap.dedent(block).splitlines(keepends=True)
        # Without the lines after the function, which lie further left or at its own column.
        stop = next((n for n, line in enumerate(lines[1:], 1) if line.strip() and line[0] not in " \t)]}#"), None)
        with contextlib.suppress(*NOT_PYTHON):
            found += functions_in(parse("".join(lines[:stop])))
    return found


def _canonical(function: Function) -> str:
    """A function's arguments and statements, alike for all functions that differ only in docstrings, annotations and
    the names that they bind."""
    nodes = list(ast.walk(function))
    bound = {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.name for node in nodes if isinstance(node, Binding) and node.name}
    numbers = {function.name: "v0"}

    def renamed(name: str) -> str:
        return numbers.setdefault(name, f"v{len(numbers)}") if name in bound else name

    def dump(node: object) -> object:
        if isinstance(node, list):
            return [dump(item) for item in node]
        if isinstance(node, ast.Name):
            return ["Name", renamed(node.id)]
        if isinstance(node, ast.arg):
            return ["arg", renamed(node.arg)]
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            return ["Assign", [dump(node.target)], dump(node.value)]
        if isinstance(node, Function):
            return [type(node).__name__, renamed(node.name), dump(node.args), dump(body_of(node))]
        if not isinstance(node, ast.AST):
            return repr(node)
        fields = {name: value for name, value in ast.iter_fields(node) if name not in _UNCOUNTED}
        if isinstance(node, Binding) and node.name:
            fields["name"] = renamed(node.name)
        return [type(node).__name__, *map(dump, fields.values())]

    return repr([dump(function.args), dump(body_of(function))])
