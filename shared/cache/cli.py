"""`codedistill cache info|verify|repair|merge|slice|attach`; the root command adds `audit` and `import`."""

from pathlib import Path
from typing import Any

import click


@click.group()
def cache() -> None:
    """Inspect, check, mend, join and cut logit caches."""


@cache.command()
@click.argument("path", metavar="CACHE", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def info(path: str, as_json: bool) -> None:
    """Summarise a cache: size, labels, figures, provenance. Works during a build, too."""
    from shared.cache.info import cache_info, summary
    from shared.files import to_json

    click.echo(to_json(cache_info(path)) if as_json else summary(path), nl=not as_json)


@cache.command()
@click.argument("path", metavar="CACHE", type=click.Path())
def verify(path: str) -> None:
    """Check every byte of a cache against its manifest; exit 1 and list the problems if there are any."""
    from shared.cache.verify import verify_cache

    problems = verify_cache(path)
    for problem in problems:
        click.echo(problem)
    if problems:
        click.echo(f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}", err=True)
        raise click.exceptions.Exit(1)
    click.echo(f"{path}: every file is as the manifest says")


@cache.command()
@click.argument("path", metavar="CACHE", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Leave CACHE as it is; write its whole shards here, as a cache."
)
def repair(path: Path, out: Path | None) -> None:
    """Keep what is whole of a damaged cache and name what must be made again.

    Damaged shards are removed, their documents named; the command that made the cache, run again, makes those alone and
    ends with the bytes that the cache had. Options and the manifest's digest are restored on the spot where the rest
    proves them. A whole cache is left as it is.

    Where teacher or data are gone, --out makes a smaller cache of the whole shards, complete in itself.
    """
    from shared.cache.repair import copy_whole_shards, repair_cache

    if out is not None:
        lost = copy_whole_shards(path, out)
        names = ", ".join(map(str, lost)) or "none"
        click.echo(f"{out}: the whole shards of {path}; lost shards: {names}")
        return
    lines = repair_cache(path)
    click.echo("\n".join(lines) or f"{path}: every file is as the manifest says; nothing changed")


@cache.command()
@click.argument("paths", metavar="CACHE CACHE…", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the new cache.")
def merge(paths: tuple[Path, ...], out: Path) -> None:
    """Join caches of one label identity: one teacher, one tokenizer, equal label options.

    Shards are copied byte for byte. A document that several caches hold is taken from the first. Interrupted, the same
    command continues.
    """
    from shared.cache.info import summary
    from shared.cache.merge import merge_caches

    num_duplicates = merge_caches(paths, out)
    click.echo(f"{num_duplicates} documents were in an earlier cache and are kept once")
    click.echo(summary(out))


@cache.command("slice")
@click.argument("path", metavar="CACHE", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the new cache.")
@click.option("--top-k", metavar="K", type=int, help="Most entries of a row; the others join its tail.")
@click.option("--top-p", metavar="P", type=float, help="Rows keep the shortest prefix of this probability at T = 1.")
@click.option("--documents", metavar="N", type=int, help="Keep the first N documents.")
@click.option("--source", metavar="NAME", help="Keep one data set's documents alone.")
@click.option("--codec", metavar="q|f16", help="Encode with another codec.")
@click.option("--filter", "compression", metavar="gzip|zstd", help="Compress with another filter.")
def slice_command(path: Path, out: Path, **options: Any) -> None:
    """Cut a smaller cache out of a larger one.

    Fewer entries or another codec make a label identity of its own, which records what it comes from; fewer documents
    or another filter keep it. Interrupted, the same command continues.
    """
    from shared.cache.info import summary
    from shared.cache.slice import slice_cache

    slice_cache(path, out, **options)
    click.echo(summary(out))


@cache.command()
@click.argument("path", metavar="CACHE", type=click.Path(path_type=Path))
@click.option(
    "--teacher-eval",
    "folder",
    required=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The teacher's results, as `codedistill eval` wrote them.",
)
def attach(path: Path, folder: Path) -> None:
    """Put the teacher's results into a finished cache, as teacher_eval/.

    They travel with it: the machine that trains and measures students needs no teacher for its report. The manifest is
    replaced last; labels and label identity stay as they are.
    """
    from shared.cache.attach import add_files

    found = {file.relative_to(folder): file for file in sorted(folder.rglob("*")) if file.is_file()}
    files = {name.as_posix(): file for name, file in found.items() if name.parts[0] != "wandb"}
    if not files:
        raise click.UsageError(f"there is no file in {folder}")
    add_files(path, {f"teacher_eval/{name}": file.read_bytes() for name, file in files.items()})
    click.echo(f"{path}: {len(files)} files in teacher_eval/")
