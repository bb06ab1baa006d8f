"""`codedistill eval`: measure teacher and students alike, by directory."""

from pathlib import Path
from typing import Any

import click

DIRECTORY = click.Path(path_type=Path, exists=True, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
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


@evaluate.command()
@click.option("--model", metavar="DIR|ID", required=True, help="Teacher, run or export; or a Hub id.")
@click.option("--cache", "cache_dir", type=DIRECTORY, required=True, help="Cache of held-out documents.")
@click.option("--out", type=FILE, required=True, help="JSON file to write.")
@click.option("--dtype", type=DTYPE, default="auto", show_default=True, help="auto: what the model's config says.")
@click.option("--batch-tokens", type=click.IntRange(1), default=1024, show_default=True,
              help="At once, padding included; the default is stage 1's.")  # fmt: skip
def fidelity(model: str, cache_dir: Path, out: Path, dtype: str, batch_tokens: int) -> None:
    """NLL, KL to the teacher and top-1 agreement over a cache's targets."""
    _quieten()
    from shared.eval.fidelity import evaluate_fidelity
    from shared.eval.models import locate_model

    model_dir = locate_model(model, cache_dir)
    result = evaluate_fidelity(model_dir, cache_dir, dtype=dtype, batch_tokens=batch_tokens)
    _write(out, result)
    keys = ("nll_nats", "kl_to_teacher_nats", "top1_agreement")
    click.echo(", ".join(f"{key} {'unknown' if result[key] is None else format(result[key], '.4f')}" for key in keys))


@evaluate.command()
@click.option(
    "--model", "models", type=Named("DIR|ID"), multiple=True, required=True, help="May be given several times."
)
@click.option("--out", type=FILE, required=True, help="JSON file to write.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--new-tokens", type=click.IntRange(1), default=32, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
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
    """Size, prefill latency and decode speed, all models in one process."""
    if len(dict(models)) < len(models):
        raise click.UsageError("two models have the same name")
    _quieten()
    from shared.eval.latency import measure_latency
    from shared.eval.models import locate_model

    located = {name: locate_model(model, cache_dir) for name, model in models}

    _write(
        out,
        measure_latency(located, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats, dtype=dtype),
    )


@evaluate.command()
@click.option("--model", metavar="DIR|ID", required=True, help="Teacher, run or export; or a Hub id.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the results.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=192, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--limit", type=click.IntRange(1), help="Only the first problems.")
@click.option("--problems", "problems_file", type=FILE, help="HumanEval's problems.jsonl, where nothing else has them.")
@click.option("--timeout", "timeout_seconds", type=click.FloatRange(0, min_open=True), default=3.0, show_default=True,
              help="Wall seconds of one program.")  # fmt: skip
@click.option("--dtype", type=DTYPE, default="auto", show_default=True, help="auto: what the model's config says.")
@click.option("--cache", "cache_dir", type=DIRECTORY, help=TEACHER_OF)
def humaneval(
    model: str,
    out: Path,
    max_new_tokens: int,
    batch_size: int,
    limit: int | None,
    problems_file: Path | None,
    timeout_seconds: float,
    dtype: str,
    cache_dir: Path | None,
) -> None:
    """HumanEval pass@1, greedy. Runs generated programs in limited subprocesses; see `shared/eval/sandbox`."""
    _quieten()
    from shared.eval.humaneval import evaluate_humaneval
    from shared.eval.models import locate_model

    evaluate_humaneval(
        locate_model(model, cache_dir),
        out,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        limit=limit,
        timeout_seconds=timeout_seconds,
        dtype=dtype,
        problems_file=problems_file,
    )


@evaluate.command()
@click.option("--eval", "eval_dir", type=DIRECTORY, required=True, help="Folder of results, one subfolder per model.")
@click.option("--student", "students", type=Named("RUN"), multiple=True, help="A student's run folder.")
@click.option("--cache", "caches", type=DIRECTORY, multiple=True, help="A cache whose statistics are shown.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the report.")
def report(eval_dir: Path, students: tuple[tuple[str, str], ...], caches: tuple[Path, ...], out: Path) -> None:
    """One page of teacher and students side by side, as JSON, Markdown and HTML; its figures go to W&B too."""
    for name, folder in students:
        if not Path(folder).is_dir():
            raise click.UsageError(f"the student {name} has no folder {folder!r}")
    from shared import tracking
    from shared.eval.report import build_report

    result = build_report(eval_dir, {name: Path(folder) for name, folder in students}, list(caches), out)
    with tracking.start(
        "report", name=out.parent.name, config={"caveats": result["caveats"]}, directory=out.parent
    ) as run:
        for name, figures in result["models"].items():
            figures |= {f"humaneval/{key}": value for key, value in figures["humaneval"].items()}
            run.summary({f"{name}/{key}": v for key, v in figures.items() if isinstance(v, int | float)})
    for line in (*result["headline"], f"wrote {out / 'report.html'}, report.md and report.json"):
        click.echo(line)


def _quieten() -> None:
    """Keep transformers' own bars and deprecation notes out of ours.

    `past_key_values` is the one name that every supported version of transformers knows.
    """
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _write(path: Path, result: dict[str, Any]) -> None:
    from shared.runtime import log, write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    log(f"wrote {path}")
