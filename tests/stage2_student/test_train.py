"""`student train` and `student export` as real processes on a small cache."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from shared.errors import DistillError
from shared.lock import Lock
from shared.process import own_command
from stage2_student.checkpoint import seal
from stage2_student.cli import student
from tests.support import warm
from tests.support.blocks import decoded
from tests.support.student_cache import VOCABULARY, make_cache
from tests.support.student_kills import strew
from tests.support.wandb_runs import wandb_steps

# The first run, and those that do not train, are programs of their own; others with signals or equal bits fork from a
# process that has imported torch. The rest run in this one.
COMMAND = own_command("student")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
ON_A_PROCESSOR = pytest.mark.skipif(torch.accelerator.is_available(), reason="about machines without accelerators")
OPTIONS = {
    "preset": "tiny",
    "block_size": 48,
    "per_device_train_batch_size": 2,
    "max_steps": 12,
    "save_steps": 5,
    "logging_steps": 3,  # no divisor of save_steps: a window of the log lies across a checkpoint
    "eval_steps": 4,
    "bf16": False,
}


def arguments(cache, out, validation=None, **changes):
    assigned = [f"--set={key}={json.dumps(value)}" for key, value in (OPTIONS | changes).items()]
    held_out = ["--validation", str(validation)] if validation else []
    return [*COMMAND, "train", "--cache", str(cache), "--out", str(out), *held_out, *assigned]


def run(command, code=0):
    result = warm.run("student", *command[len(COMMAND) :], env=ENVIRONMENT, timeout=120)
    assert result.returncode == code, result.stderr
    return result


def run_afresh(command):
    """Run a command as a program, which imports everything by itself."""
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result


def run_here(command):
    """Run a command in this process; its error, or None."""
    return CliRunner().invoke(student, command[len(COMMAND) :]).exception


def refused(command):
    """The message of the domain error that a command ends with."""
    error = run_here(command)
    assert isinstance(error, DistillError)
    return str(error)


def stop_when(command, condition, signal_number):
    """Start a command, send it a signal as soon as the condition holds, and return exit code and standard error."""
    process = warm.Command("student", *command[len(COMMAND) :], env=ENVIRONMENT)
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def log_of(out):
    log = out / "training_log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def same_student(a, b):
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert (a / "training_log.jsonl").read_bytes() == (b / "training_log.jsonl").read_bytes()


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    make_cache(folder / "train")
    make_cache(folder / "validation", seed=1, lengths=(30, 20, 10, 5))
    make_cache(folder / "more", seed=2, lengths=(12, 50, 30))
    make_cache(folder / "stranger", seed=1, lengths=(30, 20, 10, 5), teacher="another")
    return folder


@pytest.fixture(scope="module")
def finished(caches, tmp_path_factory):
    """An uninterrupted run; tests only read it. Beside it lies `stderr.txt`."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    result = run_afresh(arguments(caches / "train", out, caches / "validation"))
    (out.parent / "stderr.txt").write_text(result.stderr)
    return out


def test_a_run_from_end_to_end(finished):
    record = json.loads((finished / "run.json").read_text())
    assert record["state"] == "finished"
    assert record["metrics"]["steps"] == 12
    log = log_of(finished)
    assert [(line["step"], "loss" in line) for line in log] == [
        (3, True), (4, False), (6, True), (8, False), (9, True), (12, True), (12, False),
    ]  # fmt: skip
    for line in log:
        prefix = "" if "loss" in line else "eval_"
        assert line[f"{prefix}loss"] == pytest.approx(0.7 * line[f"{prefix}kd"] + 0.3 * line[f"{prefix}ce"])
    assert record["metrics"]["eval_ce"] == log[-1]["eval_ce"] < log[1]["eval_ce"]
    assert sorted(path.name for path in finished.iterdir()) == [
        "checkpoint-10", "checkpoint-12", "config.json", "generation_config.json", "model.safetensors", "run.json",
        "tokenizer.json", "tokenizer_config.json", "training_log.jsonl",
    ]  # fmt: skip
    lines = (finished.parent / "stderr.txt").read_text().splitlines()
    assert lines[2].startswith("step 3/12: loss ")
    assert all(word in lines[2] for word in (", kd ", ", ce ", ", learning_rate ", " tokens/s, ", " left"))
    assert len(lines) == 2 + len(log) + 1  # memory, the student, each log, the end: no progress bar, no warnings


