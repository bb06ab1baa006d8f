"""`codedistill cache`: all but `show`, `audit` and `import`, which the root command adds from layers above."""

from pathlib import Path
from typing import Any

import click

from shared.options import local_cache


def on_this_machine(_ctx: click.Context, _param: click.Parameter, place: Any) -> Any:
    """The path of a cache, or the paths of several, for a command that reads none from elsewhere."""
    if isinstance(place, tuple):
        return tuple(on_this_machine(_ctx, _param, one) for one in place)
    from shared.cache.remote import local_path
    from shared.errors import ConfigError

    path = local_path(place)
    if path is None:
        what, fix = "this command needs a cache on this machine", f"codedistill cache pull {place} DIR"
        raise ConfigError(what, where=place, fix=fix)
    return path


CACHE_HERE = click.argument("path", metavar="CACHE", type=click.Path(), callback=on_this_machine)


@click.group()
def cache() -> None:
    """Inspect, verify and edit logit caches."""


@cache.command()
@click.argument("path", metavar="CACHE", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@local_cache
def info(path: str, as_json: bool) -> None:
    """Show what a cache holds.

    Size, labels, figures and provenance. It also works during a build. CACHE may be a URL: only the manifest is read.
    """
    from shared.cache.info import cache_info, summary
    from shared.files import to_json

    click.echo(to_json(cache_info(path)) if as_json else summary(path), nl=not as_json)


@cache.command()
@click.argument("path", metavar="CACHE", type=click.Path())
@click.option("--strict", is_flag=True, help="Also refuse stray files such as .DS_Store and .gitattributes.")
@local_cache
def verify(path: str, strict: bool) -> None:
    """Check every byte against the manifest.

    Lists the problems, and then exits with 1. Files that the Hub's client, macOS or a network file system put beside
    the cache are named and do no harm. CACHE may be a URL: every byte is read there, and shards are not kept.
    """
    from shared.cache.directory import shown
    from shared.cache.remote import local_path
    from shared.cache.verify import side_files, verify_cache

    problems = verify_cache(path, strict=strict)
    for problem in problems:
        click.echo(problem)
    if problems:
        click.echo(f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}", err=True)
        raise click.exceptions.Exit(1)
    here = local_path(path)
    for name in side_files(here) if here else ():
        click.echo(f"{shown(name)}: not of the cache; left by a transport")
    click.echo(f"{path}: every file is as the manifest says")


@cache.command()
@CACHE_HERE
@click.argument("url")
@click.option("--private", is_flag=True, help="Make the Hub data set private.")
def push(path: Path, url: str, private: bool) -> None:
    """Upload a cache to a URL.

    URL is hf://datasets/OWNER/NAME[@BRANCH], s3://…, gs://… or file:///…. Files that are there with the right SHA-256
    are skipped, and the manifest goes last: a half-pushed cache is never taken for a whole one. After an interruption
    the same command continues. A data set on the Hub gets a card with the cache's figures.
    """
    from shared.cache.push import push_cache

    click.echo(push_cache(path, url, private=private))


@cache.command()
@click.argument("url")
@click.argument("out", metavar="DIR", type=click.Path(path_type=Path))
def pull(url: str, out: Path) -> None:
    """Download a cache from a URL.

    Every byte is checked, and the manifest is written last. After an interruption the same command continues. Training,
    evaluation, `info`, `verify` and `show` also take the URL itself.
    """
    from shared.cache.info import summary
    from shared.cache.pull import pull_cache

    pull_cache(url, out)
    click.echo(summary(out))


@cache.command()
@CACHE_HERE
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write the intact shards here, as a cache, and leave CACHE alone."
)
def repair(path: Path, out: Path | None) -> None:
    """Keep the intact shards of a damaged cache.

    Removes damaged shards and names their documents. Run the command that built the cache again: it makes only those,
    and ends with the same bytes. Files that the others prove are restored. A whole cache stays as it is.

    Where teacher or data are gone, --out makes a smaller, complete cache of the intact shards.
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
@click.argument("paths", metavar="CACHE CACHE…", nargs=-1, required=True, type=click.Path(), callback=on_this_machine)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the new cache.")
def merge(paths: tuple[Path, ...], out: Path) -> None:
    """Join caches of one teacher.

    Teacher, tokenizer and label options must be equal. Shards are linked where the file system can, else copied. A
    document that several caches hold is taken from the first; parts of one build are put in order, and lose none. After
    an interruption the same command continues.
    """
    from shared.cache.info import summary
    from shared.cache.transform import merge_caches

    num_duplicates = merge_caches(paths, out)
    click.echo(f"{num_duplicates} documents were in an earlier cache and are kept once")
    click.echo(summary(out))


@cache.command("slice")
@CACHE_HERE
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the new cache.")
@click.option("--top-k", metavar="K", type=int, help="Max entries per row; the others join its tail.")
@click.option("--top-p", metavar="P", type=float, help="Keep the fewest entries that cover this probability at T = 1.")
@click.option("--documents", metavar="N", type=int, help="Keep the first N documents.")
@click.option("--source", metavar="NAME", help="Keep only the documents of this data set, as `cache info` names it.")
@click.option("--codec", metavar="q|f16", help="Encode with another codec.")
@click.option("--filter", metavar="gzip|zstd", help="Compress with another filter.")
def slice_command(path: Path, out: Path, **options: Any) -> None:
    """Cut a smaller cache out of a larger one.

    Fewer entries or another codec make a new label identity, which records its origin; fewer documents or another
    filter keep the old one. After an interruption the same command continues.
    """
    from shared.cache.info import summary
    from shared.cache.transform import slice_cache

    slice_cache(path, out, **options)
    click.echo(summary(out))


@cache.command()
@CACHE_HERE
@click.option(
    "--teacher-eval",
    "folder",
    required=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The teacher's results, as `codedistill eval` wrote them.",
)
def attach(path: Path, folder: Path) -> None:
    """Store the teacher's results in a cache.

    They go to teacher_eval/ and travel with the cache, so that the student's machine can report them. The manifest is
    replaced last; labels and label identity do not change.
    """
    from shared.cache.attach import add_files, find_results

    files = find_results(folder)
    add_files(path, {f"teacher_eval/{name}": file.read_bytes() for name, file in files.items()})
    click.echo(f"{path}: {len(files)} files in teacher_eval/")
