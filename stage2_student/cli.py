"""`codedistill student train|sweep|proof|export`."""

import math
import re
from pathlib import Path

import click

from shared.options import GroupedCommand, RecordingGroup, local_cache


def weighted(text: str) -> tuple[Path, float | None]:
    """Read `CACHE` or `CACHE:WEIGHT`, split at the last `:` before a number that is no port; no path that exists."""
    found = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", text)
    if not found or Path(text).exists() or re.fullmatch(r"https?://[^/:]+:\d+", text):
        return Path(text), None
    if not 0 < float(found[2]) < math.inf:
        raise click.BadParameter(f"the weight of {found[1]!r} must be above 0 and finite, not {found[2]}")
    return Path(found[1]), float(found[2])


def batch_tokens(text: str) -> int | str:
    """Read a number of tokens above 0, or `auto`."""
    if text != "auto" and not re.fullmatch(r"[1-9]\d*", text):
        raise click.BadParameter(f"{text!r} is neither a number of tokens nor 'auto'")
    return text if text == "auto" else int(text)


# Options of several commands.
CACHES = click.option("--cache", "caches", required=True, multiple=True, type=weighted, metavar="CACHE[:WEIGHT]",
                      help="A logit cache to train on, or its URL; may be repeated.")  # fmt: skip
VALIDATION = click.option("--validation", type=click.Path(path_type=Path),
                          help="A cache of held-out documents, same teacher, or its URL; scores students.")  # fmt: skip
JOBS = click.option("--jobs", metavar="N", type=click.IntRange(1), default=1, show_default=True,
                    help="Students trained at once: one GPU each, or a share of the processor's threads.")  # fmt: skip


def _split_weights(caches: tuple[tuple[Path, float | None], ...]) -> tuple[list[Path], list[float] | None]:
    """Paths, and weights if the caches have them: all or none."""
    weights = [weight for _, weight in caches if weight is not None]
    if weights and len(weights) < len(caches):
        raise click.UsageError("some caches have a weight and some have none; give all of them one, as CACHE:WEIGHT")
    return [path for path, _ in caches], weights or None


def _open(*paths: Path) -> None:
    """Refuse at once what is not a cache: the libraries for training take seconds to load."""
    from shared.cache.reader import Cache

    for path in paths:
        Cache(path)


@click.group(cls=RecordingGroup, context_settings={"help_option_names": ["-h", "--help"]})
def student() -> None:
    """Stage 2: train and export students."""


@student.command(cls=GroupedCommand, groups={
    "Data": "caches validation teacher_logprobs local_cache local_bytes",
    "Student": "preset init_from init_embedding profile assignments",
    "Hardware": "batch_tokens",
})  # fmt: skip
@CACHES
@VALIDATION
@local_cache
@click.option("--teacher-logprobs", metavar="F.npy", type=click.Path(path_type=Path),
              help="The teacher's full distribution, for loss=dense.")  # fmt: skip
@click.option("--preset", metavar="NAME", help="The student's size: gpt-125m or tiny.  [default: gpt-125m]")
@click.option("--init-from", metavar="DIR", type=click.Path(path_type=Path),
              help="Start from the weights of a run, an export or a compatible checkpoint.")  # fmt: skip
@click.option("--init-embedding", metavar="DIR|ID",
              help="Start from the embedding of this model, such as the teacher, in the student's width.")  # fmt: skip
@click.option("--config", "profile", metavar="F.toml", type=click.Path(path_type=Path), help="TOML file of settings.")
@click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="Such as alpha=0.5; may be repeated.")
@click.option("--batch-tokens", type=batch_tokens, metavar="N|auto",
              help="Max tokens per micro-batch; does not change the effective batch size.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The run's folder.")
def train(
    caches: tuple[tuple[Path, float | None], ...],
    validation: Path | None,
    out: Path,
    init_from: Path | None,
    init_embedding: str | None,
    preset: str | None,
    profile: Path | None,
    batch_tokens: int | str | None,
    teacher_logprobs: Path | None,
    assignments: tuple[str, ...],
) -> None:
    """Train a student on cached soft labels.

    Neither the teacher nor a network is needed, unless a cache is a URL: then its shards are fetched ahead of need.

    --set wins over --config, which wins over the defaults (stage2_student/config.py). Keys are alpha, temperature,
    block_size and the like; those of transformers' TrainingArguments, such as learning_rate and max_steps; and sizes
    that override the preset's, such as hidden_size. alpha=0 trains the cross-entropy baseline: same initial weights,
    data order and number of steps.

    The same command continues an interrupted run from its last complete checkpoint. A finished run is not extended:
    a larger max_steps needs another --out.

    Several caches must have one teacher and equal label options. An epoch is every document of every cache once. With
    weights (for all caches or none) an epoch has as many tokens, taken from the caches in proportion to the weights; a
    cache's documents repeat only after all of them have been used.

    --init-from needs equal sizes, an equal tokenizer and Starcoder2's architecture. The optimizer starts fresh.
    --init-embedding needs an equal tokenizer only.

    \b
    Example:
      codedistill student train --cache artifacts/mbpp-train --out runs/first --preset tiny --set alpha=0.7
      codedistill student train --cache caches/mbpp:0.7 --cache caches/mine:0.3 --out runs/mixed
    """
    from shared.config import parse_assignments, read_toml

    paths, weights = _split_weights(caches)
    _open(*paths, *filter(None, [validation]))
    from stage2_student.request import is_up_to_date, request_digest

    settings = read_toml(profile) if profile else {}
    given = {"preset": preset, "init_embedding": init_embedding}
    settings |= {key: value for key, value in given.items() if value} | parse_assignments(assignments)
    others = {"init_from": init_from, "batch_tokens": batch_tokens, "teacher_logprobs": teacher_logprobs,
              "init_embedding": settings.get("init_embedding")}  # fmt: skip
    request = request_digest(settings, paths, weights, validation, others)
    if is_up_to_date(out, request):
        return
    from stage2_student.config import student_config
    from stage2_student.train import train

    train(student_config(settings), paths, out, weights=weights, validation_path=validation, init_from=init_from,
          batch_tokens=batch_tokens, teacher_logprobs=teacher_logprobs, request=request)  # fmt: skip


