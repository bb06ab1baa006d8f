"""Help texts whose options stand in groups."""

from collections.abc import Mapping
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
