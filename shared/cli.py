"""The root command. Subcommands are imported when called, so `--help` loads neither torch nor transformers."""

import importlib

import click

from shared.runtime import run_cli

# Subcommand → (module, attribute, help). The composition root: the only place that knows every layer.
COMMANDS = {
    "teacher": ("stage1_teacher.cli", "teacher", "Stage 1: capture a frozen teacher's top-k logits into a cache."),
    "cache": ("shared.cache.cli", "cache", "Inspect and check logit caches."),
    "student": ("stage2_student.cli", "student", "Stage 2: train and export students from a cache."),
    "eval": ("shared.eval.cli", "evaluate", "Measure teacher and students; write the report."),
}


class LazyGroup(click.Group):
    """A group whose subcommands live in other modules and are imported only when they run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the pipeline."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module that owns a subcommand."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands from their stored help, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="codedistill")
def codedistill() -> None:
    """Offline knowledge distillation for code models.

    Stage 1 runs a large teacher once and caches its top-k logits; stage 2 trains any number of students from that cache
    on another machine. Every command answers to --help.
    """


def main() -> None:
    """Entry point of the `codedistill` command."""
    run_cli(codedistill)