def test_the_logged_figures_are_those_of_the_saved_student(finished, caches):
    """The last evaluation, computed anew from the weights on disk, with transformers' own model."""
    from transformers import AutoModelForCausalLM

    from shared.cache.reader import Cache

    cache = Cache(caches / "validation")
    model = AutoModelForCausalLM.from_pretrained(finished).double()
    nll, number = 0.0, 0
    for doc in range(cache.num_documents):
        ids = torch.from_numpy(cache.tokens(doc))
        rows = torch.from_numpy(cache.loss_mask(doc))[:-1]
        logp = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        nll, number = nll - logp[rows].sum().item(), number + int(rows.sum())
    assert log_of(finished)[-1]["eval_ce"] == pytest.approx(nll / number, rel=1e-5)


def test_a_finished_run_is_up_to_date(finished, caches):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    result = run_afresh(arguments(caches / "train", finished, caches / "validation"))
    assert result.stderr == f"{finished} is up to date\n"
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_a_finished_run_is_found_up_to_date_without_torch(finished, caches):
    command = arguments(caches / "train", finished, caches / "validation")
    program = (
        "import sys\nfrom stage2_student.cli import student\nstudent.main(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    command = [sys.executable, "-c", program, *command[len(COMMAND) :]]
    assert run_afresh(command).stderr == f"{finished} is up to date\n"


def test_the_baseline_without_soft_labels_starts_from_the_same_weights(finished, caches, tmp_path):
    assert run_here(arguments(caches / "train", tmp_path / "baseline", caches / "validation", alpha=0)) is None
    ours, baseline = (json.loads((out / "run.json").read_text()) for out in (finished, tmp_path / "baseline"))
    assert ours["initial_weights_sha256"] == baseline["initial_weights_sha256"]
    assert ours["data"] == baseline["data"]
    log = log_of(tmp_path / "baseline")
    assert [line["step"] for line in log] == [line["step"] for line in log_of(finished)]
    assert not any("kd" in line for line in log)  # training read nothing that it could be measured by
    assert all(line["eval_kd"] > 0 for line in log if "eval_kd" in line)
    assert all(
        line[f"{name}loss"] == line[f"{name}ce"] for line in log for name in ("", "eval_") if f"{name}ce" in line
    )
    assert log[0]["learning_rate"] == log_of(finished)[0]["learning_rate"]


def test_killed_and_run_again_equals_an_uninterrupted_run(finished, caches, tmp_path):
    """Killed before any checkpoint, after the first, and while the second is being written."""
    out = tmp_path / "run"
    out.mkdir()
    (out / ".run.json.tmp-1").write_text("a kill inside the very first write")
    command = arguments(caches / "train", out, caches / "validation")
    for evidence in ("training_log.jsonl", "checkpoint-5/COMPLETE", "checkpoint-10/model.safetensors"):
        code, _ = stop_when(command, (out / evidence).exists, signal.SIGKILL)
        assert code == -signal.SIGKILL
        assert json.loads((out / "run.json").read_text())["state"] == "running"
    assert "continuing from" in run(command).stderr
    same_student(finished, out)
    assert not (out / ".run.json.tmp-1").exists()


def test_checkpoints_by_the_clock_change_nothing(finished, caches, tmp_path):
    """The shortest time saves every step; killed at one of them and run again."""
    changes = {"save_steps": 0, "save_minutes": 1e-9, "save_total_limit": 99}
    command = arguments(caches / "train", tmp_path / "run", caches / "validation", **changes)
    code, _ = stop_when(command, (tmp_path / "run" / "checkpoint-7" / "COMPLETE").exists, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert "continuing from" in run(command).stderr
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in range(1, 13)
    }
    same_student(finished, tmp_path / "run")


def test_epochs_of_the_data_set_are_evaluated_and_saved_and_a_resume_changes_nothing(caches, tmp_path):
    changes = {
        "max_steps": -1, "num_train_epochs": 5, "eval_steps": 0, "save_steps": 0, "eval_strategy": "epoch",
        "save_strategy": "epoch", "save_total_limit": 9, "load_best_model_at_end": True, "metric_for_best_model": "ce",
        "greater_is_better": False, "learning_rate": 0.02,
    }  # fmt: skip
    whole = tmp_path / "whole"
    said = run(arguments(caches / "train", whole, caches / "validation", **changes)).stderr
    assert "5 epochs in 20 blocks" in said
    evaluated = {line["step"]: line["eval_ce"] for line in log_of(whole) if "eval_ce" in line}
    assert list(evaluated) == [2, 4, 6, 8, 10]
    assert {path.name for path in whole.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in evaluated}
    best = min(evaluated, key=evaluated.get)
    saved = load_file(whole / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in load_file(whole / "model.safetensors").items())
    assert json.loads((whole / "run.json").read_text())["metrics"]["eval_ce"] == evaluated[best]

    for signal_number, expected in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        out = tmp_path / signal_number.name
        command = arguments(caches / "train", out, caches / "validation", **changes)
        code, errors = stop_when(command, (out / "checkpoint-2" / "COMPLETE").exists, signal_number)
        assert code == expected, errors
        assert "continuing from" in run(command).stderr
        same_student(whole, out)


def test_a_checkpoint_without_its_marker_is_set_aside_and_the_one_before_used(finished, caches, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"state": "running"}))
    (out / "checkpoint-12" / "COMPLETE").unlink()
    (out / "checkpoint-12" / "model.safetensors").write_bytes(b"half")
    result = run(arguments(caches / "train", out, caches / "validation"))
    assert f"{out / 'checkpoint-12'} is damaged and set aside as damaged-checkpoint-12: COMPLETE is" in result.stderr
    assert (out / "damaged-checkpoint-12" / "model.safetensors").read_bytes() == b"half"
    assert f"continuing from {out / 'checkpoint-10'}\n" in result.stderr
    same_student(finished, out)


