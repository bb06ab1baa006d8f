"""The root command. Subcommands are imported when called, so `--help` loads neither torch nor transformers."""

import importlib
from typing import Any

import click

from shared.options import RecordingGroup

Commands = dict[str, tuple[str, str, str]]

# Subcommand → (module, attribute, help). The composition root: the only place that knows every layer.
COMMANDS: Commands = {
    "teacher": ("stage1_teacher.cli", "teacher", "Stage 1: label documents, write caches."),
    "generate": ("shared.eval.generate_cli", "generate", "Let a model write verified documents."),
    "cache": ("shared.cache.cli", "cache", "Inspect, verify and edit logit caches."),
    "student": ("stage2_student.cli", "student", "Stage 2: train and export students."),
    "eval": ("shared.eval.cli", "evaluate", "Measure models and write the report."),
    "trace": ("shared.eval.cli", "trace", "Follow a student back to its teacher."),
}
# What a group takes from layers above its own.
MOUNTED: dict[str, Commands] = {
    "cache": {
        "show": ("shared.eval.cli", "show", "See what the teacher expected."),
        "audit": ("stage1_teacher.cli", "audit", "Compare a cache with its teacher."),
        "import": ("data.cli", "import_command", "Make a cache from recorded logprobs."),
    }
}


class LazyGroup(RecordingGroup):
    """A group some of whose subcommands live in other modules and are imported only when they run.

    Args:
        lazy: module, attribute and help by name, after the group's own commands in this order.
    """

    def __init__(self, *args: Any, lazy: Commands, **options: Any) -> None:
        super().__init__(*args, **options)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The group's own commands, then the others in the order of the pipeline."""
        return [*self.commands, *self.lazy]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module that owns a subcommand."""
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        module, attribute, _ = self.lazy[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        if isinstance(command, click.Group) and cmd_name in MOUNTED:
            lazy, help_text = MOUNTED[cmd_name], command.help
            return LazyGroup(cmd_name, commands=command.commands, help=help_text, lazy=lazy)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands from their stored help, importing none."""
        own = [(name, command.get_short_help_str(limit=80)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(own + [(name, text) for name, (_, _, text) in self.lazy.items()])


@click.command(cls=LazyGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="codedistill")
def codedistill() -> None:
    """Offline knowledge distillation for code models.

    Stage 1 runs a large teacher once and caches its top-k logits; stage 2 trains any number of students from that cache
    on another machine. Every command answers to --help.
    """
