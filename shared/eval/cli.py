"""`codedistill eval`: measure teacher and students alike, by directory."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from shared.eval.sandbox_cli import sandbox_check, score

DIRECTORY = click.Path(path_type=Path, exists=True, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
TEACHER_OF = "Take the Hub id that is this cache's teacher at the commit that made it."
DTYPE = click.Choice(["auto", "float32", "bfloat16", "float16"])


class Named(click.ParamType[tuple[str, str]]):
    """`NAME=VALUE`."""

    def __init__(self, value_name: str) -> None:
        self.name = f"NAME={value_name}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Split at the first `=`."""
        if isinstance(value, tuple):
            return value
        name, separator, text = value.partition("=")
        if not (name and separator and text):
            self.fail(f"{value!r} is not {self.name}", param, ctx)
        return name, text


@click.group("eval")
def evaluate() -> None:
    """Measure teacher and students; write the report."""


evaluate.add_command(score)
evaluate.add_command(sandbox_check)


@evaluate.command()
@click.option("--model", metavar="DIR|ID", required=True, help="Teacher, run or export; or a Hub id.")
@click.option("--cache", "cache_dir", type=DIRECTORY, required=True, help="Cache of held-out documents.")
@click.option("--teacher", metavar="DIR|ID", help="Run it too: all its ids, not the cache's K.")
@click.option("--out", type=FILE, required=True, help="JSON file to write.")
@click.option("--dtype", type=DTYPE, default="auto", show_default=True, help="auto: what the model's config says.")
@click.option("--batch-tokens", type=click.IntRange(1), default=1024, show_default=True,
              help="At once, padding included; the default is stage 1's.")  # fmt: skip
def fidelity(model: str, cache_dir: Path, teacher: str | None, out: Path, dtype: str, batch_tokens: int) -> None:
    """NLL, KL to the teacher, agreement and calibration over a cache's targets, with intervals."""
    _quieten()
    from shared.checkpoints import locate_model
    from shared.eval.fidelity.measure import evaluate_fidelity

    result = evaluate_fidelity(
        locate_model(model, cache_dir),
        cache_dir,
        dtype=dtype,
        batch_tokens=batch_tokens,
        teacher_dir=locate_model(teacher, cache_dir) if teacher else None,
    )
    _write("fidelity", out, result)
    for key in ("nll_nats", "kl_to_teacher_nats", "top1_agreement", "ece"):
        low_high = result["ci95"][key]
        interval = f" (95 % interval {low_high[0]:.4f} to {low_high[1]:.4f})" if low_high else ""
        click.echo(f"{key} {'unknown' if result[key] is None else format(result[key], '.4f')}{interval}")


@evaluate.command()
@click.option(
    "--model", "models", type=Named("DIR|ID"), multiple=True, required=True, help="May be given several times."
)
@click.option("--out", type=FILE, required=True, help="JSON file to write.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--new-tokens", type=click.IntRange(1), default=32, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=6, show_default=True,
              help="Timed rounds; fewer than 6 give no 95 % interval.")  # fmt: skip
@click.option("--dtype", type=DTYPE, default="auto", show_default=True, help="auto: what each model's config says.")
@click.option("--cache", "cache_dir", type=DIRECTORY, help=TEACHER_OF)
def latency(
    models: tuple[tuple[str, str], ...],
    out: Path,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    dtype: str,
    cache_dir: Path | None,
) -> None:
    """Size, memory, prefill and decode speed at batch 1 and 8, and energy, all models in one process."""
    if len(dict(models)) < len(models):
        raise click.UsageError("two models have the same name")
    _quieten()
    from shared.checkpoints import locate_model
    from shared.eval.speed.latency import measure_latency

    located = {name: locate_model(model, cache_dir) for name, model in models}

    _write(
        "latency",
        out,
        measure_latency(located, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats, dtype=dtype),
    )


