"""`codedistill student train|export`."""

from pathlib import Path

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def student() -> None:
    """Stage 2: train and export students from a cache."""


@student.command()
@click.option("--cache", "caches", required=True, multiple=True, type=click.Path(path_type=Path),
              help="The logit cache to train on; one for now.")  # fmt: skip
@click.option("--validation", type=click.Path(path_type=Path), help="A cache of held-out documents, same teacher.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The run's folder.")
@click.option("--preset", metavar="NAME", help="The student's size: gpt-125m or tiny.  [default: gpt-125m]")
@click.option("--config", "profile", metavar="F.toml", type=click.Path(path_type=Path), help="A file of overrides.")
@click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="One override; may be repeated.")
def train(
    caches: tuple[Path, ...],
    validation: Path | None,
    out: Path,
    preset: str | None,
    profile: Path | None,
    assignments: tuple[str, ...],
) -> None:
    """Train a student on cached soft labels; needs no teacher and no network.

    --set wins over --config, which wins over the defaults (stage2_student/config.py). Keys are the config's names,
    such as alpha, temperature, block_size, and those of transformers' TrainingArguments, such as learning_rate,
    max_steps. alpha=0 trains the same student on the raw data: same initial weights, data order and steps.

    Interrupted, the same command continues from the last complete checkpoint.

    \b
    Example:
      codedistill student train --cache artifacts/mbpp-train --out runs/first --preset tiny --set alpha=0.7
    """
    from shared.config import parse_assignments, read_toml
    from stage2_student.config import student_config
    from stage2_student.train import train

    if len(caches) > 1:
        raise click.UsageError("a run trains on one cache for now; --cache was given several times")
    layers = [read_toml(profile)] if profile else []
    if preset:
        layers.append({"preset": preset})
    train(student_config(*layers, parse_assignments(assignments)), caches[0], out, validation_path=validation)


@student.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to make.")
def export(run: Path, out: Path) -> None:
    """Export a finished run as a plain transformers directory with a model card.

    AutoModelForCausalLM and every tool that reads Starcoder2 checkpoints load it without custom code.
    """
    from stage2_student.export import export

    export(run, out)
    click.echo(out)
