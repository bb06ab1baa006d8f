"""Documents that a model writes: completions of prompts, verified by the prompts' own tests, as a data set."""

import ast
import hashlib
import itertools
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.decontaminate import Index
from data.humaneval import COLUMNS, parse_problem
from data.mbpp import NAME as MBPP
from data.mbpp import is_mbpp, load_problems
from data.records import Document, Problem
from data.syntax import is_constant
from data.tabular import Row, find_data_files, open_table
from shared.checkpoints import hub_commit
from shared.distributed import agree, joined
from shared.errors import ConfigError, require
from shared.eval.programs.benchmark import PATIENCE, complete_problems, is_python, on_all_ranks, score_completions
from shared.eval.programs.completion import parse
from shared.eval.programs.sample import COMPLETIONS, REFUSED, Decoding, remove_parts, to_jsonl
from shared.eval.results import Written
from shared.eval.sandbox.runner import Sandbox, open_sandbox
from shared.files import is_system_file, replace_files, to_json
from shared.lock import LOCK
from shared.options import command_line
from shared.process import log

DOCUMENTS = "documents.jsonl"


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts to complete, with the tests of those that have any (`test` is empty for others)."""

    name: str  # of the data set
    problems: tuple[Problem, ...]  # in its order
    license: str | None  # of the prompts; None where unknown


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which completions become documents."""

    keep: str  # `passed` its tests (or is Python, where there are none), `parsed` as Python, or `all`
    per_prompt: int | None  # at most so many of a prompt; None for all
    prefer: str  # which come first where there are more, `shortest` or `random`
    seed: int  # of the random choice


def read_prompts(dataset: str, split: str, limit: int | None) -> Prompts:
    """The prompts of a data set.

    Args:
        dataset: `mbpp`, MBPP's own file, `stdlib`, or data files with `prompt` and, where there are any, `test` and
            `entry_point` as in HumanEval; `task_id` or `id` names them.
        split: of MBPP and `stdlib`.

    Raises:
        ConfigError: it cannot be read, has no prompts or the same id twice.
    """
    from data.load import load_documents

    if dataset == "stdlib":
        found = load_documents(dataset, split, limit_docs=limit)
        documents: Any = found.documents
        problems = [Problem(task_id=d.id, prompt=d.prompt, test="", entry_point="f") for d in documents]
        return Prompts(name=f"stdlib, {split}", problems=tuple(problems), license=found.license)
    files = find_data_files(dataset)
    require(dataset == MBPP or files, "unknown prompts", where="--prompts", expected="mbpp, stdlib or data files",
            got=repr(dataset))  # fmt: skip
    if dataset == MBPP or is_mbpp(open_table(files or [], dataset).columns):
        from data.mbpp import LICENSE

        problems = list(load_problems(dataset, split)[0][:limit])
        return Prompts(name=f"MBPP, {split}", problems=tuple(problems), license=LICENSE)
    table = open_table(files or [], dataset)
    seen: dict[Any, str] = {}
    problems = []
    for number, row in enumerate(itertools.islice(table.read(("id", *COLUMNS)), limit), 1):
        problems.append(_problem(row, number))
        row.require_once("id", problems[-1].task_id, seen)
    require(problems, "no prompts", where=dataset)
    return Prompts(name=Path(dataset).name, problems=tuple(problems), license=None)


def _problem(row: Row, number: int) -> Problem:
    key = next((key for key in ("task_id", "id") if row.fields.get(key) is not None), None)
    task_id = row.id(key) if key else str(number)
    prompt = row.text("prompt", blank=False)
    if row.fields.get("test") is None or not row.text("test").strip():
        return Problem(task_id=task_id, prompt=prompt, test="", entry_point="f")
    return parse_problem(Row(row.where, row.fields | {"task_id": task_id}))


