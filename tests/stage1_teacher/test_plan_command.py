"""`teacher plan`, and builds that the disk cannot hold, with a tiny random teacher."""

import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from shared.cache.reader import Cache
from shared.cache.verify import verify_cache
from shared.errors import ConfigError
from stage1_teacher.cli import teacher as command
from tests.stage1_teacher.test_build import build
from tests.support import warm

OPTIONS = ["--dtype", "float32", "--shard-tokens", "300", "--top-k", "20"]


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


def plan(teacher, rows, out, *options, **environment):
    command = ["teacher", "plan", "--teacher", teacher, "--dataset", rows, "--out", out, *OPTIONS, *options]
    return warm.run(*command, env=os.environ | environment, timeout=200)


def test_the_plan_is_what_the_build_then_takes(teacher, rows, tmp_path):
    out = tmp_path / "not" / "yet" / "there"
    done = plan(teacher, rows, out, "--json", "--batch-tokens", "64")
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout, parse_constant=pytest.fail)
    assert not (tmp_path / "not").exists()
    cache, _ = build(teacher, rows, tmp_path / "cache", *OPTIONS, "--batch-tokens", "64")
    statistics = cache.statistics
    assert planned["data"] == {
        "name": rows.name,
        "split": "train",
        "documents": 20,
        "tokens": cache.num_tokens,
        "targets": statistics["targets"],
        "long": {"documents": 0, "become": "split"},
        "not_restored_by_the_tokenizer": 0,
        "lengths": planned["data"]["lengths"],
    }
    assert sum(part["documents"] for part in planned["data"]["lengths"]) == 20
    assert sum(part["tokens"] for part in planned["data"]["lengths"]) == cache.num_tokens
    assert planned["batches"]["shards"] == cache.num_shards
    assert planned["pilot"]["tokens"] == cache.num_tokens  # 64 documents are more than there are

    own = next(choice for choice in planned["choices"] if choice["chosen"])
    assert (own["top_k"], own["top_p"]) == (20, None)
    assert [choice["top_k"] for choice in planned["choices"]] == [8, 16, 20, 32, 64, 128, 20]
    for T, figures in statistics["captured_mass"].items():
        assert own["captured_mass"][T] == pytest.approx(figures["mean"], abs=1e-6)
        assert own["codec_kl_nats"][T]["max"] == pytest.approx(statistics["codec_kl_nats"][T]["max"], rel=1e-3)
    assert own["next_token_in_row"] == pytest.approx(statistics["gold_in_topk"])

    taken = sum(file.stat().st_size for file in cache.path.rglob("*") if file.is_file())
    assert planned["bytes"]["low"] < taken < planned["bytes"]["high"]
    assert planned["bytes"]["expected"] == pytest.approx(taken, rel=0.1)
    assert planned["bytes"]["fits"] is True
    hours = planned["hours"]
    assert 0 < hours["low"] <= hours["expected"] <= hours["high"] < 1
    assert 1 <= hours["break_even_epochs"] < 100
    (weights,) = teacher.glob("*.safetensors")
    assert planned["memory"]["weight_bytes"] == pytest.approx(weights.stat().st_size, abs=4096)  # but for its header
    assert planned["memory"]["peak_resident_bytes"] > planned["memory"]["weight_bytes"]
    assert planned["teacher"]["threads"] == int(os.environ.get("OMP_NUM_THREADS", planned["teacher"]["threads"]))


