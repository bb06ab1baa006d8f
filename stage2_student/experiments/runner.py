"""A sweep: the students of a grid, each trained by a `student train` process of its own, then compared."""

import contextlib
import ctypes
import fcntl
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.errors import ConfigError, DistillError, ResumeError
from shared.files import read_json, sha256_file, write_bytes, write_json
from shared.model.gpt import GPTConfig
from shared.process import Terminated, log, own_command, world_size
from stage2_student.experiments.grid import Member, read_grid, to_toml
from stage2_student.experiments.report import plot, rank_rows, table
from stage2_student.experiments.score import score
from stage2_student.train import WEIGHTS, check

LOCK = ".lock"
LOCK_SECONDS = 60.0  # what a killed sweep's processes, which stop by themselves, may take for a last checkpoint
FIGURES = ("nll_nats", "kl_to_teacher_nats")
_PR_SET_PDEATHSIG = 1


@dataclass(kw_only=True, slots=True)
class _Job:
    member: Member
    process: subprocess.Popen[bytes]
    log_file: Path
    log_start: int  # where this process's words begin in a log that earlier ones share
    started: float


class Sweep:
    """A grid's students in one folder: `<name>/` and `<name>.log` of each, and `sweep.{json,md,svg}` of all.

    Args:
        grid: a TOML file (see `read_grid`).
        cache_paths, weights, validation_path, init_from: those of `train`, the same for all.
        out: the sweep's folder.
        jobs: trained at once. Each has one GPU, in turn; without GPUs they share the processor's threads.

    Raises:
        ConfigError: a member's config is refused, does not fit the caches, or is not that of the run in its folder;
            nothing is trained or written then.
    """

    def __init__(
        self,
        grid: Path,
        cache_paths: Sequence[Path],
        out: Path,
        *,
        weights: Sequence[float] | None = None,
        validation_path: Path | None = None,
        init_from: Path | None = None,
        jobs: int = 1,
    ) -> None:
        if world_size() > 1:
            raise ConfigError("a sweep starts its own processes", fix="run it without torchrun, with --jobs")
        self.out, self.jobs = out, jobs
        self.members = read_grid(grid)
        self._options = [
            *(f"--cache={path}{f':{weight}' if weights else ''}" for path, weight in _weighted(cache_paths, weights)),
            *([f"--validation={validation_path}"] if validation_path else []),
            *([f"--init-from={init_from}"] if init_from else []),
        ]
        self._finished = set()
        self._sizes: dict[str, GPTConfig] = {}
        for member in self.members:
            try:
                task = check(member.config, cache_paths, out / member.name, weights, validation_path, init_from)
            except DistillError as error:
                raise ConfigError(f"a student of the sweep is refused: {error}", where=member.name) from error
            self._sizes[member.name], self._validation = task.sizes, task.validation
            if task.is_done(out / member.name):
                self._finished.add(member.name)
        self._rows = {member.name: self._row(member) for member in self.members}

    def run(self) -> str:
        """Train what is not finished, compare all, and return the table.

        Raises:
            DistillError: members failed; the others were trained and compared.
            Terminated: SIGTERM came; the processes were stopped, each with a checkpoint.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with _alone(self.out) as lock:
            self._train(lock)
            self._score()
            text = self._write()
        failed = [row for row in self._rows.values() if row["state"] != "finished"]
        if failed:
            log(text)
            raise DistillError(
                f"{len(failed)} of {len(self._rows)} members of the sweep are not finished",
                where=self.out,
                got="; ".join(f"{row['name']}: {row['error']} (see {row['name']}.log)" for row in failed),
                fix="the same command tries these alone again",
            )
        return text

    def _train(self, lock: int) -> None:
        waiting = [member for member in self.members if member.name not in self._finished]
        for name in sorted(self._finished):
            log(f"{name}: is up to date")
        running: dict[int, _Job] = {}  # by slot
        try:
            with _signals() as received:
                while (waiting or running) and not received:
                    for slot in range(self.jobs):
                        if waiting and slot not in running:
                            running[slot] = self._begin(waiting.pop(0), slot, lock)
                    time.sleep(0.1)
                    for slot, job in list(running.items()):
                        if job.process.poll() is not None:
                            self._end(running.pop(slot))
            if received:
                raise KeyboardInterrupt if received[0] == signal.SIGINT else Terminated
        finally:
            _stop([job.process for job in running.values()])

    def _begin(self, member: Member, slot: int, lock: int) -> _Job:
        number = self.members.index(member) + 1
        log_file = Path(f"{self.out / member.name}.log")
        log(f"{member.name}: training, {number} of {len(self.members)}; log: {log_file}")
        command = own_command("student", "train", f"--out={self.out / member.name}", *self._options)
        command += [f"--set={key}={to_toml(value)}" for key, value in member.settings.items()]
        with log_file.open("ab") as file:
            start = file.tell()
            process = subprocess.Popen(
                command,
                env=job_environment(slot, self.jobs, group=self.out.resolve().name),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=[lock],  # so that no other sweep begins before the last of these processes is gone
                start_new_session=True,  # Ctrl-C reaches the sweep alone, which passes it on as SIGTERM
                preexec_fn=_end_with_parent,
            )
        return _Job(member=member, process=process, log_file=log_file, log_start=start, started=time.monotonic())

    def _end(self, job: _Job) -> None:
        """Record how a member ended."""
        row, code = self._rows[job.member.name], job.process.returncode
        minutes = (time.monotonic() - job.started) / 60
        if code == 0:
            self._finished.add(job.member.name)
            row = self._row(job.member)
            log(f"{row['name']}: finished in {minutes:.1f} minutes")
        else:
            said = job.log_file.read_bytes()[job.log_start :].decode(errors="replace")
            error = _last_error(said) or "it said nothing"
            if code < 0:
                error = f"killed by {signal.Signals(-code).name}; before it: {error}"
            row |= {"state": "failed", "error": error}
            log(f"{row['name']}: failed after {minutes:.1f} minutes: {error}")
        self._rows[job.member.name] = row
        self._write()

    def _row(self, member: Member) -> dict[str, Any]:
        """What `sweep.json` says of a member, with the scores of an earlier sweep of the same weights."""
        row: dict[str, Any] = {"name": member.name, "swept": member.swept, "state": "waiting", "error": None}
        row |= dict.fromkeys(("parameters", "steps", *FIGURES, "weights_sha256", "validation_sha256"))
        row["reasons"] = dict.fromkeys(FIGURES, "not trained yet")
        if member.name not in self._finished:
            return row
        record = read_json(self.out / member.name / "run.json")
        row |= {"state": "finished", "reasons": dict.fromkeys(FIGURES, "no validation cache")}
        row |= {"parameters": record["parameters"], "steps": record["metrics"]["steps"]}
        row["weights_sha256"] = record["weights_sha256"]
        if self._validation is None:
            if "eval_ce" in record["metrics"]:  # of a validation_fraction
                row["nll_nats"] = record["metrics"]["eval_ce"]
                del row["reasons"]["nll_nats"]
        else:
            row["validation_sha256"] = sha256_file(self._validation.path / "manifest.json")
            row["reasons"] = dict.fromkeys(FIGURES, "not scored yet")
            for known in _earlier_rows(self.out):
                if all(known.get(key) == row[key] for key in ("weights_sha256", "validation_sha256")):
                    row |= {key: known[key] for key in (*FIGURES, "reasons")}
        return row

    def _score(self) -> None:
        """Measure all students alike, whatever loss each was trained with."""
        if self._validation is None:
            return
        block_size = min(sizes.max_position_embeddings for sizes in self._sizes.values())
        for name, row in self._rows.items():
            if row["state"] != "finished" or "not scored yet" not in row["reasons"].values():
                continue
            figures = score(self.out / name / WEIGHTS, self._sizes[name], self._validation, block_size=block_size)
            row |= dict(zip(FIGURES, figures, strict=True))
            row["reasons"] = {key: f"not finite ({row[key]})" for key in FIGURES if not math.isfinite(row[key])}
            row |= dict.fromkeys(row["reasons"])
            self._write()

    def _write(self) -> str:
        rows = rank_rows(list(self._rows.values()))
        write_json(self.out / "sweep.json", {"format": "codedistill-sweep", "version": 1, "members": rows})
        text = table(rows)
        write_bytes(self.out / "sweep.md", f"# {self.out.resolve().name}\n\n{text}".encode())
        drawing = plot(rows)
        if drawing:
            write_bytes(self.out / "sweep.svg", drawing)
        return text


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


def _weighted(paths: Sequence[Path], weights: Sequence[float] | None) -> Iterator[tuple[Path, float]]:
    return zip(paths, weights or [1.0] * len(paths), strict=True)


def _earlier_rows(out: Path) -> list[dict[str, Any]]:
    return read_json(out / "sweep.json")["members"] if (out / "sweep.json").exists() else []


def _last_error(text: str) -> str | None:
    """The error line of a command that failed; of one that crashed, the last line of its traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines)[-1] if lines else None


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT while processes are started: what a handler raises inside a fork is lost."""
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """Have Linux send SIGTERM to a process whose sweep is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Have processes save and end; a second signal to the sweep meanwhile kills them."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait()
    except BaseException:
        for process in processes:
            process.kill()
        raise


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[int]:
    """Hold a sweep's folder by a descriptor that its processes inherit, so that the lock outlives a killed sweep."""
    descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = None
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if deadline is None:
                    log(f"waiting for the processes of another sweep in {out}")
                    deadline = time.monotonic() + LOCK_SECONDS
                if time.monotonic() > deadline:
                    raise ResumeError("another sweep is running in this folder", where=out) from error
                time.sleep(0.5)
        yield descriptor
    finally:
        os.close(descriptor)
