"""`codedistill cache info|verify|attach`."""

from pathlib import Path

import click


@click.group()
def cache() -> None:
    """Inspect and check logit caches."""


@cache.command()
@click.argument("path", metavar="CACHE", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def info(path: str, as_json: bool) -> None:
    """Summarise a cache: size, labels, figures, provenance. Works during a build, too."""
    from shared.cache.info import cache_info, summary
    from shared.runtime import to_json

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
    from shared.cache.writer import add_files

    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    if not files:
        raise click.UsageError(f"there is no file in {folder}")
    add_files(path, {f"teacher_eval/{name}": file.read_bytes() for name, file in files.items()})
    click.echo(f"{path}: {len(files)} files in teacher_eval/")