def test_the_plan_of_a_build_that_has_begun_takes_its_tokens(teacher, rows, tmp_path, monkeypatch):
    out = tmp_path / "cache"
    arguments = ["plan", "--teacher", teacher, "--dataset", rows, "--out", out, *OPTIONS, "--json"]
    arguments = list(map(str, arguments))
    before = json.loads(CliRunner().invoke(command, arguments).stdout)["data"]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("stage1_teacher.capture.capture_shard", interrupt)
        build(teacher, rows, out, *OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr("stage1_teacher.store.cut_documents", None)  # nothing is tokenised
        result = CliRunner().invoke(command, arguments)
        assert result.exit_code == 0, result.exception
        assert json.loads(result.stdout)["data"] == before
        build(teacher, rows, out, *OPTIONS)  # which the plan has left alone


def test_the_plan_of_the_first_documents_reads_no_more(teacher, rows, tmp_path):
    with rows.open("a") as file:
        file.write("no JSON\n")
    done = plan(teacher, rows, tmp_path / "out", "--json", "--limit-docs", "20", "--pilot-docs", "2")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["data"]["documents"] == 20


def test_the_plan_as_text(teacher, rows, tmp_path):
    arguments = ["plan", "--teacher", teacher, "--dataset", rows, "--out", tmp_path / "out", *OPTIONS]
    result = CliRunner().invoke(command, list(map(str, [*arguments, "--top-p", "0.9", "--samples", "4"])))
    assert result.exit_code == 0, result.output
    shown = result.stdout.splitlines()
    (header,) = (i for i, line in enumerate(shown) if line.split()[:2] == ["K", "top-p"])
    lines = dict(line.split(maxsplit=1) for line in shown[:header])
    assert lines["data"].startswith("rows.jsonl train: 20 documents, ")
    assert "(torchrun sets OMP_NUM_THREADS=1" in lines["device"]
    assert "it fits" in lines["size"]
    assert [line.split()[0] for line in shown[header + 1 : -1]] == ["8", "16", "32", "64", "128", "20", "20"]
    (own,) = (line for line in shown if line.endswith("asked for"))
    assert own.split()[:2] == ["20", "0.9"]
    assert shown[-1].startswith("mass: in the row, mean; KL: ")


def test_it_says_why_it_cannot_plan(teacher, rows, tmp_path):
    under_torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    for environment, message in ((under_torchrun, "one process"), ({}, "top_k")):
        done = plan(teacher, rows, tmp_path / "out", *([] if environment else ["--top-k", "0"]), **environment)
        assert done.returncode == 1
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def on_a_small_disk(tmp_path, kilobytes, *steps):
    """Run shell steps in a mount namespace where $DISK is a tmpfs of that size; None where none can be mounted."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs {disk}"
    try:
        if subprocess.run([*namespace, mount], capture_output=True).returncode != 0:
            pytest.skip("no tmpfs can be mounted here")
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    script = "\n".join([mount, f"DISK={disk}", *steps])
    return subprocess.run([*namespace, script], capture_output=True, text=True, timeout=250)


def command_line(teacher, rows):
    program = f"{sys.executable} -c 'from shared.__main__ import main; main()'"
    return f"{program} teacher build --teacher {teacher} --dataset {rows} --out $DISK/cache {' '.join(OPTIONS)}"


def test_a_pilot_without_memory_is_one_line(teacher, rows, tmp_path, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")

    monkeypatch.setattr("stage1_teacher.capture.capture_shard", exhausted)
    arguments = ["plan", "--teacher", teacher, "--dataset", rows, "--out", tmp_path / "cache", *OPTIONS]
    error = CliRunner().invoke(command, list(map(str, arguments))).exception
    assert isinstance(error, ConfigError)
    assert "batch_tokens = 1,024; got: CUDA out of memory. Tried to allocate 2 GiB.; fix" in str(error)


@pytest.mark.parametrize(
    ("kilobytes", "what"), [(8, "No space left on device"), (36, "the disk cannot hold the cache")]
)
def test_a_build_that_cannot_fit_does_not_start(teacher, rows, tmp_path, kilobytes, what):
    """Neither where there is no room for its tokens, nor where there is none for the cache beside them."""
    done = on_a_small_disk(tmp_path, kilobytes, command_line(teacher, rows), "echo code $?", "ls -A $DISK")
    assert done.stdout == "code 1\n"  # and nothing is on the disk
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert what in error
    assert "labelling" not in done.stderr


def test_a_build_stops_once_real_shards_show_that_it_cannot_fit(teacher, rows, tmp_path):
    whole, _ = build(teacher, rows, tmp_path / "whole", *OPTIONS)
    sizes = [(whole.path / f"shard-{i:05d}.h5").stat().st_size for i in range(whole.num_shards)]
    room = sizes[0] + sum(sizes[1:]) // 2 + 30_000  # the records take some
    done = on_a_small_disk(
        tmp_path, room // 1024, command_line(teacher, rows), "echo code $?", "ls $DISK/cache",
        "mount -o remount,size=10m $DISK", command_line(teacher, rows), f"cp -r $DISK/cache {tmp_path}/copy",
    )  # fmt: skip
    first, _, rest = done.stdout.partition("shard-00000.json\n")
    assert first == "code 1\nbuild.json\nshard-00000.h5\n", done.stderr
    assert not rest.startswith("shard-0")
    assert "the disk cannot hold the cache" in done.stderr
    assert "1 of " in done.stderr and "shards are done already" in done.stderr
    assert verify_cache(tmp_path / "copy") == []
    for i in range(whole.num_shards):
        name = f"shard-{i:05d}.h5"
        assert (tmp_path / "copy" / name).read_bytes() == (whole.path / name).read_bytes()
    assert Cache(tmp_path / "copy").label_identity == whole.label_identity
