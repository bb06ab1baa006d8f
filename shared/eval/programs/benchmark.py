"""A benchmark end to end: complete its problems, run the programs, score."""

import dataclasses
import datetime
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.humaneval import problems_digest
from data.records import Problem
from shared.checkpoints import dtype_name, hub_commit, load_model, model_digest
from shared.distributed import agree, gathered, joined
from shared.errors import ConfigError, SandboxError
from shared.eval.programs.completion import ENDS, parse
from shared.eval.programs.generate import eos_ids
from shared.eval.programs.passk import mean_interval, pass_at_k
from shared.eval.programs.problems import Benchmark
from shared.eval.programs.sample import COMPLETIONS, REFUSED, Decoding, complete, remove_parts, to_jsonl
from shared.eval.programs.score import to_candidate
from shared.eval.programs.style import CHAT, PROMPT, Style
from shared.eval.results import BenchmarkResult
from shared.eval.sandbox.runner import Candidate, Sandbox, Verdict, open_sandbox, run_candidates
from shared.files import replace_files, to_json
from shared.options import command_line
from shared.process import log
from shared.tokenizer import adopt_ends, document_ends

PATIENCE = datetime.timedelta(days=30)  # ranks may generate that long before they meet again
REPORTED_K = (1, 10, 100)


def evaluate_benchmark(
    benchmark: Benchmark | None,
    model_dir: Path,
    out: Path,
    *,
    inputs: dict[str, Any] | None,
    decoding: Decoding,
    limit: int | None,
    timeout_seconds: float,
    dtype: str,
    unsafe: bool,
    ends: Mapping[str, list[str]] | None = None,
) -> BenchmarkResult | None:
    """Score a model's completions, in one process or in several under torchrun, of which rank 0 scores.

    Each rank saves its completions as they are made, in a part file, `completions.rank-N.jsonl`. At the end rank 0
    writes problems.jsonl, completions.jsonl, verdicts.jsonl and, last, result.json into `out` and removes the part
    files; until then an earlier evaluation's files stay as they are. A run reuses completions of the same settings from
    part files and completions.jsonl, so it resumes an interrupted one. Where no sandbox can be had, programs are not
    run: the result says so, with nulls and their reasons.

    Args:
        benchmark: on rank 0 the problems; None on other ranks.
        out: a folder that all ranks see.
        inputs: on rank 0 what the result records of its inputs, or None where the result is up to date already.
        limit: only the first problems; None for all.
        timeout_seconds: wall seconds of one program with its test, without message time (see `run_candidates`).
        dtype: see `checkpoints.load_frozen`.
        unsafe: run programs without isolation if there is none.
        ends: what prompts open with, where the model's tokenizer has no record of it (`tokenizer.recorded_ends`).

    Returns:
        What result.json holds; None on ranks other than 0, or where it is up to date.
    """
    sandbox: Sandbox | SandboxError | None = None
    with joined(PATIENCE):
        if agree([inputs is None]) == [1]:
            return None
        if benchmark is not None:
            sandbox = find_sandbox(benchmark.name, unsafe=unsafe)
        problems = on_all_ranks([] if benchmark is None else benchmark.problems[:limit])
        completions, settings, generation_seconds = complete_problems(
            problems, model_dir, out, decoding=decoding, dtype=dtype, ends=ends
        )
    if benchmark is None or inputs is None:
        return None
    start = time.monotonic()
    settings = decoding.to_dict() | settings | {"limit": limit, "timeout_seconds": timeout_seconds}
    parses = [is_python(line) for line in completions]
    verdicts = None
    if isinstance(sandbox, Sandbox):
        verdicts = score_completions(problems, completions, sandbox=sandbox, timeout_seconds=timeout_seconds)
    files = _files(problems, completions, parses, verdicts)
    result = BenchmarkResult(
        command=command_line(),
        inputs=inputs,
        benchmark=benchmark.name,
        about=dict(benchmark.about),
        model=str(model_dir),
        commit=hub_commit(model_dir),
        problems_sha256=problems_digest(problems),
        **summarise(problems, completions, parses, verdicts, f"not run: {sandbox}"),
        settings=settings | {"sandbox": getattr(sandbox, "description", None)},
        **_generated(completions),
        files={name: hashlib.sha256(data).hexdigest() for name, data in files.items() if data is not None},
        generation_seconds=round(generation_seconds, 3),
        scoring_seconds=round(time.monotonic() - start, 3),
    )
    replace_files(out, files | {"result.json": to_json(result.to_dict()).encode()})
    remove_parts(out)
    log(describe(result))
    return result


