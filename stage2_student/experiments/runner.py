"""Trains many students, each by a `student train` process of its own, and scores them alike."""

import contextlib
import ctypes
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shared.cache.reader import Cache
from shared.errors import ConfigError, DistillError, require
from shared.eval.fidelity.measure import evaluate_fidelity
from shared.eval.inputs import cache_digest, current_result
from shared.eval.results import Fidelity
from shared.files import read_json, read_json_lines, write_json
from shared.lock import STALE_SECONDS, Lock, is_locked
from shared.process import Terminated, log, own_command, world_size
from stage2_student.checkpoint import checkpoints
from stage2_student.experiments.dense import write_dense
from stage2_student.experiments.grid import Run, to_toml
from stage2_student.train import check

FIGURES = ("nll_nats", "kl_to_teacher_nats")
SCORING: dict[str, Any] = {"dtype": "float32", "batch_tokens": 2048}
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What all runs of an experiment share: arguments of `train`.

    Attributes:
        caches, weights, validation, init_from: as `train` has them.
        teacher: the model that made the caches, for runs with loss=dense.
        teacher_logprobs: the file that holds its full distribution while such runs are trained.
    """

    caches: Sequence[Path]
    weights: Sequence[float] | None = None
    validation: Path | None = None
    init_from: Path | None = None
    teacher: Path | None = None
    teacher_logprobs: Path | None = None

    def options(self, run: Run) -> list[str]:
        """The options of `student train`."""
        suffixes = [f":{weight}" for weight in self.weights] if self.weights else [""] * len(self.caches)
        options = [f"--cache={path}{suffix}" for path, suffix in zip(self.caches, suffixes, strict=True)]
        options += [f"--validation={self.validation}"] if self.validation else []
        options += [f"--init-from={self.init_from}"] if self.init_from else []
        options += [f"--teacher-logprobs={self.teacher_logprobs}"] if run.config.loss == "dense" else []
        return options + [f"--set={key}={to_toml(value)}" for key, value in run.settings.items()]


@dataclass(kw_only=True, slots=True)
class Row:
    """What an experiment's result says of a run.

    Attributes:
        name, setting, seed, swept: the run's.
        state: `waiting`, `finished` or `failed`, with its `error`.
        nll_nats, kl_to_teacher_nats: per target, as `eval fidelity` measures them in float32; None for a reason in
            `reasons`.
        scored_on_sha256: digest of the cache that it was scored on.
        validation_nll_nats: of each evaluation in training; `best_epoch` is the number of the best, 0 without any.
        parameters, steps, seconds, weights_sha256, initial_weights_sha256, config, data: see `run.json`.
    """

    name: str
    setting: str
    seed: int
    swept: dict[str, Any]
    state: str = "waiting"
    error: str | None = None
    nll_nats: float | None = None
    kl_to_teacher_nats: float | None = None
    reasons: dict[str, str] = field(default_factory=lambda: dict.fromkeys(FIGURES, "not trained yet"))
    scored_on_sha256: str | None = None
    validation_nll_nats: list[float] = field(default_factory=list)
    best_epoch: int = 0
    parameters: int | None = None
    steps: int | None = None
    seconds: float = 0.0
    weights_sha256: str | None = None
    initial_weights_sha256: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


class _Job(NamedTuple):
    run: Run
    process: subprocess.Popen[bytes]
    log_file: Path
    log_start: int  # where this process's text begins in a log that earlier processes share
    started: float


@dataclass(kw_only=True, slots=True)
class Runner:
    """Runs in one folder: of each `<name>/`, `<name>.log` and, where it was scored, `<name>.fidelity.json`.

    Args:
        runs: what to train.
        out: the folder.
        inputs: what they are trained on.
        jobs: processes at once. Each has one GPU, in turn; without GPUs they share the processor's threads.
        scored_on: the cache that finished students are scored on.
        group: the runs' group in W&B.
        keep_checkpoints: whether those of finished runs stay.
        on_change: called with the rows when one has changed.

    Attributes:
        rows: one for each run, in order.

    Raises:
        ConfigError: a run does not fit the caches, or its folder holds another run. Nothing has been written then.
    """

    runs: Sequence[Run]
    out: Path
    inputs: Inputs
    jobs: int = 1
    scored_on: Path | None = None
    group: str
    keep_checkpoints: bool = True
    on_change: Callable[[Sequence[Row]], object] = lambda rows: None
    rows: list[Row] = field(init=False)

    def __post_init__(self) -> None:
        require(world_size() == 1, "an experiment starts its own processes", fix="run it without torchrun, with --jobs")
        self.rows = [self._row(run, is_finished=self._check(run)) for run in self.runs]

    def _check(self, run: Run) -> bool:
        """Hold a run against the caches and its folder; whether it is finished."""
        inputs, folder = self.inputs, self.out / run.name
        require(run.config.loss != "dense" or inputs.teacher, "loss=dense needs the teacher's full distribution",
                where=run.name, fix="`student proof --teacher DIR`")  # fmt: skip
        try:
            task = check(run.config, inputs.caches, folder, inputs.weights, inputs.validation, inputs.init_from)
        except DistillError as error:
            raise ConfigError(f"a run is refused: {error}", where=run.name) from error
        return task.is_done(folder)

    def train(self) -> None:
        """Train what is not finished, and score what is. A run that fails does not stop the others.

        Raises:
            CacheMismatchError: the teacher is not that of the caches.
            Terminated, KeyboardInterrupt: SIGTERM or Ctrl-C came. The processes were stopped, each with a checkpoint.
        """
        self._score()
        waiting = [run for run, row in zip(self.runs, self.rows, strict=True) if row.state != "finished"]
        inputs = self.inputs
        if inputs.teacher and inputs.teacher_logprobs and any(run.config.loss == "dense" for run in waiting):
            write_dense(inputs.teacher, Cache(inputs.caches[0]), inputs.teacher_logprobs)
        self._train(waiting)
        self._score()

    def _train(self, waiting: list[Run]) -> None:
        torch.cuda.empty_cache()  # the teacher and the scored students were on the runs' first GPU
        total, start = len(waiting), time.monotonic()
        log(f"{self.out}: {len(self.runs) - total} of {len(self.runs)} runs are finished")
        running: dict[int, _Job] = {}  # by slot
        try:
            with _signals() as received:
                self._wait_for_orphans(waiting, received)
                while (waiting or running) and not received:
                    for slot in range(self.jobs):
                        if waiting and slot not in running:
                            running[slot] = self._begin(waiting.pop(0), slot)
                    time.sleep(0.1)
                    for slot, job in list(running.items()):
                        if job.process.poll() is not None:
                            self._end(running.pop(slot))
                            ended = total - len(waiting) - len(running)
                            minutes = (time.monotonic() - start) / ended * (total - ended) / 60
                            log(f"{ended} of {total} runs have ended, about {minutes:.0f} minutes left")
            if received:
                raise KeyboardInterrupt if received[0] == signal.SIGINT else Terminated
        finally:
            _stop([job.process for job in running.values()])

    def _score(self) -> None:
        """Measure every finished student alike, whatever loss it was trained with."""
        for row in self.rows:
            if self.scored_on is None or row.state != "finished" or row.scored_on_sha256:
                continue
            file = self.out / f"{row.name}.fidelity.json"
            inputs = SCORING | {"model": row.weights_sha256, "cache": cache_digest(self.scored_on)}
            result = current_result(file, Fidelity, inputs)
            if result is None:
                measured = evaluate_fidelity(self.out / row.name, self.scored_on, **SCORING)
                result = dataclasses.replace(measured, inputs=inputs)
                write_json(file, result.to_dict())
            row.nll_nats, row.kl_to_teacher_nats = result.nll_nats, result.kl_to_teacher_nats
            row.reasons = {name: result.reasons[name] for name in FIGURES if name in result.reasons}
            row.scored_on_sha256 = result.cache.digest
            self.on_change(self.rows)

    def require_finished(self) -> None:
        """Raise `DistillError` naming the runs that failed, and why."""
        failed = [row for row in self.rows if row.state != "finished"]
        require(
            not failed,
            f"{len(failed)} of {len(self.rows)} runs are not finished",
            error=DistillError,
            where=self.out,
            got="; ".join(f"{row.name}: {row.error} (see {row.name}.log)" for row in failed),
            fix="the same command tries only these again",
        )

    def _wait_for_orphans(self, runs: Sequence[Run], received: Sequence[int]) -> None:
        """Let the processes of a killed experiment, which stop by themselves, save their last checkpoints."""
        deadline = time.monotonic() + STALE_SECONDS
        for run in runs:
            while is_locked(self.out / run.name) and time.monotonic() < deadline and not received:
                time.sleep(0.2)

    def _begin(self, run: Run, slot: int) -> _Job:
        log_file = self.out / f"{run.name}.log"
        log(f"{run.name}: training; log: {log_file}")
        command = own_command("student", "train", f"--out={self.out / run.name}")
        self.out.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab") as file:
            start = file.tell()
            process = subprocess.Popen(
                [*command, *self.inputs.options(run)],
                env=job_environment(slot, self.jobs, group=self.group),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches only this process, which passes it on as SIGTERM
                preexec_fn=_end_with_parent,
            )
        return _Job(run, process, log_file, log_start=start, started=time.monotonic())

    def _end(self, job: _Job) -> None:
        """Record how a run ended."""
        code, minutes = job.process.returncode, (time.monotonic() - job.started) / 60
        row = self._row(job.run, is_finished=code == 0)
        if code == 0:
            log(f"{row.name}: finished in {minutes:.1f} minutes")
            for checkpoint in [] if self.keep_checkpoints else checkpoints(self.out / row.name):
                shutil.rmtree(checkpoint)
        else:
            text = job.log_file.read_bytes()[job.log_start :].decode(errors="replace")
            row.state, row.error = "failed", _last_error(text) or "no output"
            if code < 0:
                row.error = f"killed by {signal.Signals(-code).name}; before it: {row.error}"
            log(f"{row.name}: failed after {minutes:.1f} minutes: {row.error}")
        self.rows[self.runs.index(job.run)] = row
        self.on_change(self.rows)

    def _row(self, run: Run, *, is_finished: bool) -> Row:
        """The row of a run that is not scored yet."""
        row = Row(name=run.name, setting=run.setting, seed=run.config.seed, swept=run.swept)
        if not is_finished:
            return row
        record = read_json(self.out / run.name / "run.json")
        logged = read_json_lines(self.out / run.name / "training_log.jsonl")
        row.validation_nll_nats = [entry["eval_ce"] for entry in logged if "eval_ce" in entry]
        if row.validation_nll_nats:
            row.best_epoch = 1 + row.validation_nll_nats.index(min(row.validation_nll_nats))
        for key in ("parameters", "weights_sha256", "initial_weights_sha256", "config", "data"):
            setattr(row, key, record[key])
        metrics = record["metrics"]
        row.state, row.steps, row.seconds = "finished", metrics["steps"], metrics["seconds_since_start_or_resume"]
        row.nll_nats = None if self.scored_on else metrics.get("eval_ce")  # of a validation_fraction
        reason = "not scored yet" if self.scored_on else "no validation cache"
        row.reasons = {name: reason for name in FIGURES if getattr(row, name) is None}
        return row


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold an experiment's folder, which is created.

    Raises:
        ResumeError: another process works in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with Lock(out, "running the experiment in this folder"):
        yield


def job_environment(slot: int, jobs: int, *, group: str) -> dict[str, str]:
    """The environment of one of `jobs` processes: a GPU in turn or a share of the threads, a W&B run in the group."""
    environment = {key: value for key, value in os.environ.items() if key not in ("WANDB_RUN_ID", "WANDB_NAME")}
    environment.setdefault("WANDB_RUN_GROUP", group)
    num_devices = torch.cuda.device_count()
    if num_devices:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_devices)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % num_devices]
    elif jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // jobs))
    return environment


def _last_error(text: str) -> str | None:
    """The error line of a command that failed; of one that crashed, the last line of its traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines)[-1] if lines else None


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT while processes are started: an exception raised by a handler in a fork is lost."""
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """Have Linux send SIGTERM to a process whose parent is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Have processes save and end; a second signal to this one meanwhile kills them."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait()
    except BaseException:
        for process in processes:
            process.kill()
        raise