def test_stray_files_do_not_keep_a_run_from_its_newest_checkpoint(finished, caches, tmp_path):
    out = tmp_path / "run"
    command = arguments(caches / "train", out, caches / "validation")
    out.mkdir()
    (out / ".DS_Store").write_text("in a folder that is new otherwise")
    code, _ = stop_when(command, (out / "checkpoint-5/COMPLETE").exists, signal.SIGKILL)
    assert code == -signal.SIGKILL
    strew(out)
    result = run(command)
    assert f"continuing from {out / 'checkpoint-5'}\n" in result.stderr
    assert "damaged" not in result.stderr
    same_student(finished, out)
    assert (out / "checkpoint-100000").read_text() == "stray"


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_left_as_it_is(finished, caches, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "model.safetensors").unlink()
    for step in (10, 12):
        (out / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"half")
    line = refused(arguments(caches / "train", out, caches / "validation"))
    assert "no checkpoint of this run is whole" in line and "start over" in line
    assert {path.name for path in out.glob("*checkpoint*")} == {"checkpoint-10", "checkpoint-12"}


def test_a_file_where_a_checkpoint_will_go_is_refused_before_training(caches, tmp_path):
    out = tmp_path / "run"
    assert run_here(arguments(caches / "train", out, max_steps=1, save_steps=0)) is None
    (out / "model.safetensors").unlink()
    (out / "checkpoint-1").write_text("mine")
    line = refused(arguments(caches / "train", out, max_steps=1, save_steps=1))
    assert f"a file stands where a checkpoint goes; where: {out / 'checkpoint-1'}" in line
    assert (out / "checkpoint-1").read_text() == "mine"


def test_the_first_step_of_a_warm_up_moves_the_weights(caches, tmp_path):
    """One step, all of it warm-up; then four steps of warm-up, whose learning rates rise evenly from above 0."""
    assert run_here(arguments(caches / "train", tmp_path / "one", max_steps=1, logging_steps=1)) is None
    record = json.loads((tmp_path / "one" / "run.json").read_text())
    (line,) = log_of(tmp_path / "one")
    assert line["learning_rate"] == record["config"]["learning_rate"] / 2
    options = {"max_steps": 6, "warmup_steps": 4, "logging_steps": 1, "lr_scheduler_type": "constant_with_warmup"}
    assert run_here(arguments(caches / "train", tmp_path / "six", **options)) is None
    rates = [line["learning_rate"] / 1e-3 for line in log_of(tmp_path / "six")]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


