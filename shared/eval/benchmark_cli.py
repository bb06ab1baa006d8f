"""`codedistill eval humaneval|mbpp|exercises|score|sandbox-check`: the commands that run programs."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from shared.eval.options import DTYPE, FILE, FOLDER, TEACHER_CACHE, quieten
from shared.options import GroupedCommand


def _of_a_benchmark(command: Callable[..., None], *, max_new_tokens: int) -> Callable[..., None]:
    """Add the options that all benchmarks have; almost all reference solutions fit in `max_new_tokens`."""
    options = [
        click.option("--model", metavar="DIR|ID", required=True, help="Teacher, run or export; or a Hub id."),
        click.option("--out", type=FOLDER, required=True, help="Folder for the results."),
        click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="Samples per problem."),
        click.option("--temperature", type=float, default=0.0, show_default=True,
                     help="Sampling temperature; 0 is greedy."),
        click.option("--top-p", type=float, default=1.0, show_default=True,
                     help="Nucleus sampling: the probability to draw from."),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of all samples."),
        click.option("--max-new-tokens", type=click.IntRange(1), default=max_new_tokens, show_default=True,
                     help="Max tokens per completion."),
        click.option("--batch-size", type=click.IntRange(1),
                     help="Completions at once.  [32; on a GPU 128]"),
        click.option("--limit", type=click.IntRange(1), help="Only the first problems."),
        click.option("--timeout", "timeout_seconds", type=click.FloatRange(0, min_open=True), default=3.0,
                     show_default=True, help="Max wall seconds per program, not counting message time."),
        DTYPE,
        TEACHER_CACHE,
        click.option("--unsafe-no-sandbox", is_flag=True,
                     help="Run programs without isolation if there is none."),
    ]  # fmt: skip
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)


_GROUPS = {
    "Model": "model cache_dir dtype",
    "Problems": "problems_file benchmark_file dataset limit",
    "Decoding": "samples temperature top_p seed max_new_tokens batch_size",
    "Sandbox": "timeout_seconds unsafe_no_sandbox",
}


def _groups(*absent: str) -> dict[str, str]:
    return {title: " ".join(n for n in names.split() if n not in absent) for title, names in _GROUPS.items()}


@click.command(cls=GroupedCommand, groups=_groups("dataset"))
@functools.partial(_of_a_benchmark, max_new_tokens=192)
@click.option("--problems", "problems_file", type=FILE, help="HumanEval's file, if neither package nor Hub has it.")
@click.option("--benchmark", "benchmark_file", type=FILE,
              help="Other problems in HumanEval's form, such as HumanEval+.")  # fmt: skip
def humaneval(problems_file: Path | None, benchmark_file: Path | None, **options: Any) -> None:
    """Score pass@k on HumanEval.

    Or on problems of its form (--benchmark). Re-running an interrupted command continues it. With other settings the
    results in --out are replaced, unless they are of more completions.
    """
    if problems_file and benchmark_file:
        raise click.UsageError("--problems are HumanEval's and --benchmark others': give one")
    from shared.eval.programs import problems

    _evaluate_benchmark(
        lambda: problems.from_file(benchmark_file) if benchmark_file else problems.humaneval(problems_file), **options
    )


@click.command(cls=GroupedCommand, groups=_groups("problems_file", "benchmark_file"))
@functools.partial(_of_a_benchmark, max_new_tokens=256)
@click.option("--dataset", default="mbpp", show_default=True, metavar="mbpp|FILE",
              help="The Hub's data set, or MBPP's own file.")  # fmt: skip
def mbpp(dataset: str, **options: Any) -> None:
    """Score pass@k on MBPP's test split.

    Re-running an interrupted command continues it. With other settings the results in --out are replaced, unless they
    are of more completions.
    """
    from shared.eval.programs import problems

    _evaluate_benchmark(lambda: problems.mbpp(dataset), **options)


@click.command(cls=GroupedCommand, groups=_groups("problems_file", "benchmark_file", "dataset"))
@functools.partial(_of_a_benchmark, max_new_tokens=48)
def exercises(**options: Any) -> None:
    """Score pass@k on easy functions.

    64 functions of one line each, which tell students apart before they solve anything harder. Never train on them.
    Re-running an interrupted command continues it.
    """
    from shared.eval.programs import problems

    _evaluate_benchmark(problems.exercises, **options)


@click.command()
@click.option("--problems", "problems_file", type=FILE, required=True, help="JSONL: task_id prompt test entry_point.")
@click.option(
    "--completions", "completions_file", type=FILE, required=True, help="JSONL: task_id and completion, or solution."
)
@click.option("--out", type=FILE, required=True, help="JSONL: a verdict for each completion's line, in order.")
@click.option("--timeout", "timeout_seconds", type=click.FloatRange(0, min_open=True), default=3.0, show_default=True,
              help="Max wall seconds per program, not counting message time.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1), help="Programs at once.  [one per processor]")
@click.option("--unsafe-no-sandbox", "unsafe", is_flag=True, help="Run programs without isolation if there is none.")
def score(**options: Any) -> None:
    """Judge completions of any tool.

    Runs completions in HumanEval's form, or whole programs (`solution`, as in EvalPlus), and writes their verdicts.
    """
    from shared.eval.programs.score import score_file

    lines = score_file(**options)
    counts = Counter(line["verdict"] for line in lines)
    click.echo(f"{len(lines)} completions: {', '.join(f'{n} {verdict}' for verdict, n in counts.most_common())}")


def _evaluate_benchmark(
    load: Callable[[], Any], *, model: str, cache_dir: Path | None, out: Path, **options: Any
) -> None:
    """Run one benchmark, which rank 0 loads, unless its result is up to date."""
    from data.humaneval import problems_digest
    from shared.checkpoints import locate_model, model_digest
    from shared.eval.inputs import is_up_to_date, refuse_to_shrink
    from shared.eval.programs.completion import ENDS
    from shared.eval.results import BenchmarkResult
    from shared.lock import Lock
    from shared.machine import has_accelerator
    from shared.process import is_main_process, world_size
    from shared.tokenizer import recorded_ends

    model_dir = locate_model(model, cache_dir)
    ends = recorded_ends(cache_dir / "tokenizer") if cache_dir else None
    benchmark = inputs = None
    if is_main_process():
        benchmark = load()
        inputs = options | {
            "model": model_digest(model_dir),
            "benchmark": benchmark.name,
            "problems": problems_digest(benchmark.problems[: options["limit"]]),
            "ends": ends,
            "completion_ends": ENDS,
        }
        if is_up_to_date(out / "result.json", BenchmarkResult, inputs):
            inputs = None
            if world_size() == 1:
                return
        else:
            num_problems = len(benchmark.problems[: options["limit"]])
            refuse_to_shrink(out, num_problems * options["samples"])
    quieten()
    from shared.eval.programs.benchmark import evaluate_benchmark
    from shared.eval.programs.sample import Decoding

    names = ("temperature", "top_p", "seed", "max_new_tokens")
    decoding = Decoding(
        num_samples=options.pop("samples"),
        batch_size=options.pop("batch_size") or (128 if has_accelerator() else 32),
        **{name: options.pop(name) for name in names},
    )
    unsafe = options.pop("unsafe_no_sandbox")
    with contextlib.ExitStack() as held:
        if inputs is not None:
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(Lock(out, "evaluating into this folder"))
        result = evaluate_benchmark(
            benchmark, model_dir, out, decoding=decoding, unsafe=unsafe, inputs=inputs, ends=ends, **options
        )
    if result:
        from shared import tracking

        tracking.record_evaluation(result.benchmark.lower(), out, result.to_dict())


@click.command("sandbox-check")
def sandbox_check() -> None:
    """Test this machine's sandbox.

    Tries what generated programs must not do; fails where they cannot be scored.
    """
    from shared.errors import SandboxError
    from shared.eval.sandbox.probe import probe_all
    from shared.eval.sandbox.runner import FIX

    best = None
    for isolation, outcomes, reason in probe_all():
        state = f"not here: {reason}" if not outcomes else "does not hold" if reason else "holds"
        click.echo(f"{isolation.value}: {state}")
        for about, outcome in outcomes.items():
            click.echo(f"  {about}: {outcome}")
        if not reason:
            best = best or isolation
    if best is None:
        raise SandboxError("no sandbox can be had here", fix=FIX)
    click.echo(f"programs are scored behind: {best.value}")
