"""Problems under the name that results give them, and prompts. Importing this module does not load torch."""

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.humaneval import load_exercises, load_humaneval, read_problems
from data.mbpp import load_problems
from data.records import Problem
from data.tabular import read_rows
from data.templates import humaneval_prompt, normalise
from shared.errors import require


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """Problems under the name that results give them."""

    name: str  # such as `HumanEval`
    problems: tuple[Problem, ...]  # in their published order
    about: Mapping[str, Any]  # what a result says of them beside their digest


def humaneval(problems_file: Path | None) -> Benchmark:
    """HumanEval, from its package or the Hub, or as an earlier run of this wrote it."""
    problems = read_problems(problems_file) if problems_file else load_humaneval()
    return Benchmark(name="HumanEval", problems=problems, about={})


def from_file(path: Path) -> Benchmark:
    """Any file of HumanEval's form, under its own name."""
    return Benchmark(name=path.stem, problems=read_problems(path), about={"file": path.name})


def exercises() -> Benchmark:
    """Our own one-line functions."""
    return Benchmark(name="Exercises", problems=load_exercises(), about={})


def mbpp(dataset: str) -> Benchmark:
    """MBPP's test split; see `data.mbpp`."""
    problems, commit = load_problems(dataset, "test")
    asserts = "test_list (all three), the same that the prompt shows; challenge_test_list takes no part"
    about = {"dataset": Path(dataset).name, "dataset_commit": commit, "split": "test"}
    about |= {"asserts_shown": "test_list", "asserts_graded": asserts}
    return Benchmark(name="MBPP", problems=problems, about=about)


def read_prompts(file: Path | None, limit: int | None) -> list[tuple[str, str]]:
    """Names and texts of prompts as models are given them: `prompt` of a data file's first rows, or HumanEval's.

    Raises:
        ConfigError: the file cannot be read or holds no prompt.
    """
    if file is None:
        return [(problem.task_id, humaneval_prompt(problem)) for problem in load_humaneval()[:limit]]
    rows = list(itertools.islice(read_rows(file), limit))
    require(rows, "no prompts in the file", where=file)
    return [(str(row.fields.get("task_id", row.where)), normalise(row.text("prompt")).rstrip()) for row in rows]
