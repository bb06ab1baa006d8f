"""Every command of `codedistill`, found by walking the tree."""

import click

from shared.cli import codedistill


def walk(command, context, path=()):
    """All commands below a group, with their paths."""
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            yield from walk(child, click.Context(child, info_name=name, parent=context), (*path, name))
    if path:
        yield path, command, context


COMMANDS = {
    " ".join(path): (command, context) for path, command, context in walk(codedistill, click.Context(codedistill))
}
