"""`codedistill eval`: measure teacher and students alike, by directory."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from shared.eval.benchmark_cli import exercises, humaneval, mbpp, sandbox_check, score
from shared.eval.options import DIRECTORY, DTYPE, FILE, FOLDER, TEACHER_CACHE, quieten
from shared.options import GroupedCommand, RecordingGroup, command_line, local_cache

_OUT = click.option("--out", type=FILE, required=True, help="JSON file to write.")


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


@click.group("eval", cls=RecordingGroup)
def evaluate() -> None:
    """Measure teacher and students; report."""


for _command in (humaneval, mbpp, exercises, score, sandbox_check):
    evaluate.add_command(_command)


@evaluate.command()
@click.option("--model", metavar="DIR|ID", required=True, help="Teacher, run or export; or a Hub id.")
@click.option("--cache", "cache_dir", type=click.Path(path_type=Path), required=True,
              help="Cache of held-out documents, same teacher; or its URL.")  # fmt: skip
@local_cache
@click.option("--teacher", metavar="DIR|ID", help="Also run the teacher, for the KL over the whole vocabulary.")
@_OUT
@DTYPE
@click.option("--batch-tokens", type=click.IntRange(1),
              help="Max tokens at once, padding included.  [1024; on a GPU 8192]")  # fmt: skip
def fidelity(model: str, cache_dir: Path, teacher: str | None, out: Path, dtype: str, batch_tokens: int | None) -> None:
    """Score a model on a cache's targets.

    NLL of the text, KL to the teacher, agreement and calibration, with 95 % intervals over documents.
    """
    from shared.checkpoints import locate_model, model_digest
    from shared.eval.inputs import cache_digest, is_up_to_date
    from shared.eval.results import Fidelity
    from shared.machine import has_accelerator

    model_dir = locate_model(model, cache_dir)
    teacher_dir = locate_model(teacher, cache_dir) if teacher else None
    settings = {"dtype": dtype, "batch_tokens": batch_tokens}
    inputs = settings | {
        "model": model_digest(model_dir),
        "teacher": teacher_dir and model_digest(teacher_dir),
        "cache": cache_digest(cache_dir),
    }
    if is_up_to_date(out, Fidelity, inputs):
        return
    quieten()
    from shared.eval.fidelity.measure import evaluate_fidelity

    batch_tokens = batch_tokens or (8_192 if has_accelerator() else 1_024)
    result = evaluate_fidelity(model_dir, cache_dir, dtype=dtype, batch_tokens=batch_tokens, teacher_dir=teacher_dir)
    _write("fidelity", out, result, inputs)
    for key in ("nll_nats", "kl_to_teacher_nats", "top1_agreement", "ece"):
        value, low_high = getattr(result, key), result.ci95[key]
        interval = f" (95 % interval {low_high[0]:.4f} to {low_high[1]:.4f})" if low_high else ""
        click.echo(f"{key} {'unknown' if value is None else format(value, '.4f')}{interval}")


@evaluate.command(
    cls=GroupedCommand,
    groups={"Models": "models cache_dir dtype", "Timing": "prompt_tokens new_tokens repeats"},
)
@click.option("--model", "models", type=Named("DIR|ID"), multiple=True, required=True,
              help="A model and its name in the report; may be repeated.")  # fmt: skip
@TEACHER_CACHE
@DTYPE
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, help="Length of a prompt.")
@click.option("--new-tokens", type=click.IntRange(1), default=32, show_default=True, help="Decode steps after it.")
@click.option("--repeats", type=click.IntRange(1), default=6, show_default=True,
              help="Timed rounds; fewer than 6 give no 95 % interval.")  # fmt: skip
@_OUT
def latency(models: tuple[tuple[str, str], ...], cache_dir: Path | None, out: Path, **options: Any) -> None:
    """Time models beside each other.

    Size, memory, prefill and decode speed at batch 1 and 8, and energy; all models are timed in one process.
    """
    if len(dict(models)) < len(models):
        raise click.UsageError("two models have the same name")
    from shared.checkpoints import locate_model, model_digest
    from shared.eval.inputs import is_up_to_date, timing_place
    from shared.eval.results import Latency

    located = {name: locate_model(model, cache_dir) for name, model in models}
    digests = {name: model_digest(folder) for name, folder in located.items()}
    inputs = options | {"models": digests, "place": timing_place()}
    if is_up_to_date(out, Latency, inputs):
        return
    quieten()
    from shared.eval.speed.latency import measure_latency

    _write("latency", out, measure_latency(located, **options), inputs)


@evaluate.command(
    cls=GroupedCommand,
    groups={
        "Models": "teacher student cache_dir dtype",
        "Decoding": "prompts_file limit new_tokens draft_tokens repeats",
    },
)
@click.option("--teacher", metavar="DIR|ID", required=True, help="Decodes greedily, with and without drafts.")
@click.option("--student", metavar="DIR|ID", required=True, help="Run or export that drafts; same tokenizer.")
@TEACHER_CACHE
@DTYPE
@click.option("--prompts", "prompts_file", type=FILE, help="Rows with `prompt`, .jsonl or .parquet.  [HumanEval's]")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="Only the first prompts.")
@click.option("--new-tokens", type=click.IntRange(1), default=64, show_default=True, help="Max tokens per prompt.")
@click.option("--draft-tokens", type=click.IntRange(1), default=4, show_default=True,
              help="Drafted before each pass of the teacher.")  # fmt: skip
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Timed rounds.")
@_OUT
def draft(teacher: str, student: str, out: Path, cache_dir: Path | None, **options: Any) -> None:
    """Let a student draft for its teacher.

    Speculative decoding: acceptance, speed-up, and a check of every token against plain greedy decoding.
    """
    from shared.checkpoints import locate_model, model_digest
    from shared.eval.inputs import is_up_to_date, timing_place
    from shared.eval.programs.problems import read_prompts
    from shared.eval.results import Draft
    from shared.files import sha256_json

    folders = {"teacher": locate_model(teacher, cache_dir), "student": locate_model(student)}
    prompts = sha256_json(read_prompts(options["prompts_file"], options["limit"]))
    inputs = {key: value for key, value in options.items() if key != "prompts_file"}
    inputs |= {name: model_digest(folder) for name, folder in folders.items()}
    inputs |= {"prompts": prompts, "place": timing_place()}
    if is_up_to_date(out, Draft, inputs):
        return
    quieten()
    from shared.eval.speed.draft import evaluate_draft

    result = evaluate_draft(folders["teacher"], folders["student"], **options)
    _write("draft", out, result, inputs)
    acceptance = "unknown" if result.acceptance_rate is None else f"{result.acceptance_rate:.1%}"
    equal = ", ".join(f"{same.num_equal} of {same.num_prompts} in {dtype}" for dtype, same in result.equality.items())
    click.echo(
        f"acceptance {acceptance}, {result.mean_accepted_length:.2f} drafted tokens kept per pass, "
        f"speed-up {result.speedup:.2f}; prompts with the tokens of plain greedy decoding: {equal}"
    )


@evaluate.command()
@click.option(
    "--eval", "eval_dir", type=DIRECTORY, required=True, help="Results: folders `teacher` and one per student."
)
@click.option("--student", "students", type=Named("RUN"), multiple=True,
              help="A student's run; NAME is its folder in --eval. May be repeated.")  # fmt: skip
@click.option("--cache", "caches", type=DIRECTORY, multiple=True, help="A cache to show; may be repeated.")
@click.option("--proof", "proof_file", type=FILE, help="proof.json, as `student proof` wrote it.")
@click.option("--out", type=FOLDER, required=True, help="Folder for the report.")
def report(
    eval_dir: Path,
    students: tuple[tuple[str, str], ...],
    caches: tuple[Path, ...],
    proof_file: Path | None,
    out: Path,
) -> None:
    """Write one page of all results.

    Teacher and students side by side, as JSON, Markdown and HTML; W&B gets the figures.
    """
    for name, folder in students:
        if not Path(folder).is_dir():
            raise click.UsageError(f"the student {name} has no folder {folder!r}")
    if proof_file and not proof_file.is_file():
        raise click.UsageError(f"there is no {proof_file}")
    from shared.eval.report.report import collect

    runs = {name: Path(folder) for name, folder in students}
    collected = collect(eval_dir, runs, list(caches), proof_file, out)
    if collected.is_up_to_date(out):
        return
    from shared import tracking
    from shared.eval.report.report import write_report
    from shared.files import output_path

    result = write_report(collected, out)
    out = output_path(out)
    config = {"caveats": result["caveats"]}
    with tracking.start(
        "report", name=out.resolve().parent.name, config=config, directory=out.parent, group=eval_dir.resolve().name
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
    """Judge what changed from result A to B.

    A and B are two fidelity, latency, benchmark or report JSON files. They must be of the same documents, problems,
    settings and machine.
    """
    from shared.eval.report.compare import compare_files, comparison_text
    from shared.files import to_json

    result = compare_files(a, b)
    click.echo(to_json(result) if as_json else comparison_text(result), nl=not as_json)
    verdicts = {row["verdict"] for row in result["rows"]}
    if fail_on and ("worse" in verdicts or not verdicts & {"better", "noise"}):
        context.exit(1)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--look-in", type=FOLDER, multiple=True, help="Folder of runs, caches, models or data; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a tree.")
@click.pass_context
def trace(context: click.Context, path: Path, look_in: tuple[Path, ...], as_json: bool) -> None:
    """Verify what a student was made from.

    Follows the records of a run, export, cache or report, and computes each digest again. Exits with 1 if a part is
    altered, missing or not recorded.
    """
    from shared.eval.report.lineage import broken_links, lineage_text, trace_lineage
    from shared.files import to_json

    chain = trace_lineage(path, look_in)
    broken = broken_links(chain)
    click.echo(to_json({"chain": chain, "broken": broken}) if as_json else lineage_text(chain), nl=not as_json)
    if broken:
        context.exit(1)


@click.command()
@click.argument("path", metavar="CACHE", type=click.Path(path_type=Path))
@click.option("--document", "documents", metavar="ID|N", multiple=True,
              help="A document's id or number, from 0; may be repeated.  [the first 12]")  # fmt: skip
@click.option("--student", metavar="RUN", type=DIRECTORY, help="Show this run's or export's rows beside the teacher's.")
@click.option("--html", metavar="OUT.html", type=FILE, help="Write a page instead of lines.")
@local_cache
def show(path: Path, documents: tuple[str, ...], student: Path | None, html: Path | None) -> None:
    """See what the teacher expected.

    Prints the tokens of each document that surprised the teacher most, with what it expected there. With --html, writes
    one file that shows the whole text, coloured by surprise, and the teacher's row at each token; it loads nothing
    from anywhere. With --student, each token also has the student's row and its KL, and the documents of the largest
    KL come first.
    """
    if student:
        quieten()
    from shared.eval.show.page import look_into, render_page, terminal_text
    from shared.files import output_path, write_bytes

    look = look_into(path, documents, student)
    if html is None:
        click.echo(terminal_text(look))
        return
    html = output_path(html)
    html.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(html, render_page(look))
    click.echo(" ".join(filter(None, [f"wrote {html}: {len(look.documents)} documents.", look.left_out_text])))


def _write(kind: str, path: Path, result: Any, inputs: dict[str, Any]) -> None:
    """Write a result with the inputs and the command line that it follows from, then track it."""
    from shared import tracking
    from shared.files import write_json
    from shared.process import log

    recorded = dataclasses.replace(result, inputs=inputs, command=command_line()).to_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, recorded)
    log(f"wrote {path}")
    tracking.record_evaluation(kind, path, recorded)
