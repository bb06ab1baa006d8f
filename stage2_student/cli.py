"""`codedistill student train|sweep|proof|export`."""

import math
import re
from pathlib import Path
from typing import Any

import click


class Weighted(click.ParamType[tuple[Path, float | None]]):
    """`CACHE` or `CACHE:WEIGHT`; a path that exists is never split."""

    name = "CACHE[:WEIGHT]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Path, float | None]:
        """Split at the last `:` where a number follows it."""
        found = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", value)
        if not found or Path(value).exists():
            return Path(value), None
        weight = float(found[2])
        if not 0 < weight < math.inf:
            self.fail(f"the weight of {found[1]!r} must be above 0 and finite, not {found[2]}", param, ctx)
        return Path(found[1]), weight


class BatchTokens(click.ParamType[int | str]):
    """A number of tokens, or `auto`."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Keep `auto`; anything else is a number above 0."""
        if value == "auto":
            return "auto"
        if not re.fullmatch(r"[1-9]\d*", str(value)):
            self.fail(f"{value!r} is neither a number of tokens nor 'auto'", param, ctx)
        return int(value)


def _split_weights(caches: tuple[tuple[Path, float | None], ...]) -> tuple[list[Path], list[float] | None]:
    """Paths and weights; all caches have one or none has."""
    weights = [weight for _, weight in caches if weight is not None]
    if weights and len(weights) < len(caches):
        raise click.UsageError("some caches have a weight and some have none; give all of them one, as CACHE:WEIGHT")
    return [path for path, _ in caches], weights or None


def _open(*paths: Path) -> None:
    """Refuse what is no cache at once: training's libraries take seconds to load."""
    from shared.cache.reader import Cache

    for path in paths:
        Cache(path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def student() -> None:
    """Stage 2: train and export students from a cache."""


@student.command()
@click.option("--cache", "caches", required=True, multiple=True, type=Weighted(), metavar="CACHE[:WEIGHT]",
              help="A logit cache to train on; may be given several times.")  # fmt: skip
@click.option("--validation", type=click.Path(path_type=Path), help="A cache of held-out documents, same teacher.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The run's folder.")
@click.option("--init-from", metavar="DIR", type=click.Path(path_type=Path),
              help="Start from the weights of a run, an export or a like checkpoint.")  # fmt: skip
@click.option("--preset", metavar="NAME", help="The student's size: gpt-125m or tiny.  [default: gpt-125m]")
@click.option("--config", "profile", metavar="F.toml", type=click.Path(path_type=Path), help="A file of overrides.")
@click.option("--batch-tokens", type=BatchTokens(), metavar="N|auto",
              help="Most tokens of a micro-batch, or what memory allows; no step changes.")  # fmt: skip
@click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="One override; may be repeated.")
def train(
    caches: tuple[tuple[Path, float | None], ...],
    validation: Path | None,
    out: Path,
    init_from: Path | None,
    preset: str | None,
    profile: Path | None,
    batch_tokens: int | str | None,
    assignments: tuple[str, ...],
) -> None:
    """Train a student on cached soft labels; needs no teacher and no network.

    --set wins over --config, which wins over the defaults (stage2_student/config.py). Keys are the config's names,
    such as alpha, temperature, block_size, and those of transformers' TrainingArguments, such as learning_rate,
    max_steps. alpha=0 trains the same student on the raw data: same initial weights, data order and steps.
    Any size: hidden_size, intermediate_size, num_hidden_layers and so on override the preset's.

    --init-from takes the weights of a directory with equal sizes and tokenizer (Starcoder2's architecture), not its
    optimizer: training begins anew.

    Several caches must be one teacher's, with equal options. An epoch is every document of every cache once. With
    weights (all or none) it has as many tokens in all, of which each cache gives its weight's share; no document of a
    cache comes again before all of them have.

    Interrupted, the same command continues from the last complete checkpoint.

    \b
    Example:
      codedistill student train --cache artifacts/mbpp-train --out runs/first --preset tiny --set alpha=0.7
      codedistill student train --cache caches/mbpp:0.7 --cache caches/mine:0.3 --out runs/mixed
    """
    from shared.config import parse_assignments, read_toml

    paths, weights = _split_weights(caches)
    _open(*paths, *filter(None, [validation]))
    from stage2_student.config import student_config

    layers = [read_toml(profile)] if profile else []
    if preset:
        layers.append({"preset": preset})
    config = student_config(*layers, parse_assignments(assignments))

    from stage2_student.train import train

    train(config, paths, out, weights=weights, validation_path=validation, init_from=init_from,
          batch_tokens=batch_tokens)  # fmt: skip