def complete_problems(
    problems: Sequence[Problem],
    model_dir: Path,
    out: Path,
    *,
    decoding: Decoding,
    dtype: str,
    ends: Mapping[str, list[str]] | None,
    style: str = "prompt",
) -> tuple[list[dict[str, Any]], dict[str, Any], float]:
    """The completions of a model, which is no longer held afterwards; what decided them; and the seconds they took.

    `style`: see `Style`; `auto` asks a model whose tokenizer has a chat template by it.
    """
    model, tokenizer = load_model(model_dir, dtype)
    adopt_ends(tokenizer, ends)
    if style == "auto":
        style = CHAT.name if tokenizer.chat_template else PROMPT.name
    settings = {
        "problems_sha256": problems_digest(problems),
        "model_sha256": model_digest(model_dir),
        "opening": list(document_ends(tokenizer).opening),
        "eos_token_ids": eos_ids(model, tokenizer),
        "completion_ends": ENDS,
        "dtype": dtype_name(model),
        "device": model.device.type,
        **({"style": style} if style != PROMPT.name else {}),
    }
    start = time.monotonic()
    completions = complete(model, tokenizer, problems, out, decoding=decoding, settings=settings, style=Style(style))
    return completions, settings, time.monotonic() - start


def is_python(line: Mapping[str, Any]) -> bool:
    """Whether a completion makes its prompt Python."""
    return line["finish_reason"] != REFUSED and parse(line["prompt"] + line["completion"]) is not None


