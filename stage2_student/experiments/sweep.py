"""`student sweep`: the runs of an experiment, ranked; where settings have several seeds, compared too."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from shared.errors import require
from shared.eval.results import Comparison
from shared.files import write_bytes, write_json
from shared.process import log
from shared.records import to_dict
from stage2_student.experiments.grid import Experiment, read_experiment
from stage2_student.experiments.report import comparison_table, rank_rows, run_plot, run_table
from stage2_student.experiments.runner import Inputs, Row, Runner, locked
from stage2_student.experiments.statistics import compare_settings, figures_of

RESULT = "sweep.json"


def sweep(grid: Path, inputs: Inputs, out: Path, *, jobs: int = 1) -> str:
    """Train the runs of an experiment that are not finished, compare all, and write `sweep.{json,md,svg}`.

    Args:
        grid: the experiment (see `read_experiment`).
        inputs: what the runs are trained on; their validation cache is what they are scored on.
        out: the folder of all runs.
        jobs: runs trained at once (see `Runner`).

    Returns:
        The tables.

    Raises:
        ConfigError: a run is refused; nothing has been trained or written then.
        ResumeError: another process works in the folder.
        DistillError: runs failed; the others were trained and compared.
        Terminated, KeyboardInterrupt: SIGTERM or Ctrl-C came; the processes were stopped, each with a checkpoint.
    """
    experiment = read_experiment(grid)
    require(not experiment.confirm.seeds, "[confirm] belongs to `student proof`", where=grid, fix="[grid] seed = [...]")
    runner = Runner(runs=experiment.runs(), out=out, inputs=inputs, jobs=jobs, scored_on=inputs.validation,
                    group=out.resolve().name, on_change=lambda rows: _write(experiment, rows, out))  # fmt: skip
    if inputs.validation is None:
        log("no --validation cache is given: students are trained, but neither scored nor ranked")
    with locked(out):
        runner.train()
        text = _write(experiment, runner.rows, out)
    if any(row.state != "finished" for row in runner.rows):
        log(text)
    runner.require_finished()
    return text


def _write(experiment: Experiment, rows: Sequence[Row], out: Path) -> str:
    comparisons = _compare(experiment, rows)
    rows = rank_rows(rows)
    write_json(out / RESULT, {
        "format": "codedistill-sweep",
        "version": 1,
        "runs": [dataclasses.asdict(row) for row in rows],
        "comparisons": [to_dict(comparison) for comparison in comparisons],
    })  # fmt: skip
    text = run_table(rows)
    if comparisons:
        text += f"\nPaired over seeds, setting − versus, nats per target:\n\n{comparison_table(comparisons)}"
    write_bytes(out / "sweep.md", f"# {out.resolve().name}\n\n{text}".encode())
    if plot := run_plot(rows):
        write_bytes(out / "sweep.svg", plot.svg())
    return text


def _compare(experiment: Experiment, rows: Sequence[Row]) -> list[Comparison]:
    """Settings that share seeds: each with the first one, and a variant with those it names, at equal other values."""
    named = {variant.name: variant.versus for variant in experiment.variant}
    versus: dict[str, list[str]] = {}
    for row in rows:
        variant = row.swept.get("variant", "")
        versus[row.setting] = [other + row.setting.removeprefix(variant) for other in named.get(variant, ())]
    return compare_settings(figures_of(rows, lambda row: row.setting), versus)
