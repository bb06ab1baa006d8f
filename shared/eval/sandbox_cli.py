"""`codedistill eval score` and `eval sandbox-check`."""

from collections import Counter
from pathlib import Path
from typing import Any

import click

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("sandbox-check")
def sandbox_check() -> None:
    """Test this machine's sandbox.

    Tries what generated programs must not do; fails where they cannot be scored.
    """
    from shared.errors import SandboxError
    from shared.eval.sandbox.probe import probe_all
    from shared.eval.sandbox.runner import FIX

    best = None
    for isolation, outcomes, reason in probe_all():
        if outcomes:
            click.echo(f"{isolation.value}: {'does not hold' if reason else 'holds'}")
        else:
            click.echo(f"{isolation.value}: not here: {reason}")
        for about, outcome in outcomes.items():
            click.echo(f"  {about}: {outcome}")
        if not reason:
            best = best or isolation
    if best is None:
        raise SandboxError("no sandbox can be had here", fix=FIX)
    click.echo(f"programs are scored behind: {best.value}")


@click.command()
@click.option("--problems", "problems_file", type=_FILE, required=True, help="JSONL: task_id prompt test entry_point.")
@click.option(
    "--completions", "completions_file", type=_FILE, required=True, help="JSONL: task_id and completion, or solution."
)
@click.option("--out", type=_FILE, required=True, help="JSONL: a verdict for each completion's line, in order.")
@click.option("--timeout", "timeout_seconds", type=click.FloatRange(0, min_open=True), default=3.0, show_default=True,
              help="Max wall seconds per program, not counting message time.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1), help="Programs at once.  [one per processor]")
@click.option("--unsafe-no-sandbox", "unsafe", is_flag=True, help="Run programs without isolation if there is none.")
def score(**options: Any) -> None:
    """Judge completions of any tool.

    Runs completions in HumanEval's form, or whole programs (`solution`, as in EvalPlus), and writes their verdicts.
    """
    from shared.eval.programs.score import score_file

    lines = score_file(**options)
    counts = Counter(line["verdict"] for line in lines)
    click.echo(f"{len(lines)} completions: {', '.join(f'{n} {verdict}' for verdict, n in counts.most_common())}")