@pytest.mark.parametrize("kind", ["train", "validation"])
def test_a_cache_without_targets_is_refused(caches, tmp_path, kind):
    make_cache(tmp_path / "cache", prompt=100)
    pair = {"train": caches / "train", "validation": caches / "validation"} | {kind: tmp_path / "cache"}
    line = refused(arguments(pair["train"], tmp_path / "run", pair["validation"]))
    assert f"the cache has no targets; where: {tmp_path / 'cache'}; expected: at least one" in line
    assert not (tmp_path / "run").exists()
    assert run_here(arguments(pair["train"], tmp_path / "run", pair["validation"], targets="all", max_steps=1)) is None


def test_steps_without_targets_are_skipped_and_counted(tmp_path):
    """Documents that fill a block each, of which every second has no target: weights, moments and decay stay still."""
    make_cache(tmp_path / "cache", lengths=(33,) * 8, prompt=(3, 100) * 4)
    options = {"block_size": 32, "per_device_train_batch_size": 1, "max_steps": 8, "logging_steps": 1, "save_steps": 1}
    out = tmp_path / "run"
    assert run_here(arguments(tmp_path / "cache", out, **options, save_total_limit=8)) is None
    log = log_of(out)
    assert [line.get("skipped_steps", 0) for line in log][-1] == 4
    assert json.loads((out / "run.json").read_text())["metrics"]["skipped_steps"] == 4
    weights = [load_file(out / f"checkpoint-{step}" / "model.safetensors") for step in range(1, 9)]
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(weights)]
    assert same == ["loss" not in line for line in log[1:]]
    assert all(line["loss"] > 0 for line in log if "loss" in line)
    (out / "model.safetensors").unlink()
    for step in (6, 7, 8):
        shutil.rmtree(out / f"checkpoint-{step}")
    assert run_here(arguments(tmp_path / "cache", out, **options, save_total_limit=8)) is None
    assert log_of(out) == log


def test_a_resumed_run_continues_the_steps_of_its_offline_tracking(caches, tmp_path, monkeypatch):
    """Killed after step 10; the resume from the checkpoint of step 5 goes on at that step, under the same id."""
    monkeypatch.setitem(ENVIRONMENT, "WANDB_MODE", "offline")
    out = tmp_path / "run"
    command = arguments(caches / "train", out, caches / "validation")
    code, _ = stop_when(command, lambda: any(line["step"] >= 8 for line in log_of(out)), signal.SIGKILL)
    assert code == -signal.SIGKILL
    time.sleep(1)  # W&B's folders are named by the second
    run(command)
    first, second = wandb_steps(tmp_path)
    assert first[0] == second[0] == json.loads((out / "run.json").read_text())["wandb_run_id"]
    assert second[1] == [6, 8, 9, 12]


def test_validation_on_documents_that_are_trained_on_is_said(caches, tmp_path):
    options = {"max_steps": 1, "save_steps": 0, "eval_steps": 0}
    for validation, warns in ((caches / "validation", False), (caches / "train", True)):
        command = arguments(caches / "train", tmp_path / validation.name, validation, **options)
        result = CliRunner().invoke(student, command[len(COMMAND) :])
        assert result.exit_code == 0
        assert (f"warning: {validation} holds documents that are trained on" in result.stderr) == warns


def test_a_loss_that_is_not_finite_names_its_documents(caches, tmp_path, monkeypatch):
    """Weights that become NaN after the third step, of four micro-batches in two steps."""
    from shared.cache.reader import Cache
    from stage2_student.dataset import PackedBlocks
    from stage2_student.trainer import RunRecorder

    def spoil(self, args, state, control, model=None, **_):
        if state.global_step == 3:
            with torch.no_grad():
                model.model.norm.bias[0] = float("nan")

    monkeypatch.setattr(RunRecorder, "on_step_begin", spoil)
    out = tmp_path / "run"
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "save_steps": 1}
    line = refused(arguments(caches / "train", out, **sizes))
    blocks = PackedBlocks([Cache(caches / "train")], block_size=48, seed=0, num_blocks=24, temperature=None)
    names = [name for index in (6, 7) for name in blocks.documents(index)]
    assert f"where: step 4, documents {', '.join(names)}; got: losses nan, nan" in line
    assert sorted(path.parent.name for path in out.glob("*/COMPLETE")) == ["checkpoint-2", "checkpoint-3"]
    assert not (out / "lock.json").exists()


