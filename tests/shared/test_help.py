"""Every help text, found by walking the command tree."""

import click
import pytest

from shared.cli import codedistill
from shared.options import GroupedCommand
from tests.support.commands import COMMANDS


def test_the_pipelines_commands_are_all_found():
    assert len(COMMANDS) > 25
    assert list(codedistill.list_commands(click.Context(codedistill)))[:3] == ["teacher", "generate", "cache"]


@pytest.mark.parametrize("path", COMMANDS)
def test_a_commands_first_line_fits_and_every_option_has_help(path):
    command, _ = COMMANDS[path]
    first = (command.help or "").strip().split("\n\n")[0]
    summary = " ".join(first.split())
    assert 0 < len(summary) < 45 and summary.endswith("."), summary
    assert "…" not in command.get_short_help_str(limit=80)
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
    if isinstance(command, GroupedCommand):
        named = [name for names in command.groups.values() for name in names]
        assert len(named) == len(set(named))
        assert set(named) <= {parameter.name for parameter in command.params}
    elif not isinstance(command, click.Group):
        assert sum(isinstance(parameter, click.Option) for parameter in command.params) <= 8, (
            "too many to stand in one list"
        )
