"""`codedistill generate`: text that a model writes, verified, as a data set for `teacher build`."""

import contextlib
from pathlib import Path
from typing import Any

import click

from shared.eval.options import DTYPE, FOLDER, TEACHER_CACHE, quieten
from shared.options import GroupedCommand


@click.command(
    cls=GroupedCommand,
    groups={
        "Model": "model cache_dir dtype style origin",
        "Prompts": "prompts split limit benchmark_prompts",
        "Decoding": "samples temperature top_p seed max_new_tokens batch_size",
        "Kept": "keep per_prompt prefer decontaminate",
        "Sandbox": "timeout_seconds unsafe_no_sandbox",
    },
)
@click.option("--model", metavar="DIR|ID", required=True, help="Who writes: teacher, run or export; or a Hub id.")
@click.option("--prompts", metavar="NAME|FILE", required=True,
              help="mbpp, stdlib, or data files with prompt and, for tests, test and entry_point.")  # fmt: skip
@click.option("--split", metavar="NAME", default="train", show_default=True, help="Split of mbpp and stdlib.")
@click.option("--limit", type=click.IntRange(1), help="Only the first prompts.")
@click.option("--benchmark-prompts", metavar="NAMES",
              help="Also take test problems of humaneval, mbpp:test. Never train on the result.")  # fmt: skip
@click.option("--out", type=FOLDER, required=True, help="Folder for documents.jsonl and result.json.")
@click.option("--samples", type=click.IntRange(1), default=4, show_default=True, help="Completions per prompt.")
@click.option("--temperature", type=float, default=0.8, show_default=True, help="Sampling temperature; 0 is greedy.")
@click.option(
    "--top-p", type=float, default=0.95, show_default=True, help="Nucleus sampling: probability to draw from."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of all samples.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Max tokens written.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Completions at once.")
@click.option("--style", type=click.Choice(["auto", "prompt", "chat"]), default="auto", show_default=True,
              help="How the model is asked; auto: students by the bare prompt, others by chat template.")  # fmt: skip
@click.option("--origin", type=click.Choice(["auto", "teacher", "student"]), default="auto", show_default=True,
              help="Who the documents say wrote them; auto: student for a run or export.")  # fmt: skip
@click.option("--keep", type=click.Choice(["passed", "parsed", "all"]), default="passed", show_default=True,
              help="passed: its prompt's tests, or Python where there are none.")  # fmt: skip
@click.option("--per-prompt", type=click.IntRange(1), help="Keep at most so many per prompt.")
@click.option("--prefer", type=click.Choice(["shortest", "random"]), default="shortest", show_default=True,
              help="Which to keep where there are more.")  # fmt: skip
@click.option("--decontaminate", metavar="NAMES", default="auto", show_default=True,
              help="Leave out text of humaneval,mbpp:test,exercises; auto: of those at hand.")  # fmt: skip
@click.option("--timeout", "timeout_seconds", type=click.FloatRange(0, min_open=True), default=3.0, show_default=True,
              help="Max wall seconds per program.")  # fmt: skip
@DTYPE
@TEACHER_CACHE
@click.option("--unsafe-no-sandbox", is_flag=True, help="Run programs without isolation if there is none.")
def generate(model: str, prompts: str, split: str, limit: int | None, out: Path, **options: Any) -> None:
    """Let a model write verified documents.

    Completes the prompts of a data set, runs what was written against the prompts' own tests in the sandbox, and drops
    duplicates and text that a benchmark has. documents.jsonl is a data set of `teacher build`; every row says who wrote
    it. Re-running an interrupted command continues it.

    \b
    Example:
      codedistill generate --model teachers/demo --prompts mbpp --out written/mbpp
      codedistill teacher build --teacher teachers/demo --dataset written/mbpp/documents.jsonl --out caches/written
    """
    from data.decontaminate import load_index, parse_names
    from data.humaneval import problems_digest
    from shared.checkpoints import locate_model, model_digest, student_record
    from shared.eval.inputs import is_up_to_date
    from shared.eval.programs import write
    from shared.eval.results import Written
    from shared.lock import Lock
    from shared.process import is_main_process, log, world_size
    from shared.tokenizer import recorded_ends

    cache_dir = options.pop("cache_dir")
    model_dir = locate_model(model, cache_dir)
    ends = recorded_ends(cache_dir / "tokenizer") if cache_dir else None
    if options["origin"] == "auto":
        options["origin"] = "student" if student_record(model_dir) else "teacher"
    if options["style"] == "auto" and options["origin"] == "student":
        options["style"] = "prompt"  # its chat template came with the teacher's tokenizer
    names = options.pop("benchmark_prompts")
    allowed = parse_names(names, "benchmark_prompts") if names else []
    benchmarks = load_index(options["decontaminate"], prompts).without(allowed)
    chosen = inputs = None
    if is_main_process():
        chosen = write.read_prompts(prompts, split, limit)
        write.refuse_benchmark_prompts(chosen, load_index("auto", prompts).without(allowed))
        write.require_own_folder(out)
        for name, reason in benchmarks.absent.items():
            log(f"documents are not compared with {name}: {reason}")
        inputs = options | {
            "model": model_digest(model_dir),
            "prompts": [chosen.name, problems_digest(chosen.problems)],
            "ends": ends,
            "benchmarks": benchmarks.digest,
        }
        if is_up_to_date(out / "result.json", Written, inputs):
            inputs = None
            if world_size() == 1:
                return
    quieten()
    from shared.eval.programs.sample import Decoding

    del options["decontaminate"]
    drawn = ("temperature", "top_p", "seed", "max_new_tokens", "batch_size")
    decoding = Decoding(num_samples=options.pop("samples"), **{name: options.pop(name) for name in drawn})
    choice = write.Choice(**{name: options.pop(name) for name in ("keep", "per_prompt", "prefer")}, seed=decoding.seed)
    unsafe = options.pop("unsafe_no_sandbox")
    with contextlib.ExitStack() as held:
        if inputs is not None:
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(Lock(out, "writing documents to this folder"))
        result = write.write_documents(chosen, model_dir, out, inputs=inputs, decoding=decoding, choice=choice,
                                       ends=ends, benchmarks=benchmarks, unsafe=unsafe, **options)  # fmt: skip
    if result:
        from shared import tracking

        tracking.record_evaluation("generate", out, result.to_dict())
