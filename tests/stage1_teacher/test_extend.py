"""`teacher build --extend` and `cache repair` through real processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from shared.cache.reader import Cache
from shared.cache.verify import verify_cache
from shared.errors import CacheMismatchError, ResumeError
from tests.stage1_teacher.test_build import build, rows, save_teacher, teacher, tokenizer  # noqa: F401

PROGRAM = [sys.executable, "-c", "from shared.__main__ import main; main()"]


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture
def grown(tmp_path, rows):  # noqa: F811
    """The same rows and twelve more."""
    path = tmp_path / "grown.jsonl"
    more = [{"prompt": f"# more {i}", "completion": f"\nz = {i} * {i}\n" + "w = z\n" * (i % 4)} for i in range(12)]
    path.write_text(rows.read_text() + "".join(json.dumps(row) + "\n" for row in more))
    return path


def files(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_only_new_documents_are_labelled_and_a_kill_changes_no_byte(teacher, rows, grown, tmp_path):  # noqa: F811
    base, _ = build(teacher, rows, tmp_path / "whole")
    build(teacher, rows, tmp_path / "killed")
    with pytest.raises(ResumeError, match=r"other sources;.*add to a finished cache with --extend"):
        build(teacher, grown, tmp_path / "whole")
    whole, result = build(teacher, grown, tmp_path / "whole", "--extend")
    assert "20 of 32 documents are there already" in result.stderr
    assert (whole.num_documents, whole.num_shards) == (32, base.num_shards + 2)
    assert [whole.meta(i)["id"] for i in range(32)] == [str(i + 1) for i in range(32)]
    assert [source["name"] for source in whole.manifest["sources"]] == ["rows.jsonl", "grown.jsonl"]
    assert whole.manifest["sources"][1]["num_new_documents"] == 12
    assert whole.label_identity == base.label_identity and verify_cache(whole.path) == []
    expected = files(whole.path)
    for data, options in ((grown, ("--extend",)), (rows, ()), (rows, ("--extend",))):
        _, result = build(teacher, data, whole.path, *options)
        assert "up to date" in result.stderr
    assert files(whole.path) == expected

    out = tmp_path / "killed"
    arguments = ["teacher", "build", "--teacher", str(teacher), "--dataset", str(grown), "--out", str(out), "--extend"]
    arguments += ["--dtype", "float32", "--shard-tokens", "300"]
    with subprocess.Popen([*PROGRAM, *arguments], stderr=subprocess.DEVNULL) as process:
        first_shard = out / f"shard-{base.num_shards:05d}.json"
        while not first_shard.exists() and process.poll() is None:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert first_shard.exists()
    assert Cache(out).num_documents in (20, 32)
    build(teacher, grown, out, "--extend")
    assert files(out) == expected


def test_another_teacher_or_other_label_options_are_refused(teacher, rows, grown, tmp_path, tokenizer):  # noqa: F811
    out = tmp_path / "cache"
    build(teacher, rows, out)
    before = files(out)
    with pytest.raises(CacheMismatchError, match=r"differ in labels\.top_k; expected: labels\.top_k 64; got: .* 5"):
        build(teacher, grown, out, "--extend", "--top-k", "5")
    other = save_teacher(tmp_path / "o", tokenizer, width=len(tokenizer), change=lambda m: m.lm_head.weight.mul_(2))
    with pytest.raises(CacheMismatchError, match=r"differ in teacher\.weights_digest"):
        build(other, grown, out, "--extend")
    assert files(out) == before


def test_repair_names_the_documents_and_the_same_build_makes_them_again(teacher, rows, tmp_path):  # noqa: F811
    out = tmp_path / "cache"
    cache, _ = build(teacher, rows, out)
    before = files(out)
    names = [cache.meta(i)["id"] for i in range(20)]
    damaged = json.loads(before["shard-00001.json"])
    first, count = damaged["first_document"], len(damaged["documents"])
    (out / "shard-00001.h5").write_bytes(before["shard-00001.h5"][:-1])
    (out / "tokenizer" / "tokenizer.json").unlink()
    done = subprocess.run([*PROGRAM, "cache", "repair", str(out)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert f"shard-00001: damaged; removed, with documents {json.dumps(names[first : first + count])}:" in done.stdout
    assert "tokenizer/tokenizer.json: missing" in done.stdout
    _, result = build(teacher, rows, out)
    assert f"{cache.num_shards - 1} of {cache.num_shards} shards are done already" in result.stderr
    assert files(out) == before
