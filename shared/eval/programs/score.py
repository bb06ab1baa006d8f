"""Score completions in HumanEval's form, whoever made them: one verdict line for each of their lines."""

import json
from pathlib import Path
from typing import Any

from data.humaneval import read_completions, read_problems
from data.records import Problem
from data.templates import humaneval_prompt
from shared.errors import ConfigError
from shared.eval.sandbox.runner import Candidate, open_sandbox, run_candidates
from shared.files import write_bytes
from shared.process import log


def to_candidate(problem: Problem, completion: str, prompt: object = None, *, solution: str | None = None) -> Candidate:
    """The program that a completion makes of a problem; or `solution`, a whole program, as EvalPlus's samples have it.

    `prompt` is what the completion's own line says was continued. It is taken if it is the problem's prompt without the
    white space at its end, as `eval humaneval` gives it to models; anything else, such as a chat, is not.
    """
    continued = humaneval_prompt(problem)
    return Candidate(
        prompt=continued if prompt == continued else problem.prompt,
        completion=completion,
        test=problem.test,
        entry_point=problem.entry_point,
        same_process=problem.same_process,
        solution=solution,
    )


def score_file(
    problems_file: Path,
    completions_file: Path,
    out: Path,
    *,
    timeout_seconds: float,
    workers: int | None,
    unsafe: bool,
) -> list[dict[str, Any]]:
    """Run every completion; write, at once and last, `task_id verdict detail seconds sandbox`, line by line in order.

    Args:
        problems_file: rows with `task_id prompt test entry_point` (and `same_process` where known).
        completions_file: rows with `task_id completion`, and `prompt` where known (see `to_candidate`); or with
            `task_id solution`, a whole program, which comes before a completion in the same row, as in EvalPlus.
        out: JSONL; its folder is made where missing.
        timeout_seconds, workers: see `run_candidates`.
        unsafe: go on without isolation where there is none; every line says so.

    Raises:
        ConfigError: a file cannot be read, a line is malformed or names an unknown problem.
        SandboxError: no sandbox can be had.
    """
    by_id = {problem.task_id: problem for problem in read_problems(problems_file)}
    candidates, task_ids = [], []
    for written in read_completions(completions_file):
        if (problem := by_id.get(written.task_id)) is None:
            raise written.row.error("task_id", expected=f"a problem of {problems_file}", got=repr(written.task_id))
        task_ids.append(written.task_id)
        text, solution = ("", written.text) if written.is_program else (written.text, None)
        candidates.append(to_candidate(problem, text, written.prompt, solution=solution))
    if not candidates:
        raise ConfigError("no completions in the file", where=completions_file)
    if missing := by_id.keys() - set(task_ids):
        log(f"{len(missing)} of {len(by_id)} problems have no completion, such as {min(missing)}")
    sandbox = open_sandbox(unsafe=unsafe)
    log(f"isolation: {sandbox.isolation.value}")
    verdicts = run_candidates(candidates, sandbox=sandbox, timeout_seconds=timeout_seconds, workers=workers)
    lines = [
        {"task_id": task_id}
        | {key: getattr(verdict, key) for key in ("verdict", "detail", "seconds")}
        | {"sandbox": sandbox.description}
        for task_id, verdict in zip(task_ids, verdicts, strict=True)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return lines
