"""`codedistill eval score` and `eval sandbox-check`."""

from collections import Counter
from pathlib import Path
from typing import Any

import click

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("sandbox-check")
@click.option("--allow-host-reads", is_flag=True, help="Also accept walls behind which programs can read files.")
def sandbox_check(allow_host_reads: bool) -> None:
    """Test this machine's sandbox.

    Tries what generated programs must not do; fails where they cannot be scored.
    """
    from shared.errors import SandboxError
    from shared.eval.sandbox.probe import CHOICES, WITHOUT_READS, probe
    from shared.eval.sandbox.runner import FIX

    best = None
    for walls in (*CHOICES, WITHOUT_READS):
        try:
            found = probe(walls)
        except SandboxError as error:
            click.echo(f"{walls.name}: not here: {error.got}")
            continue
        open_ways = {about: what for about, what in found.items() if what != "refused"}
        reads = "" if walls.confine_reads else ", but programs can read this machine's files (--allow-host-reads)"
        click.echo(f"{walls.name}: {'does not hold' if open_ways else 'holds'}{reads}")
        for about, what in found.items():
            click.echo(f"  {about}: {what}")
        if best is None and not open_ways and (walls.confine_reads or allow_host_reads):
            best = walls
    if best is None:
        raise SandboxError("no sandbox can be had here", fix=FIX)
    click.echo(f"programs are scored behind: {best.name}")


@click.command()
@click.option("--problems", "problems_file", type=_FILE, required=True, help="JSONL: task_id prompt test entry_point.")
@click.option(
    "--completions", "completions_file", type=_FILE, required=True, help="JSONL: task_id and completion, or solution."
)
@click.option("--out", type=_FILE, required=True, help="JSONL: a verdict for each completion's line, in order.")
@click.option("--timeout", "timeout_seconds", type=click.FloatRange(0, min_open=True), default=3.0, show_default=True,
              help="Wall seconds of one program.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1), help="Programs at once. Default: one per processor.")
@click.option("--allow-host-reads", is_flag=True, help="Run programs even where they can read this machine's files.")
@click.option("--unsafe-no-sandbox", "unsafe", is_flag=True, help="Run programs without walls where none can be had.")
def score(**options: Any) -> None:
    """Judge completions of any tool.

    Runs completions in HumanEval's form, or whole programs (`solution`, as in EvalPlus), and writes their verdicts.
    """
    from shared.eval.programs.score import score_file

    lines = score_file(**options)
    counts = Counter(line["verdict"] for line in lines)
    click.echo(f"{len(lines)} completions: {', '.join(f'{n} {verdict}' for verdict, n in counts.most_common())}")
