"""`codedistill cache info|verify`."""

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