@student.command()
@click.option("--cache", "caches", required=True, multiple=True, type=Weighted(), metavar="CACHE[:WEIGHT]",
              help="A logit cache to train on; may be given several times.")  # fmt: skip
@click.option("--validation", type=click.Path(path_type=Path), help="A cache of held-out documents, same teacher.")
@click.option("--grid", required=True, metavar="F.toml", type=click.Path(path_type=Path), help="What to vary.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The sweep's folder.")
@click.option("--init-from", metavar="DIR", type=click.Path(path_type=Path), help="As for `train`, for every member.")
@click.option("--jobs", metavar="N", type=click.IntRange(1), default=1, show_default=True,
              help="Students trained side by side: one GPU each, or a share of the processor's threads.")  # fmt: skip
def sweep(
    caches: tuple[tuple[Path, float | None], ...],
    validation: Path | None,
    grid: Path,
    out: Path,
    init_from: Path | None,
    jobs: int,
) -> None:
    """Train the students of a grid from one cache and compare them.

    The grid is a training config (keys of `train --set`) with a table [grid] of lists, of which every combination is
    one student, or tables [[run]] that describe one more each:

    \b
      preset = "tiny"
      max_steps = 500
      [grid]
      alpha = [0.5, 0.7, 1.0]
      learning_rate = [1e-3, 2e-3]
      [[run]]
      alpha = 0.0
      num_hidden_layers = 6

    All are checked before the first is trained. A student that fails is recorded and the others go on. The same
    command continues: what is finished is kept. At the end sweep.json, sweep.md and sweep.svg rank the students by
    NLL on the validation cache.

    \b
    Example:
      codedistill student sweep --cache caches/train --validation caches/validation --grid grid.toml --out sweeps/first
    """
    from stage2_student.experiments.runner import Sweep

    paths, weights = _split_weights(caches)
    members = Sweep(grid, paths, out, weights=weights, validation_path=validation, init_from=init_from, jobs=jobs)
    click.echo(members.run(), nl=False)


@student.command()
@click.option("--cache", required=True, type=click.Path(path_type=Path), help="The cache to train on.")
@click.option("--validation", required=True, type=click.Path(path_type=Path), help="A cache to choose by.")
@click.option("--test", required=True, type=click.Path(path_type=Path), help="A cache that nothing is chosen by.")
@click.option("--config", "plan", required=True, metavar="F.toml", type=click.Path(path_type=Path),
              help="Arms, learning rates, seeds and the student (stage2_student/configs/proof.toml).")  # fmt: skip
@click.option("--teacher", metavar="DIR", type=click.Path(path_type=Path),
              help="The model that made the caches, for arms of its full distribution.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The proof's folder.")
@click.option("--jobs", metavar="N", type=click.IntRange(1), default=1, show_default=True,
              help="Students trained side by side; they share the processor's threads.")  # fmt: skip
def proof(cache: Path, validation: Path, test: Path, plan: Path, teacher: Path | None, out: Path, jobs: int) -> None:
    """Compare ways to train a student, by paired seeds on a test set.

    Every arm has the same small search over learning rates and epochs, judged on the validation cache. Then each is
    trained with several seeds: a seed has the same initial weights and data order in all arms. Differences of the test
    NLL come with Student's 95 % interval over the seeds.

    The same command continues: what is finished is kept. At the end proof.json, proof.md and proof.svg say what was
    found.

    \b
    Example:
      codedistill student proof --cache caches/train --validation caches/validation --test caches/test \\
        --config stage2_student/configs/proof.toml --teacher artifacts/teachers/demo --out artifacts/proof
    """
    from stage2_student.experiments.proof import prove

    result = prove(plan, cache, validation, test, out, teacher=teacher, jobs=jobs)
    click.echo("\n".join(result["summary"]))


@student.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to make.")
@click.option("--push-to-hub", "repo_id", metavar="OWNER/NAME", help="Upload it, too; needs a token of the Hub.")
@click.option("--private", is_flag=True, help="With --push-to-hub: into a private repository.")
def export(run: Path, out: Path, repo_id: str | None, private: bool) -> None:
    """Export a finished run as a plain transformers directory with a model card.

    AutoModelForCausalLM and every tool that reads Starcoder2 checkpoints load it without custom code. --push-to-hub
    uploads the directory, weights as safetensors alone, and prints the repository's URL; the repository is made where
    there is none.
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