def test_a_gradient_that_is_not_finite_is_refused_too(caches, tmp_path, monkeypatch):
    from stage2_student.trainer import DistillTrainer

    def overflow(self, *args, _step=DistillTrainer.training_step, **kwargs):
        loss = _step(self, *args, **kwargs)
        self.model.model.norm.bias.grad[0] = float("inf")
        return loss

    monkeypatch.setattr(DistillTrainer, "training_step", overflow)
    line = refused(arguments(caches / "train", tmp_path / "run"))
    assert "its gradient is not finite" in line
    assert "where: step 1, documents " in line


def test_a_step_without_memory_leaves_the_checkpoints_before_it(finished, caches, tmp_path, monkeypatch):
    """The command line says in one line what to lower (`run_cli`), and the same command goes on."""
    from stage2_student.trainer import DistillTrainer

    def exhaust(self, *args, _step=DistillTrainer.training_step, **kwargs):
        if self.state.global_step == 7:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has no more")
        return _step(self, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "training_step", exhaust)
    command = arguments(caches / "train", tmp_path / "run", caches / "validation")
    assert isinstance(run_here(command), torch.OutOfMemoryError)
    monkeypatch.undo()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert "continuing from" in run(command).stderr
    same_student(finished, tmp_path / "run")


def test_a_folder_that_another_process_trains_in_is_refused(caches, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    lock = Lock(out)
    line = refused(arguments(caches / "train", out))
    lock.release()
    assert f"another process is training in this folder; where: {out}; got: process {os.getpid()}" in line
    assert list(out.iterdir()) == []


def test_training_stops_early_and_keeps_the_best_student(caches, tmp_path):
    """A learning rate that is too high: held-out loss falls, then grows. Held out are documents of the cache itself."""
    out = tmp_path / "run"
    options = {
        "early_stopping_patience": 2, "load_best_model_at_end": True, "validation_fraction": 0.3, "learning_rate": 0.05,
        "max_steps": 60, "eval_steps": 1, "save_steps": 1, "save_total_limit": 1, "lr_scheduler_type": "constant",
        "gradient_checkpointing": True,
    }  # fmt: skip
    command = [*arguments(caches / "train", out, **options), "--batch-tokens", "48"]
    assert run_here(command) is None
    record = json.loads((out / "run.json").read_text())
    losses = {line["step"]: line["eval_loss"] for line in log_of(out) if "eval_loss" in line}
    best, last = min(losses, key=losses.get), max(losses)
    assert last == best + 2 == record["metrics"]["steps"] < 60
    assert record["metrics"]["eval_loss"] == losses[best]
    kept = load_file(out / f"checkpoint-{best}" / "model.safetensors")
    ours = load_file(out / "model.safetensors")
    assert all(torch.equal(kept[name], ours[name]) for name in ours)
    assert record["config"]["gradient_accumulation_steps"] == 2

    weights = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").unlink()
    assert run_here(command) is None  # from a checkpoint at which training had stopped
    assert (out / "model.safetensors").read_bytes() == weights
    assert json.loads((out / "run.json").read_text())["metrics"]["steps"] == last


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"push_to_hub": True}, "student export RUN --out DIR --push-to-hub OWNER/NAME"),
        ({"hub_model_id": "me/mine"}, "student export RUN --out DIR --push-to-hub OWNER/NAME"),
        ({"auto_find_batch_size": True}, "--batch-tokens auto"),
        ({"early_stopping_patience": 2, "eval_steps": 0}, "eval_steps above 0"),
    ],
)
def test_what_cannot_be_had_says_what_can(caches, tmp_path, changes, fix):
    assert fix in refused(arguments(caches / "train", tmp_path / "run", **changes))


def test_a_pickle_in_a_checkpoint_is_not_run(finished, caches, tmp_path):
    out, trace = tmp_path / "run", tmp_path / "trace"
    shutil.copytree(finished, out)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"state": "running"}))

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(trace),))

    torch.save(Evil(), out / "checkpoint-12" / "optimizer.pt")
    torch.save(Evil(), out / "checkpoint-12" / "training_args.bin")
    seal(out / "checkpoint-12")
    assert "Weights only load failed" in str(run_here(arguments(caches / "train", out, caches / "validation")))
    assert not trace.exists()