def _generated(completions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a result says of how its completions ended."""
    refused = {line["task_id"]: line["reason"] for line in completions if line["finish_reason"] == REFUSED}
    return {
        "num_refused": len(refused),
        "refused": refused,
        "finish_reasons": dict(sorted(Counter(line["finish_reason"] for line in completions).items())),
        "num_new_tokens": sum(line["num_new_tokens"] for line in completions),
    }


def _files(
    problems: Sequence[Problem],
    completions: Sequence[Mapping[str, Any]],
    parses: Sequence[bool],
    verdicts: Sequence[Verdict] | None,
) -> dict[str, bytes | None]:
    """The contents of the files beside a result; None where programs were not run."""
    lines = (
        {"task_id": line["task_id"], "sample": line["sample"], "parses": ok} | dataclasses.asdict(verdict)
        for line, ok, verdict in zip(completions, parses, verdicts or (), strict=verdicts is not None)
    )
    return {
        "problems.jsonl": to_jsonl(map(dataclasses.asdict, problems)),
        COMPLETIONS: to_jsonl(completions),
        "verdicts.jsonl": None if verdicts is None else to_jsonl(lines),
    }


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
            why = line["reason"]
            verdicts[number] = Verdict(verdict="failed", detail=why, seconds=0.0, loaded=False, asserts_passed=0)
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

    pass@k for k of 1, 10, 100 and the number of samples, as far as every problem has so many. Where programs could not
    be judged there is no score but two bounds of it: all of them failed, all of them passed. A problem without samples
    leaves no score: it is neither a failure nor left out.

    Args:
        problems: all that were asked for.
        parses, verdicts: of each completion; no verdicts where programs were not run, and `not_run` says why.
    """
    verdicts_of: dict[str, list[Verdict]] = {problem.task_id: [] for problem in problems}
    for line, verdict in zip(completions, verdicts or (), strict=verdicts is not None):
        verdicts_of[line["task_id"]].append(verdict)
    passes = [sum(v.verdict == "passed" for v in found) for found in verdicts_of.values()]
    counts = Counter(verdict.verdict for verdict in verdicts or ())
    details = {task: [v.detail for v in found if v.verdict == "error"] for task, found in verdicts_of.items()}
    not_judged = {task: errors[0] for task, errors in details.items() if errors}
    names = ("pass_at_1", "ci95", "pass_at_k", "pass_at_k_ci95", "share_runs", "share_some_assert")
    figures: dict[str, Any] = dict.fromkeys(names)
    bounds = None
    num_samples = min(map(len, verdicts_of.values()))
    if verdicts is None:
        reason = not_run
    elif num_samples == 0:
        reason = f"{sum(not found for found in verdicts_of.values())} problems have no completion"
    elif not_judged:
        at_most = [c + len(errors) for c, errors in zip(passes, details.values(), strict=True)]
        low, high = (_means(_estimates(verdicts_of, c, num_samples)) for c in (passes, at_most))
        bounds = {k: [low[k], high[k]] for k in low}
        reason = (
            f"{len(not_judged)} of {len(problems)} problems could not be judged; "
            f"pass@1 is between {low['1']:.1%} and {high['1']:.1%}"
        )
    else:
        reason = "the sandbox does not tell of every program"
        estimates = _estimates(verdicts_of, passes, num_samples)
        means = _means(estimates)
        intervals = {k: list(mean_interval(values, num_samples)) for k, values in estimates.items()}
        figures = {
            "pass_at_1": means["1"],
            "ci95": intervals["1"],
            "pass_at_k": means,
            "pass_at_k_ci95": intervals,
            "share_runs": _share(v.verdict == "passed" or v.loaded for v in verdicts),
            "share_some_assert": _share(v.verdict == "passed" or v.asserts_passed for v in verdicts),
        }
    return {
        **figures,
        "pass_at_k_bounds": bounds,
        "not_judged": not_judged,
        "share_parses": _share(parses),
        "num_problems": len(problems),
        "num_samples": len(completions),
        "num_passed": None if verdicts is None else sum(c > 0 for c in passes),
        "verdicts": dict(sorted(counts.items())),
        "reasons": {key: reason for key, value in figures.items() if value is None},
    }


def _estimates(verdicts_of: Mapping[str, Sequence[Verdict]], passes: Sequence[int], num_samples: int) -> dict[str, Any]:
    """pass@k of every problem, by k."""
    ks = sorted({k for k in REPORTED_K if k <= num_samples} | {num_samples})
    pairs = list(zip(verdicts_of.values(), passes, strict=True))
    return {str(k): [pass_at_k(len(found), c, k) for found, c in pairs] for k in ks}


def _means(estimates: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {k: math.fsum(values) / len(values) for k, values in estimates.items()}


def describe(result: BenchmarkResult) -> str:
    """The outcome in a line."""
    name = result.benchmark
    if result.num_passed is None:
        return f"{name}: {result.reasons['pass_at_1']}"
    if result.pass_at_k is None or result.pass_at_k_ci95 is None:
        problems = "".join(f"\n  {task}: {why}" for task, why in result.not_judged.items())
        return f"{name}: no score, since {result.reasons['pass_at_1']}; see verdicts.jsonl{problems}"
    scores = [
        f"pass@{k} {score:.1%} (95 % interval {low:.1%} to {high:.1%})"
        for (k, score), (low, high) in zip(result.pass_at_k.items(), result.pass_at_k_ci95.values(), strict=True)
    ]
    shares = {"parse": result.share_parses, "run": result.share_runs,
              "pass at least one assert": result.share_some_assert}  # fmt: skip
    shown = [f"{share:.1%} {verb}" for verb, share in shares.items() if share is not None]
    solved = f"{result.num_passed} of {result.num_problems} problems solved"
    refused = f"; prompts too long for the model, counted as failed: {n}" if (n := result.num_refused) else ""
    return f"{name}: {solved}, {', '.join(scores)}; of the programs {', '.join(shown)}{refused}"


def find_sandbox(name: str, *, unsafe: bool) -> Sandbox | SandboxError:
    """A sandbox, or why there is none."""
    try:
        return open_sandbox(unsafe=unsafe)
    except SandboxError as error:
        log(f"{name}: completions are made, but no program is run: {error}")
        return error


def _share(values: Iterable[object]) -> float | None:
    """The share of what is true or not 0; None where anything is unknown."""
    known = list(values)
    return None if None in known else sum(map(bool, known)) / len(known)


def on_all_ranks(problems: Sequence[Problem]) -> list[Problem]:
    """Rank 0's problems, on every rank."""
    return [Problem(**json.loads(text)) for text in gathered([json.dumps(dataclasses.asdict(p)) for p in problems])]