@evaluate.command()
@click.option("--teacher", metavar="DIR|ID", required=True, help="Decodes greedily, with and without drafts.")
@click.option("--student", metavar="DIR|ID", required=True, help="Run or export that drafts; of the same tokenizer.")
@click.option("--prompts", "prompts_file", type=FILE, help="Rows with `prompt`, .jsonl or .parquet.  [HumanEval's]")
@click.option("--out", type=FILE, required=True, help="JSON file to write.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="Only the first prompts.")
@click.option("--new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--draft-tokens", type=click.IntRange(1), default=4, show_default=True, help="Before each verification.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--dtype", type=DTYPE, default="auto", show_default=True, help="auto: what each model's config says.")
@click.option("--cache", "cache_dir", type=DIRECTORY, help=TEACHER_OF)
def draft(teacher: str, student: str, out: Path, cache_dir: Path | None, **options: Any) -> None:
    """Speculative decoding: the student drafts for its teacher. Acceptance, speed-up, and whether tokens stay equal."""
    _quieten()
    from shared.checkpoints import locate_model
    from shared.eval.speed.draft import evaluate_draft

    result = evaluate_draft(locate_model(teacher, cache_dir), locate_model(student), **options)
    _write("draft", out, result)
    same = result["equality"]["float32"]
    acceptance = "unknown" if result["acceptance_rate"] is None else f"{result['acceptance_rate']:.1%}"
    click.echo(
        f"acceptance {acceptance}, {result['mean_accepted_length']:.2f} drafted tokens kept per pass, "
        f"speed-up {result['speedup']:.2f}; in float32 {same['num_equal']} of {same['num_prompts']} prompts gave the "
        "tokens of plain greedy decoding"
    )


def _of_a_benchmark(command: Callable[..., None], *, max_new_tokens: int) -> Callable[..., None]:
    """The options that all benchmarks have; nearly all reference solutions of this one have fewer tokens than that."""
    options = [
        click.option("--model", metavar="DIR|ID", required=True, help="Teacher, run or export; or a Hub id."),
        click.option("--out", type=FOLDER, required=True, help="Folder for the results."),
        click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="Of each problem."),
        click.option(
            "--temperature", type=float, default=0.0, show_default=True, help="Samples are drawn at it; 0 is greedy."
        ),
        click.option(
            "--top-p", type=float, default=1.0, show_default=True, help="Draw from this share of probability."
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Of all draws."),
        click.option("--max-new-tokens", type=click.IntRange(1), default=max_new_tokens, show_default=True),
        click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True),
        click.option("--limit", type=click.IntRange(1), help="Only the first problems."),
        click.option(
            "--timeout",
            "timeout_seconds",
            type=click.FloatRange(0, min_open=True),
            default=3.0,
            show_default=True,
            help="Wall seconds of one program.",
        ),
        click.option(
            "--dtype", type=DTYPE, default="auto", show_default=True, help="auto: what the model's config says."
        ),
        click.option("--cache", "cache_dir", type=DIRECTORY, help=TEACHER_OF),
        click.option(
            "--allow-host-reads", is_flag=True, help="Run programs even where they can read this machine's files."
        ),
        click.option("--unsafe-no-sandbox", is_flag=True, help="Run programs without walls where none can be had."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@evaluate.command()
@functools.partial(_of_a_benchmark, max_new_tokens=192)
@click.option("--problems", "problems_file", type=FILE, help="HumanEval's problems.jsonl, where nothing else has them.")
@click.option(
    "--benchmark", "benchmark_file", type=FILE, help="Other problems in HumanEval's form, such as HumanEval+."
)
def humaneval(problems_file: Path | None, benchmark_file: Path | None, **options: Any) -> None:
    """pass@k on HumanEval, or on problems of its form. Interrupted, the same command continues."""
    if problems_file and benchmark_file:
        raise click.UsageError("--problems are HumanEval's and --benchmark others': give one")
    from shared.eval.programs import benchmark

    _evaluate_benchmark(
        lambda: benchmark.from_file(benchmark_file) if benchmark_file else benchmark.humaneval(problems_file), **options
    )


@evaluate.command()
@functools.partial(_of_a_benchmark, max_new_tokens=256)
@click.option(
    "--dataset", default="mbpp", show_default=True, metavar="mbpp|FILE", help="The Hub's, or MBPP's own file."
)
def mbpp(dataset: str, **options: Any) -> None:
    """pass@k on MBPP's test split. Interrupted, the same command continues."""
    from shared.eval.programs import benchmark

    _evaluate_benchmark(lambda: benchmark.mbpp(dataset), **options)


def _evaluate_benchmark(
    load: Callable[[], Any],
    *,
    model: str,
    out: Path,
    cache_dir: Path | None,
    samples: int,
    unsafe_no_sandbox: bool,
    **options: Any,
) -> None:
    """Run one benchmark; `load` gives it."""
    _quieten()
    from shared import tracking
    from shared.checkpoints import locate_model
    from shared.eval.programs.benchmark import evaluate_benchmark
    from shared.eval.programs.sample import Decoding

    names = ("temperature", "top_p", "seed", "max_new_tokens", "batch_size")
    decoding = Decoding(num_samples=samples, **{name: options.pop(name) for name in names})
    model_dir = locate_model(model, cache_dir)
    result = evaluate_benchmark(load, model_dir, out, decoding=decoding, unsafe=unsafe_no_sandbox, **options)
    if result:
        tracking.record_evaluation(result["benchmark"].lower(), out, result)


@evaluate.command()
@click.option("--eval", "eval_dir", type=DIRECTORY, required=True, help="Folder of results, one subfolder per model.")
@click.option("--student", "students", type=Named("RUN"), multiple=True, help="A student's run folder.")
@click.option("--cache", "caches", type=DIRECTORY, multiple=True, help="A cache whose statistics are shown.")
@click.option("--proof", "proof_file", type=FILE, help="proof.json: arms over several seeds.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the report.")
def report(
    eval_dir: Path,
    students: tuple[tuple[str, str], ...],
    caches: tuple[Path, ...],
    proof_file: Path | None,
    out: Path,
) -> None:
    """One page of teacher and students side by side, as JSON, Markdown and HTML; its figures go to W&B too."""
    for name, folder in students:
        if not Path(folder).is_dir():
            raise click.UsageError(f"the student {name} has no folder {folder!r}")
    if proof_file and not proof_file.is_file():
        raise click.UsageError(f"there is no {proof_file}")
    from shared import tracking
    from shared.eval.report.report import build_report

    result = build_report(eval_dir, {name: Path(folder) for name, folder in students}, list(caches), out, proof_file)
    with tracking.start(
        "report",
        name=out.resolve().parent.name,
        config={"caveats": result["caveats"]},
        directory=out.parent,
        group=eval_dir.resolve().name,
    ) as run:
        for name, figures in result["models"].items():
            figures |= {f"humaneval/{key}": value for key, value in figures["humaneval"].items()}
            run.summary({f"{name}/{key}": v for key, v in figures.items() if isinstance(v, int | float)})
    for line in (*result["headline"], f"wrote {out / 'report.html'}, report.md and report.json"):
        click.echo(line)


@evaluate.command()
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@click.option("--fail-on", type=click.Choice(["worse"]), help="Exit with 1 if a figure is worse, or none was judged.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.pass_context
def compare(context: click.Context, a: Path, b: Path, fail_on: str | None, as_json: bool) -> None:
    """What changed beyond noise from result A to B: two fidelity, latency, HumanEval or report JSON files."""
    from shared.eval.report.compare import compare_files, describe
    from shared.files import to_json

    result = compare_files(a, b)
    click.echo(to_json(result) if as_json else describe(result), nl=not as_json)
    verdicts = {row["verdict"] for row in result["rows"]}
    if fail_on and ("worse" in verdicts or not verdicts & {"better", "noise"}):
        context.exit(1)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--look-in", type=FOLDER, multiple=True, default=(Path(),), show_default="here",
              help="Folder under which the pieces are looked for.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a tree.")
@click.pass_context
def trace(context: click.Context, path: Path, look_in: tuple[Path, ...], as_json: bool) -> None:
    """What a run, export, cache or report was made from, by digest; exits 1 where that chain breaks."""
    from shared.eval.report.lineage import breaks, describe
    from shared.eval.report.lineage import trace as walk
    from shared.files import to_json

    chain = walk(path, look_in)
    broken = breaks(chain)
    click.echo(to_json({"chain": chain, "broken": broken}) if as_json else describe(chain), nl=not as_json)
    if broken:
        context.exit(1)


def _quieten() -> None:
    """Keep transformers' own bars and deprecation notes out of ours.

    `past_key_values` is the one name that every supported version of transformers knows.
    """
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _write(kind: str, path: Path, result: dict[str, Any]) -> None:
    """Write a result, then track it."""
    from shared import tracking
    from shared.files import write_json
    from shared.process import log

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    log(f"wrote {path}")
    tracking.record_evaluation(kind, path, result)