def test_sigterm_leaves_a_checkpoint_and_143(finished, caches, tmp_path):
    """Twice, each time right after a log line, in the step or evaluation that follows."""
    out = tmp_path / "run"
    command = arguments(caches / "train", out, caches / "validation")
    log, checkpoint = out / "training_log.jsonl", 0
    for lines in (1, 4):
        code, errors = stop_when(
            command, lambda n=lines: log.exists() and log.read_text().count("\n") >= n, signal.SIGTERM
        )
        assert code == 143
        assert errors.endswith("terminated; nothing finished is lost, the same command continues\n")
        assert "Traceback" not in errors
        assert not (out / "model.safetensors").exists()
        assert (f"continuing from {out / f'checkpoint-{checkpoint}'}\n" in errors) == (checkpoint > 0)
        before = checkpoint
        checkpoint = max(int(path.parent.name.partition("-")[2]) for path in out.glob("checkpoint-*/COMPLETE"))
        assert checkpoint > before
    assert f"continuing from {out / f'checkpoint-{checkpoint}'}\n" in run(command).stderr
    same_student(finished, out)


def test_ctrl_c_leaves_a_checkpoint_and_130(caches, tmp_path):
    out = tmp_path / "run"
    command = arguments(caches / "train", out, max_steps=2000, save_steps=0, logging_steps=1)
    code, errors = stop_when(command, lambda: (out / "training_log.jsonl").exists() and log_of(out), signal.SIGINT)
    assert code == 130
    assert "interrupted: stopping after this step, with a checkpoint" in errors
    assert errors.endswith("interrupted; nothing finished is lost, the same command continues\n")
    (checkpoint,) = out.glob("checkpoint-*/COMPLETE")
    assert log_of(out)[-1]["step"] == int(checkpoint.parent.name.partition("-")[2])


def test_a_signal_after_the_last_step_waits_for_the_weights(caches, tmp_path, monkeypatch):
    from shared.process import Terminated
    from stage2_student.trainer import DistillTrainer

    evaluate = DistillTrainer.final_evaluation

    def interrupted(self):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(self)

    monkeypatch.setattr(DistillTrainer, "final_evaluation", interrupted)
    out = tmp_path / "run"
    command = arguments(caches / "train", out, caches / "validation", max_steps=2, save_steps=0, eval_steps=0)
    with pytest.raises(Terminated):
        run_here(command)
    assert json.loads((out / "run.json").read_text())["state"] == "finished"
    assert run_here(command) is None  # up to date


def test_a_process_that_sees_several_gpus_trains_on_one(caches, tmp_path, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: getattr(self, "_n_gpu", 2) or 2))
    assert run_here(arguments(caches / "train", tmp_path / "run", max_steps=1, eval_steps=0)) is None


def test_held_out_targets_are_those_of_training(caches, tmp_path):
    records = []
    for targets in ("completion", "all"):
        options = {"max_steps": 1, "eval_steps": 0, "save_steps": 0, "learning_rate": 1e-9, "targets": targets}
        assert run_here(arguments(caches / "train", tmp_path / targets, caches / "validation", **options)) is None
        records.append(json.loads((tmp_path / targets / "run.json").read_text())["metrics"]["eval_ce"])
    assert records[0] != records[1]


