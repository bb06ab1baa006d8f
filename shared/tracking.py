"""Weights & Biases, as an aid that can always be away.

Whatever is wrong (no wandb, no key, a bad key, no network, a dead server), the job goes on, one line says so, nothing
prompts, and at most `INIT_SECONDS + FINISH_SECONDS` and wandb's own start-up are lost. What is recorded offline is
uploaded later with `wandb sync`.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.files import output_path
from shared.process import log, rank

INIT_SECONDS = 8.0
FINISH_SECONDS = 4.0

_said: set[str] = set()  # what is said once in a process, however many runs it has
_no_server: str | None = None  # why this process tries no server any more: each try could cost `INIT_SECONDS`


class Run:
    """A W&B run, or nothing where there is none; no method raises.

    Attributes:
        id: W&B's id of the run, to be passed to `start` when the job is resumed; None where there is no run.
        active: whether anything is recorded. `wandb.run` is then set and the Trainer's own callback may be used.
    """

    def __init__(self, run: Any = None) -> None:
        self._run = run
        self.id: str | None = run.id if run is not None else None
        self.active = run is not None
        self._complained = False

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record metrics at a step."""
        self._attempt(lambda: self._run.log(dict(metrics), step=step))

    def summary(self, metrics: Mapping[str, Any]) -> None:
        """Record final figures."""
        self._attempt(lambda: self._run.summary.update(dict(metrics)))

    def refer_to(self, kind: str, name: str, path: Path, metadata: Mapping[str, Any]) -> None:
        """Record an artifact that stays where it is, by its address and what identifies it."""

        def record() -> None:
            from wandb import Artifact

            artifact = Artifact(name, type=kind, metadata=dict(metadata))
            artifact.add_reference(path.resolve().as_uri(), checksum=False)
            self._run.log_artifact(artifact)

        self._attempt(record)

    def finish(self, exit_code: int) -> None:
        """End the run; a code other than 0 marks it failed."""
        self._attempt(lambda: self._run.finish(exit_code=exit_code))

    def _attempt(self, call: Callable[[], object]) -> None:
        if not self.active:
            return
        try:
            call()
        except Exception as error:
            if not self._complained:
                log(f"wandb: something was not recorded ({type(error).__name__}); the job goes on")
            self._complained = True


@contextlib.contextmanager
def start(
    job_type: str,
    *,
    name: str | None,
    config: Mapping[str, Any],
    directory: Path,
    group: str | None = None,
    run_id: str | None = None,
) -> Iterator[Run]:
    """Track one job; the run ends with the block, marked failed where the block raises.

    Mode: disabled or offline where `WANDB_MODE` says so; else online, and offline where there is no key or the server
    does not answer.

    Args:
        job_type: the stage, such as `train`.
        name: the run's name; None lets W&B choose one.
        config: the resolved configuration.
        directory: holds wandb's own files, in a folder `wandb`.
        group: what the run belongs to, such as a sweep or a proof; `WANDB_RUN_GROUP` comes before it.
        run_id: the id of an earlier run of the same job, which is continued.
    """
    group = os.environ.get("WANDB_RUN_GROUP") or group
    run = Run(_open(job_type=job_type, name=name, config=config, directory=directory, group=group, id=run_id))
    exit_code = 1
    try:
        yield run
        exit_code = 0
    finally:
        run.finish(exit_code)


def record_evaluation(kind: str, out: Path, result: Mapping[str, Any]) -> None:
    """Track a finished evaluation of a kind such as `fidelity`: what it was measured with, and its figures.

    The run is opened only now, so that W&B's own processes take no part in what is timed. Evaluations whose results
    (`out`, a file or folder) lie in one folder, as those of a model do, are a group.
    """
    context = ("settings", "model", "teacher", "student", "cache", "dtype", "device", "machine", "versions")
    group = out.resolve().parent.name
    out = output_path(out)
    with start(
        f"eval-{kind}",
        name=f"{group} {kind}",
        config={key: result[key] for key in context if key in result},
        directory=out.parent,
        group=group,
    ) as run:
        run.summary(_numbers({key: value for key, value in result.items() if key not in context}))


def _numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in nested objects, by their keys joined with `/`."""
    numbers: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            numbers |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[prefix + key] = value
    return numbers


def _say(message: str) -> None:
    if message not in _said:
        _said.add(message)
        log(message)


def _open(*, directory: Path, config: Mapping[str, Any], **options: Any) -> Any:
    """Return an open wandb run, or None; the messages name error types alone, since texts could quote the key."""
    global _no_server
    wanted = os.environ.get("WANDB_MODE", "").lower()
    if rank() != 0 or wanted == "disabled":
        return None
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb's own telemetry waits 30 s for a silent server
    try:
        from wandb import Settings, init, setup, teardown  # a stray folder `wandb` imports too, without these names
    except Exception as error:
        _say(f"wandb: cannot be imported ({type(error).__name__}); nothing is tracked")
        return None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        settings = Settings(silent=True, console="off", init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS)
        options |= {"dir": str(directory), "config": dict(config), "settings": settings, "resume": "allow"}
        setup(settings)  # silent from here on; wandb never prompts while it is silent
        reason = "WANDB_MODE asks for it" if wanted in ("offline", "dryrun") else _no_server
        if reason is None:
            try:
                run = init(mode="online", **options)
                log(f"wandb: tracking at {run.url}")
                return run
            except Exception as error:
                _no_server = reason = f"the server could not be used ({type(error).__name__})"
                if type(error).__name__ == "UsageError":
                    _no_server = reason = "no key was found"
                with contextlib.suppress(SystemExit):
                    teardown()  # what is left of the attempt would own the run's id
                setup(settings)
        run = init(mode="offline", **options)
        _say(f"wandb: recording offline in {directory / 'wandb'}, since {reason}; upload with `wandb sync`")
        return run
    except Exception as error:
        _say(f"wandb: cannot record ({type(error).__name__}); nothing is tracked")
        return None