def refuse_benchmark_prompts(prompts: Prompts, benchmarks: Index) -> None:
    """Refuse prompts that are a benchmark's test problems; the `ConfigError` names the first."""
    for problem in prompts.problems:
        if found := benchmarks.prompt_of(problem.prompt):
            raise ConfigError(
                "a prompt is a benchmark's test problem, and what is written for it must not be trained on",
                where=f"{prompts.name}, {problem.task_id}",
                got=found,
                fix="take other prompts; --benchmark-prompts NAME takes them all the same",
            )


def require_own_folder(out: Path) -> None:
    """Refuse a folder that holds anything that `generate` did not write; the `ConfigError` names it."""
    for entry in sorted(out.iterdir()) if out.is_dir() else ():
        is_ours = entry.name in (COMPLETIONS, "result.json", LOCK) or entry.match("completions.rank-*.jsonl")
        if entry.name == DOCUMENTS:
            with entry.open("rb") as file:
                line = file.readline()
            is_ours = not line or b'"written"' in line
        if not is_ours and not entry.name.startswith(".") and not is_system_file(entry.name):
            raise ConfigError("the folder holds something else", where=out, expected="a new folder, or one of generate",
                              got=entry.name, fix="name another --out")  # fmt: skip


def write_documents(
    prompts: Prompts | None,
    model_dir: Path,
    out: Path,
    *,
    inputs: dict[str, Any] | None,
    decoding: Decoding,
    choice: Choice,
    benchmarks: Index,
    origin: str,
    style: str,
    timeout_seconds: float,
    dtype: str,
    unsafe: bool,
    ends: Mapping[str, list[str]] | None = None,
) -> Written | None:
    """Complete prompts and keep what is good, in one process or in several under torchrun, of which rank 0 judges.

    Writes `documents.jsonl`, `completions.jsonl` and, last, `result.json` into `out`; a run that was interrupted reuses
    the completions that are there, as `evaluate_benchmark` does.

    Args:
        prompts, inputs: on rank 0; see `evaluate_benchmark` for these and for what is not named here.
        benchmarks: documents that share text with one of these are left out.
        origin, style: `teacher` or `student`; see `complete_problems`.

    Returns:
        What result.json holds; None on ranks other than 0, or where it is up to date.
    """
    sandbox: Sandbox | None = None
    with joined(PATIENCE):
        if agree([inputs is None]) == [1]:
            return None
        if prompts is not None and choice.keep == "passed" and any(problem.test for problem in prompts.problems):
            sandbox = open_sandbox(unsafe=unsafe)
        problems = on_all_ranks(() if prompts is None else prompts.problems)
        completions, settings, generation_seconds = complete_problems(
            problems, model_dir, out, decoding=decoding, dtype=dtype, ends=ends, style=style
        )
    if prompts is None or inputs is None:
        return None
    start = time.monotonic()
    verdicts = _judge(problems, completions, sandbox, timeout_seconds) if sandbox else {}
    by = {
        "origin": origin,
        "model": model_dir.name,
        "commit": hub_commit(model_dir),
        "model_sha256": settings["model_sha256"],
        "prompts": prompts.name,
        "license": prompts.license,
        "settings": decoding.to_dict() | {"style": settings.get("style", "prompt")},
    }
    rows, counts, contaminated = _choose(completions, verdicts, choice, benchmarks, by)
    contents = {DOCUMENTS: to_jsonl(rows), COMPLETIONS: to_jsonl(completions)}
    judged = Counter(verdicts.values())
    result = Written(
        command=command_line(),
        inputs=inputs,
        model=str(model_dir),
        **{key: by[key] for key in ("commit", "prompts", "license", "origin")},
        settings=decoding.to_dict() | settings | {"timeout_seconds": timeout_seconds},
        counts=counts | {"passed": judged["passed"] if verdicts else None},
        verdicts=dict(sorted(judged.items())),
        contaminated=contaminated,
        files={name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        num_new_tokens=sum(line["num_new_tokens"] for line in completions),
        generation_seconds=round(generation_seconds, 3),
        scoring_seconds=round(time.monotonic() - start, 3),
        reasons={} if verdicts else {"passed": "no program was run: no prompt has tests, or --keep does not need them"},
    )
    replace_files(out, contents | {"result.json": to_json(result.to_dict()).encode()})
    remove_parts(out)
    shown = ", ".join(f"{count:,} {name}" for name, count in result.counts.items() if count is not None)
    log(f"{out / DOCUMENTS}: {shown}{'' if rows else '; nothing was kept, see --keep'}")
    return result


def _judge(
    problems: Sequence[Problem], completions: Sequence[Mapping[str, Any]], sandbox: Sandbox, timeout_seconds: float
) -> dict[int, str]:
    """The verdicts of the completions whose prompts have tests, by their place."""
    with_tests = {problem.task_id for problem in problems if problem.test}
    places = [place for place, line in enumerate(completions) if line["task_id"] in with_tests]
    chosen = [completions[place] for place in places]
    found = score_completions(problems, chosen, sandbox=sandbox, timeout_seconds=timeout_seconds)
    return {place: verdict.verdict for place, verdict in zip(places, found, strict=True)}


def _choose(
    completions: Sequence[Mapping[str, Any]],
    verdicts: Mapping[int, str],
    choice: Choice,
    benchmarks: Index,
    by: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], dict[str, int | None], dict[str, str]]:
    """The documents' rows, by prompt; how many passed each sieve; and what shares text with a benchmark."""
    counts: Counter[str] = Counter(written=len(completions), refused=0, parsed=0, unique=0, contaminated=0, kept=0)
    contaminated: dict[str, str] = {}
    texts: set[str] = set()
    trees: set[str] = set()
    found: dict[str, list[dict[str, Any]]] = {}
    for place, line in enumerate(completions):
        is_refused = line["finish_reason"] == REFUSED
        parsed, verdict = not is_refused and is_python(line), verdicts.get(place)
        counts["refused"] += is_refused
        counts["parsed"] += parsed
        is_good = parsed and (verdict in (None, "passed") if choice.keep == "passed" else True)
        if is_refused or not line["completion"].strip() or not (is_good or choice.keep == "all"):
            continue
        text = (line["prompt"] + line["completion"]).rstrip()
        tree = _tree(text)
        if text in texts or tree in trees:
            continue
        texts.add(text)
        trees |= {tree} if tree else set()
        counts["unique"] += 1
        id = f"{line['task_id']}/{by['origin']}/{line['sample']}"
        document = Document(id=id, source="", prompt=line["prompt"], completion=line["completion"])
        if match := benchmarks.match(document):
            contaminated[id] = f"{match.problem}, {match.rule}"
            counts["contaminated"] += 1
            continue
        written = {**by, "prompt_id": line["task_id"], "sample": line["sample"], "verdict": verdict,
                   "finish_reason": line["finish_reason"]}  # fmt: skip
        row = {"id": id, "prompt": line["prompt"], "completion": line["completion"], "written": written}
        found.setdefault(line["task_id"], []).append(row)
    rows = [row for task_id, of_prompt in found.items() for row in _first(of_prompt, task_id, choice)]
    counts["kept"] = len(rows)
    return rows, dict(counts), contaminated


def _first(rows: list[dict[str, Any]], task_id: str, choice: Choice) -> list[dict[str, Any]]:
    """At most `per_prompt` rows of one prompt."""
    if choice.per_prompt is None or len(rows) <= choice.per_prompt:
        return rows
    if choice.prefer == "shortest":
        return sorted(rows, key=lambda row: len(row["completion"]))[: choice.per_prompt]
    return random.Random(f"{choice.seed}/{task_id}").sample(rows, choice.per_prompt)


def _tree(text: str) -> str | None:
    """A program's syntax tree without its docstrings, which differ where the code does not.

    None where it is no Python, or nested deeper than Python recurses.
    """
    tree = parse(text)
    if tree is None:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            node.body = [part for part in node.body if not is_constant(part)]
    try:
        return ast.dump(tree)
    except RecursionError:
        return None
