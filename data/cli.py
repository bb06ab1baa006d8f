"""`codedistill cache import`."""

from pathlib import Path
from typing import Any

import click


@click.command("import")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--tokenizer", required=True, metavar="DIR", help="The tokenizer that made the token ids.")
@click.option("--teacher-name", required=True, metavar="NAME", help="Who made the logprobs; recorded as declared.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The cache's directory.")
@click.option(
    "--top-k", metavar="K", type=click.IntRange(1, 65_535), help="Max entries per row.  [default: the longest row]"
)
@click.option("--codec", metavar="q|f16", default="q", show_default=True, help="How the entries are encoded.")
@click.option(
    "--filter", "compression", metavar="gzip|zstd", default="gzip", show_default=True, help="Compression of the shards."
)
@click.option(
    "--shard-tokens",
    metavar="N",
    type=click.IntRange(1),
    default=32_768,
    show_default=True,
    help="Approximate tokens per shard.",
)
def import_command(file: Path, out: Path, **options: Any) -> None:
    """Make a cache from recorded logprobs.

    FILE.jsonl[.gz|.zst] or FILE.parquet holds vLLM's prompt_logprobs with prompt_token_ids, SGLang's meta_info, or
    DistillKit's uncompressed rows (input_ids, token_ids, top_values); shared/cache/FORMAT.md, "Importing", lists the
    columns. The cache holds only the temperature 1. If it is interrupted, the same command resumes.
    """
    if not options["teacher_name"].strip():
        raise click.UsageError("--teacher-name is empty: a cache must say who made its labels")
    from data.imports import import_cache
    from shared.cache.info import summary

    import_cache(file, out, **options)
    click.echo(summary(out))
