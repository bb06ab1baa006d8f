"""`teacher build` in several processes: the cache is that of one process, whoever dies on the way."""

import json
import os
import signal
import subprocess
import time

import pytest
import torch

from shared.process import own_command
from stage1_teacher import capture
from stage1_teacher.cli import teacher as command
from tests.support import hub_contents, warm

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    hub_contents.starcoder2(folder / "teacher")
    rows = [{"prompt": f"def add_{i}(x):", "completion": f"\n    return x + {i}\n" * (1 + i % 7)} for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["build", "--teacher", str(folder / "teacher"), "--dataset", str(folder / "rows.jsonl")]
    return [*command, "--shard-tokens", "250", "--batch-tokens", "128", "--dtype", "float32", "--samples", "4"]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "cache"
    alone(arguments, out)
    assert len(list(out.glob("shard-*.h5"))) >= 8
    return contents(out)


def alone(arguments, out):
    """A build in this process, on one thread as each rank's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WANDB_MODE", "disabled")
            command.main([*arguments, "--out", str(out)], standalone_mode=False)
    finally:
        torch.set_num_threads(threads)


def contents(out):
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in out.rglob("*") if file.is_file()}


def run_ranks(arguments, out, num_processes):
    return warm.run_ranks(num_processes, "teacher", *arguments, "--out", out, env=ENVIRONMENT, timeout=200)


def test_four_processes_make_the_same_cache(arguments, whole, tmp_path):
    """Sampled ids included: their seeds follow from the documents, not from who labels them."""
    codes, errors = run_ranks(arguments, tmp_path / "cache", 4)
    assert codes == [0] * 4, errors
    assert contents(tmp_path / "cache") == whole
    assert "in each of 4 processes, 1 CPU threads" in errors
    assert errors.count("labelling") == 1  # rank 0 alone speaks


def test_a_rank_that_is_killed_ends_the_job_and_another_number_finishes(arguments, whole, tmp_path):
    out = tmp_path / "cache"
    launcher = ["--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*launcher, *own_command("teacher", *arguments, "--out", str(out))]
    process = warm.Command(*command, program=warm.TORCHRUN, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not list(out.glob("shard-*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert not (out / "manifest.json").exists()

    codes, errors = run_ranks(arguments, out, 3)
    assert codes == [0] * 3, errors
    assert "shards are done already" in errors
    assert errors.count("60 documents are tokenised already") == 1
    assert contents(out) == whole
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache"]


def test_one_error_for_all_ranks(arguments, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/diary.txt").write_text("mine")
    codes, errors = run_ranks(arguments, tmp_path / "cache", 2)
    assert codes == [1, 1], errors
    assert errors.count("error: the folder holds something that is no cache") == 1
    assert "another process of this run has ended" not in errors


def test_out_of_memory_takes_the_shard_again_with_half_the_budget(arguments, whole, tmp_path, monkeypatch, capsys):
    """A teacher on a device that holds 100 tokens."""
    load_frozen = capture.load_frozen

    def small_device(*args, **options):
        teacher = load_frozen(*args, **options)

        def refuse(module, args, kwargs):
            if kwargs["input_ids"].numel() > 100:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        teacher.model.register_forward_pre_hook(refuse, with_kwargs=True)
        return teacher

    monkeypatch.setattr(capture, "load_frozen", small_device)
    out = tmp_path / "cache"
    alone(arguments, out)
    assert "out of memory; this shard is done again with batches of 64 tokens" in capsys.readouterr().err
    budgets = {json.loads(file.read_text())["capture"]["token_budget"] for file in out.glob("shard-*.json")}
    assert budgets == {64, 128}
    assert contents(out).keys() == whole.keys()