def test_another_run_in_the_same_folder_is_refused(finished, caches, tmp_path):
    train, validation = caches / "train", caches / "validation"
    line = run(arguments(train, finished, validation, alpha=0.5), 1).stderr
    assert (line[:7], line.count("\n")) == ("error: ", 1)
    assert all(text in line for text in ("another alpha", str(finished), "expected: 0.7", "got: 0.5"))
    assert "another cache.shards" in refused(arguments(validation, finished))
    assert "another cache.label_identity" in refused(arguments(caches / "stranger", finished))
    assert "another validation cache" in refused(arguments(train, finished, caches / "more"))
    (tmp_path / "thesis.tex").write_text("x")
    assert "no run" in refused(arguments(train, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"alhpa": 1}, "did you mean 'alpha'?"),
        ({"temperature": 3.0}, "one of 0.5, 1, 1.5, 2"),
        ({"lr_scheduler_type": "zigzag"}, "zigzag"),
        pytest.param({"fsdp": True}, "FSDP needs accelerators", marks=ON_A_PROCESSOR),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(caches, tmp_path, changes, text):
    assert text in refused(arguments(caches / "train", tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_validation_cache_of_another_teacher_is_refused(caches, tmp_path):
    line = refused(arguments(caches / "train", tmp_path / "run", caches / "stranger"))
    assert "label identities" in line
    assert str(caches / "stranger") in line
    assert not (tmp_path / "run").exists()


def test_several_caches_mixed_by_weight(caches, tmp_path):
    """Killed, resumed, compared with an uninterrupted run, and exported."""
    more, out, whole = caches / "more", tmp_path / "run", tmp_path / "whole"

    def command(out, *, weights=(0.7, 0.3), others=(more,)):
        extra = [f"--cache={path}:{weight}" for path, weight in zip(others, weights[1:], strict=True)]
        return [*arguments(f"{caches / 'train'}:{weights[0]}", out, num_train_epochs=3, max_steps=-1), *extra]

    run(command(whole))
    code, _ = stop_when(command(out), (out / "checkpoint-5" / "COMPLETE").exists, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert "another cache.weight" in refused(command(out, weights=(0.6, 0.4)))
    assert "another cache.shards" in refused(command(out, weights=(0.7,), others=()))
    assert "another cache.shards" in refused(command(out, others=(caches / "validation",)))
    assert "continuing from" in run(command(out)).stderr
    same_student(whole, out)
    record = json.loads((out / "run.json").read_text())
    assert [cache["weight"] for cache in record["caches"]] == [0.7, 0.3]
    assert record["caches"][0]["label_identity"] == record["caches"][1]["label_identity"]
    assert record["caches"][0]["shards"] != record["caches"][1]["shards"]
    assert record["data"]["rows_per_epoch"] == (175 - 8) + (92 - 3)
    assert run_here([*COMMAND, "export", str(out), "--out", str(tmp_path / "student")]) is None
    card = (tmp_path / "student" / "README.md").read_text()
    assert "- made (train, 8 documents, in a cache of weight 0.7), license" in card
    assert "- made (train, 3 documents, in a cache of weight 0.3), license" in card


@pytest.mark.parametrize(("loss", "drawn_from"), [("sampled", "full"), ("hybrid", "tail")])
def test_a_run_on_sampled_targets(tmp_path, loss, drawn_from):
    from shared.model.gpt import GPT, IGNORE, PRESETS
    from stage2_student.dataset import PackedBlocks

    samples = {"temperature": 1.5, "num": 6, "drawn_from": drawn_from}
    cache = make_cache(tmp_path / "train", samples=samples)
    held_out = make_cache(tmp_path / "validation", samples=samples, seed=1, lengths=(30, 20, 10, 5))
    out = tmp_path / "run"
    command = arguments(cache.path, out, held_out.path, loss=loss, temperature=1.0, max_steps=4, save_steps=0)
    assert run_here(command) is None
    record = json.loads((out / "run.json").read_text())
    assert (record["state"], record["config"]["loss"]) == ("finished", loss)
    model = GPT(dataclasses.replace(PRESETS["tiny"], vocab_size=VOCABULARY))
    model.load_state_dict(load_file(out / "model.safetensors"))
    kd, num_targets = 0.0, 0
    data = PackedBlocks([held_out], block_size=48, seed=0, temperature=1.0, with_samples=True)
    for item in data:
        inputs = (torch.from_numpy(item[name])[None] for name in ("input_ids", "position_ids"))
        with torch.no_grad():
            log_q = model(*inputs).logits[0].double().log_softmax(1)
        valid, soft = torch.from_numpy(item["labels"] != IGNORE), decoded(item, data)
        rows = -(soft.sample_weights * log_q.gather(1, soft.sample_ids)).sum(1)
        if loss == "hybrid":
            rows -= (soft.logp.double().exp() * log_q.gather(1, soft.ids)).sum(1)
        kd, num_targets = kd + rows[valid].sum().item(), num_targets + int(valid.sum())
    assert record["metrics"]["eval_kd"] == pytest.approx(kd / num_targets, rel=1e-5)
    refusal = refused(arguments(cache.path, tmp_path / "none", loss=loss, temperature=2.0))
    assert "samples_temperature=1.5; got: temperature=2" in refusal
    assert not (tmp_path / "none").exists()


def test_caches_that_do_not_go_together_are_refused(caches, tmp_path):
    train, stranger = caches / "train", caches / "stranger"
    line = refused([*arguments(train, tmp_path / "run"), "--cache", str(stranger)])
    for words in ("label identities", str(train), str(stranger)):
        assert words in line
    again = f"{caches}/./train"
    assert "a cache is given twice" in refused([*arguments(train, tmp_path / "run"), "--cache", again])
    assert not (tmp_path / "run").exists()


def test_micro_batches_and_accumulation_do_not_change_the_loss(caches, tmp_path):
    runs = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        out = tmp_path / str(size)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        command = arguments(caches / "train", out, max_steps=4, logging_steps=1, temperature=1.5, **options)
        assert run_here(command) is None
        runs.append(log_of(out))
    for other in runs[1:]:
        assert len(other) == len(runs[0]) == 4
        for a, b in zip(runs[0], other, strict=True):
            for key in ("loss", "kd", "ce", "grad_norm"):
                assert a[key] == pytest.approx(b[key], rel=1e-5), key


def test_an_export_loads_as_a_plain_transformers_model(finished, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shared.model.gpt import GPT, PRESETS

    result = run([*COMMAND, "export", str(finished), "--out", str(tmp_path / "student")])
    assert result.stdout == f"{tmp_path / 'student'}\n"
    assert result.stderr.count("license of") == 2
    card = (tmp_path / "student" / "README.md").read_text()
    assert card.count("license: unknown") == card.count("Attribution: unknown") == 2
    assert sorted(path.name for path in (tmp_path / "student").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "lineage.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    ours = GPT(dataclasses.replace(PRESETS["tiny"], vocab_size=VOCABULARY))
    ours.load_state_dict(load_file(finished / "model.safetensors"))
    ids = torch.arange(1, 41).view(2, 20)
    torch.testing.assert_close(model(ids).logits, ours(ids).logits, rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    inputs = tokenizer("def add", return_tensors="pt")
    generated = model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False)
    greedy = inputs["input_ids"]
    while greedy.shape[1] < generated.shape[1]:
        greedy = torch.cat([greedy, ours(greedy).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, greedy)
    assert (model.generation_config.eos_token_id, model.config.bos_token_id) == (0, 0)
    (tmp_path / "student" / "config.json").write_text("{}")
    assert "not empty" in refused([*COMMAND, "export", str(finished), "--out", str(tmp_path / "student")])


def test_an_unfinished_run_is_not_exported(finished, tmp_path):
    (tmp_path / "run").mkdir()
    record = json.loads((finished / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"state": "running"}))
    for folder in (tmp_path / "run", tmp_path / "nothing"):
        assert "finished training run" in refused([*COMMAND, "export", str(folder), "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("fault", ["missing", "damaged"])
def test_a_finished_run_without_its_weights_makes_them_again(finished, caches, tmp_path, fault):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    weights = (out / "model.safetensors").read_bytes()
    if fault == "missing":
        (out / "model.safetensors").unlink()
    else:
        (out / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    result = run(arguments(caches / "train", out, caches / "validation"))
    assert "missing or damaged" in result.stderr
    assert (out / "model.safetensors").read_bytes() == weights


def test_a_path_that_cannot_be_written_is_one_line(caches, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        result = run(arguments(caches / "train", out), code=1)
        assert [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in result.stderr


def test_values_no_run_can_have_are_refused(caches, tmp_path):
    for change in ({"seed": -1}, {"dataloader_num_workers": -1}, {"num_train_epochs": 0}, {"learning_rate": 0}):
        assert next(iter(change)) in refused(arguments(caches / "train", tmp_path / "run", **change))
    command = [*arguments(caches / "train", tmp_path / "run"), "--set", "max_grad_norm=inf"]
    assert "max_grad_norm" in refused(command)
    assert not (tmp_path / "run").exists()
