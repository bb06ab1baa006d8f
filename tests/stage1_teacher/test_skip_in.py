"""`teacher build --skip-in` and `cache repair` through real processes."""

import json
import os
import subprocess
import sys
import time

import pytest

from shared.cache.manifest import read_manifest
from shared.cache.verify import verify_cache
from shared.errors import CacheFormatError, CacheMismatchError, ConfigError, ResumeError
from tests.stage1_teacher.test_build import build
from tests.support import warm
from tests.support.small_teacher import save_teacher

PROGRAM = [sys.executable, "-c", "from shared.__main__ import main; main()"]


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture
def grown(tmp_path, rows):
    """The same rows and twelve more."""
    path = tmp_path / "grown.jsonl"
    more = [{"prompt": f"# more {i}", "completion": f"\nz = {i} * {i}\n" + "w = z\n" * (i % 4)} for i in range(12)]
    path.write_text(rows.read_text() + "".join(json.dumps(row) + "\n" for row in more))
    return path


def files(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_only_new_documents_are_labelled_and_a_kill_changes_no_byte(teacher, rows, grown, tmp_path):
    first, _ = build(teacher, rows, tmp_path / "first")
    with pytest.raises(ResumeError, match=r"other sources;.*with --skip-in .*first a new cache holds only what"):
        build(teacher, grown, first.path)
    skip = ("--skip-in", str(first.path))
    second, result = build(teacher, grown, tmp_path / "second", *skip)
    assert "20 of 32 documents are skipped" in result.stderr
    assert [second.meta(i)["id"] for i in range(second.num_documents)] == [str(i + 1) for i in range(20, 32)]
    (source,) = second.manifest.sources
    assert (source["name"], source["num_documents"], source["num_skipped"]) == ("grown.jsonl", 32, 20)
    assert second.label_identity == first.label_identity and verify_cache(second.path) == []
    recorded = json.loads((second.path / "build.json").read_text())["options"]["skip_in"]
    assert recorded == [read_manifest(first.path).digest]
    expected = files(second.path)
    _, result = build(teacher, grown, second.path, *skip)
    assert "up to date" in result.stderr
    with pytest.raises(ResumeError, match="skip_in"):
        build(teacher, grown, second.path)
    assert files(second.path) == expected
    with pytest.raises(ConfigError, match="every document is in a cache of --skip-in"):
        build(teacher, grown, tmp_path / "third", *skip, "--skip-in", str(second.path))

    out = tmp_path / "killed"
    arguments = ["teacher", "build", "--teacher", str(teacher), "--dataset", str(grown), "--out", str(out), *skip]
    arguments += ["--dtype", "float32", "--shard-tokens", "300"]
    process = warm.Command(*arguments, env=os.environ)
    while not (out / "shard-00000.json").exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert (out / "shard-00000.json").exists()
    build(teacher, grown, out, *skip)
    assert files(out) == expected


def test_another_teacher_or_other_label_options_are_refused(teacher, rows, grown, tmp_path, tokenizer):
    skip = ("--skip-in", str(build(teacher, rows, tmp_path / "first")[0].path))
    with pytest.raises(CacheMismatchError, match=r"differ in labels\.top_k; expected: labels\.top_k 64; got: .* 5"):
        build(teacher, grown, tmp_path / "out", *skip, "--top-k", "5")
    other = save_teacher(tmp_path / "o", tokenizer, width=len(tokenizer), change=lambda m: m.lm_head.weight.mul_(2))
    with pytest.raises(CacheMismatchError, match=r"differ in teacher\.weights_digest"):
        build(other, grown, tmp_path / "out", *skip)
    with pytest.raises(CacheFormatError):
        build(teacher, grown, tmp_path / "out", "--skip-in", str(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()


def test_repair_names_the_documents_and_the_same_build_makes_them_again(teacher, rows, tmp_path):
    out = tmp_path / "cache"
    cache, _ = build(teacher, rows, out)
    before = files(out)
    names = [cache.meta(i)["id"] for i in range(20)]
    damaged = json.loads(before["shard-00001.json"])
    first, count = cache.shard_indptr[1], len(damaged["documents"])
    (out / "shard-00001.h5").write_bytes(before["shard-00001.h5"][:-1])
    (out / "tokenizer" / "tokenizer.json").unlink()
    done = subprocess.run([*PROGRAM, "cache", "repair", str(out)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert f"shard-00001: damaged; removed, with documents {json.dumps(names[first : first + count])}:" in done.stdout
    assert "tokenizer/tokenizer.json: missing" in done.stdout
    _, result = build(teacher, rows, out)
    assert f"{cache.num_shards - 1} of {cache.num_shards} shards are done already" in result.stderr
    assert files(out) == before


def test_documents_that_share_text_with_a_benchmark_are_left_out(teacher, rows, tmp_path):
    from data.humaneval import load_humaneval

    problem, path = load_humaneval()[0], tmp_path / "planted.jsonl"
    copies = [{"prompt": problem.prompt.rstrip(), "completion": "\n" + (problem.canonical_solution or "")}]
    copies += [{"prompt": "", "completion": copies[0]["prompt"].replace("numbers", "x") + copies[0]["completion"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in copies) + rows.read_text())
    cache, result = build(teacher, path, tmp_path / "cache", "--decontaminate", "humaneval", "--max-lossy", "1")
    assert "2 documents share text with a benchmark and are left out: 1 (HumanEval/0, run), 2" in result.stderr
    assert [cache.meta(i)["id"] for i in range(cache.num_documents)] == [str(i + 3) for i in range(20)]
    (source,) = cache.manifest.sources
    assert (source["num_documents"], source["num_contaminated"]) == (22, 2)
    assert source["contaminated"] == {"1": "HumanEval/0, run", "2": "HumanEval/0, run"}
    assert source["benchmarks"]["names"] == ["humaneval"] and verify_cache(cache.path) == []
    _, result = build(teacher, path, cache.path, "--decontaminate", "humaneval", "--max-lossy", "1")
    assert "up to date" in result.stderr
    with pytest.raises(ResumeError, match="benchmarks"):
        build(teacher, path, cache.path, "--decontaminate", "none", "--max-lossy", "1")
    whole, result = build(teacher, path, tmp_path / "whole", "--decontaminate", "none", "--max-lossy", "1")
    assert whole.num_documents > cache.num_documents and "share text" not in result.stderr


def test_documents_keep_who_wrote_them(teacher, tmp_path):
    path = tmp_path / "written.jsonl"
    written = [None, "1999", {"origin": "teacher", "verdict": "passed"}, {"origin": "teacher", "verdict": "failed"},
               {"origin": "student", "verdict": None}, {"origin": "somebody"}]  # fmt: skip
    path.write_text("".join(json.dumps({"prompt": f"# {i}", "completion": f"\nx = {i}\n", "written": by}) + "\n"
                            for i, by in enumerate(written)))  # fmt: skip
    cache, result = build(teacher, path, tmp_path / "cache")
    origins = [cache.meta(i)["origin"] for i in range(cache.num_documents)]
    assert origins == ["corpus", "corpus", "teacher", "teacher", "student", "corpus"]
    (source,) = cache.manifest.sources
    assert source["written"] == {"teacher": {"documents": 2, "passed": 1}, "student": {"documents": 1, "passed": 0}}
    assert "2 documents were written by a teacher; 1 passed their tests" in result.stderr
    for license in ("\ud800", "x\x1b[31m", "L" * 201, ["MIT"]):
        by = {"origin": "teacher", "license": license}
        path.write_text(json.dumps({"prompt": "# 1", "completion": "\nx = 1\n", "written": by}) + "\n")
        with pytest.raises(ConfigError, match=r"field 'written.license'; expected: an SPDX expression"):
            build(teacher, path, tmp_path / "no")
