"""`student train` through the command line, killed at random moments: the same command again ends in the same bytes."""

import contextlib
import json
import os
import shutil
import subprocess
import time

from stage2_student.checkpoint import step_of
from tests.support.cache_faults import CLI
from tests.support.student_cache import make_cache

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
OPTIONS = {
    "block_size": 48, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 24,
    "save_steps": 3, "logging_steps": 2, "eval_steps": 4, "bf16": False, "dataloader_num_workers": 1,
}  # fmt: skip


# What systems, transports and people leave in any folder.
STRAYS = (".DS_Store", "._model.safetensors", ".nfs0000000001", "model.safetensors.sha256", "notes.txt", "a folder")


def strew(out):
    """Put stray files into a run and all its checkpoints, and a file under a checkpoint's name."""
    for folder in (out, *(path for path in out.glob("checkpoint-*") if path.is_dir())):
        for name in STRAYS:
            with contextlib.suppress(FileNotFoundError):  # the checkpoint is just being removed
                (folder / name).mkdir(exist_ok=True) if name == "a folder" else (folder / name).write_text("stray")
    (out / "checkpoint-100000").write_text("stray")


class Trainings:
    """Trainings of one student, under `OPTIONS` with changes; an uninterrupted one says what the bytes must be."""

    def __init__(self, folder, **changes):
        self.kills = self.in_saves = 0
        make_cache(folder / "train")
        make_cache(folder / "validation", seed=1, lengths=(30, 20, 10, 5))
        assigned = [f"--set={key}={json.dumps(value)}" for key, value in (OPTIONS | changes).items()]
        data = ["--cache", str(folder / "train"), "--validation", str(folder / "validation"), "--preset", "tiny"]
        self.command = [*CLI, "student", "train", *data, *assigned, "--out"]
        status, said = self.run(folder / "whole")
        assert status == 0, said
        self.expected = outcome(folder / "whole")

    def run(self, out, *, kill_when=None, seconds=0.0):
        """One run, killed so many seconds after the condition first holds; its exit status and what it said."""
        log = out.with_suffix(".log")
        with log.open("w") as file:
            process = subprocess.Popen([*self.command, str(out)], env=ENVIRONMENT, stdout=file, stderr=file)
            if kill_when is not None:
                while process.poll() is None and not kill_when():
                    time.sleep(0.001)
                time.sleep(seconds)
                process.kill()
            status = process.wait(300)
        return status, log.read_text()

    def kill_in_random_moments(self, out, rng, *, strays=False):
        """Run with random kills, half of them inside a save, until a run gets through.

        With `strays`, stray files lie in all folders before each start; the newest sealed checkpoint is resumed from.
        """
        status = -9
        while status == -9:
            before = progress(out)
            if strays and (out / "run.json").exists():
                strew(out)
            newest = max((step_of(marker.parent) for marker in out.glob("checkpoint-*/COMPLETE")), default=None)
            if rng.random() < 0.5:
                target = before + int(rng.integers(1, 9))
                moment = lambda target=target: progress(out) >= target or unfinished(out) > 0  # noqa: E731
                status, said = self.run(out, kill_when=moment, seconds=0.02 * rng.random())
            else:
                here = time.monotonic() + 25 * rng.random()
                status, said = self.run(out, kill_when=lambda here=here: time.monotonic() >= here)
            assert "Traceback" not in said, said
            if newest is not None and status == 0 and said != f"{out} is up to date\n":  # killed while it exited
                assert f"continuing from {out / f'checkpoint-{newest}'}\n" in said, said
            self.kills += status == -9
            self.in_saves += status == -9 and unfinished(out) > 0
        assert status == 0, said
        assert outcome(out) == self.expected
        shutil.rmtree(out)


def progress(out):
    """Lines of the log, which a resume begins anew, and checkpoints: something that grows while a run goes on."""
    log = out / "training_log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def unfinished(out):
    return sum(path.is_dir() and not (path / "COMPLETE").exists() for path in out.glob("checkpoint-*"))


def outcome(out):
    return [(out / name).read_bytes() for name in ("model.safetensors", "training_log.jsonl")]