@student.command()
@CACHES
@VALIDATION
@local_cache
@click.option("--grid", required=True, metavar="F.toml", type=click.Path(path_type=Path), help="What to vary.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder of all runs.")
@click.option("--init-from", metavar="DIR", type=click.Path(path_type=Path), help="As for `train`, for every run.")
@JOBS
def sweep(
    caches: tuple[tuple[Path, float | None], ...],
    validation: Path | None,
    grid: Path,
    out: Path,
    init_from: Path | None,
    jobs: int,
) -> None:
    """Train and compare the students of a grid.

    The grid is a training config (keys of `train --set`) with any of these tables. Every combination of the lists in
    [grid] is one student. Each [[variant]] repeats the grid with its own settings. Each [[run]] is one more student.

    \b
      preset = "tiny"
      max_steps = 500
      [grid]
      learning_rate = [1e-3, 2e-3]
      seed = [1, 2, 3]
      [[variant]]
      name = "cross-entropy"
      alpha = 0.0
      [[variant]]
      name = "ghost"
      [[run]]
      num_hidden_layers = 6

    All are checked before the first is trained. A student that fails is recorded, and the others are trained. The same
    command continues and keeps finished students. At the end sweep.json, sweep.md and sweep.svg rank the students by
    NLL on the validation cache; settings with several seeds are compared with the first one, seed by seed.

    \b
    Example:
      codedistill student sweep --cache caches/train --validation caches/validation --grid grid.toml --out sweeps/first
    """
    from stage2_student.experiments.runner import Inputs
    from stage2_student.experiments.sweep import sweep

    paths, weights = _split_weights(caches)
    inputs = Inputs(caches=paths, weights=weights, validation=validation, init_from=init_from)
    click.echo(sweep(grid, inputs, out, jobs=jobs), nl=False)


@student.command()
@click.option("--cache", required=True, type=click.Path(path_type=Path), help="The cache to train on.")
@click.option("--validation", required=True, type=click.Path(path_type=Path), help="The cache to choose settings by.")
@click.option("--test", required=True, type=click.Path(path_type=Path),
              help="A held-out test cache, never used for selection.")  # fmt: skip
@click.option("--config", required=True, metavar="F.toml", type=click.Path(path_type=Path),
              help="Variants, grid and seeds (stage2_student/configs/proof.toml).")  # fmt: skip
@click.option("--teacher", metavar="DIR", type=click.Path(path_type=Path),
              help="The model that made the caches, for loss=dense.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The proof's folder.")
@JOBS
def proof(cache: Path, validation: Path, test: Path, config: Path, teacher: Path | None, out: Path, jobs: int) -> None:
    """Compare losses on a test set, seed by seed.

    The config is that of `sweep`, with two or more [[variant]] and a table [confirm] of seeds. Every variant is trained
    with every combination of the grid. Its best settings, by validation NLL, are then trained with each of the seeds; a
    seed has the same initial weights and data order in all variants. Differences of the test NLL come with Student's
    95 % interval over the seeds.

    The same command continues and keeps finished students. At the end proof.json, proof.md and proof.svg report the
    result.

    \b
    Example:
      codedistill student proof --cache caches/train --validation caches/validation --test caches/test \\
        --config stage2_student/configs/proof.toml --teacher artifacts/teachers/demo --out artifacts/proof
    """
    from stage2_student.experiments.proof import prove

    result = prove(config, cache, validation, test, out, teacher=teacher, jobs=jobs)
    click.echo("\n".join(result.summary))


@student.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The new directory.")
@click.option("--push-to-hub", "repo_id", metavar="OWNER/NAME", help="Also upload it; needs a Hub token.")
@click.option("--private", is_flag=True, help="Make the Hub repository private.")
def export(run: Path, out: Path, repo_id: str | None, private: bool) -> None:
    """Export a run as a transformers directory.

    The run must be finished. The directory has a model card; AutoModelForCausalLM and every tool that reads Starcoder2
    checkpoints load it without custom code. --push-to-hub also uploads it, with weights only as safetensors, to a
    repository that is created if needed, and prints its URL.
    """
    from shared.hub import push, require_repository

    if private and repo_id is None:
        raise click.UsageError("--private needs --push-to-hub")
    if repo_id is not None:
        require_repository(repo_id)
    from stage2_student.export import export

    export(run, out)
    click.echo(out)
    if repo_id is not None:
        click.echo(push(out, repo_id, private=private))
