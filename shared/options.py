"""Help texts whose options stand in groups, and the command line that is recorded in results."""

import os
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import click


class GroupedCommand(click.Command):
    """A command whose help lists its options under headings.

    Args:
        groups: parameter names, separated by spaces, by heading; all others stand under "Options" at the end.
    """

    def __init__(self, *args: Any, groups: Mapping[str, str], **options: Any) -> None:
        super().__init__(*args, **options)
        self.groups = {heading: names.split() for heading, names in groups.items()}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section a group, in the order given."""
        grouped = {name for names in self.groups.values() for name in names}
        others = [parameter.name or "" for parameter in self.get_params(ctx) if parameter.name not in grouped]
        records = {parameter.name: parameter.get_help_record(ctx) for parameter in self.get_params(ctx)}
        for heading, names in [*self.groups.items(), ("Options", others)]:
            if rows := [record for name in names if (record := records[name])]:
                with formatter.section(heading):
                    formatter.write_dl(rows)


def _set_environment(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def keep(_context: click.Context, _parameter: click.Parameter, value: Any) -> None:
        if value is not None:
            os.environ[name] = str(value)

    return keep


def local_cache(command: Any) -> Any:
    """Options on where caches that lie elsewhere are kept; the environment hands them to every process of the work."""
    folder = click.option(
        "--local-cache", metavar="DIR", type=click.Path(file_okay=False), expose_value=False,
        callback=_set_environment("CODEDISTILL_LOCAL_CACHE"),
        help="Where files of a cache at a URL are kept.  [default: ~/.cache/codedistill/caches]",
    )  # fmt: skip
    limit = click.option(
        "--local-bytes", metavar="N", type=click.IntRange(1), expose_value=False,
        callback=_set_environment("CODEDISTILL_LOCAL_BYTES"),
        help="Max bytes of that folder.  [default: 50 GiB]",
    )  # fmt: skip
    return folder(limit(command))


_COMMAND_LINE = "shared.options.command_line"


class RecordingGroup(click.Group):
    """A group that lists its commands as they are declared, and remembers its command line for `command_line`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as any group does; the outermost group's words are kept, however Python was started."""
        name = self.name or ""
        ctx.meta.setdefault(_COMMAND_LINE, [*dict.fromkeys(("codedistill", name)), *args])
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of the pipeline, in which they are declared."""
        return list(self.commands)


def command_line() -> str:
    """The command line that is running, quoted for a shell; empty where none is, as in a call from Python."""
    context = click.get_current_context(silent=True)
    return shlex.join(context.meta.get(_COMMAND_LINE, [])) if context else ""
