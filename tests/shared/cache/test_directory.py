"""A cache as a directory: built, killed, resumed, changed, read and verified."""

import copy
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from shared.cache.attach import add_files
from shared.cache.cli import cache as cache_command
from shared.cache.identity import label_identity, require_same
from shared.cache.info import cache_info
from shared.cache.manifest import seal, unseal
from shared.cache.reader import Cache, ShardMemory
from shared.cache.repair import repair_cache
from shared.cache.verify import verify_cache
from shared.cache.writer import CacheWriter
from shared.errors import CacheCorruptError, CacheFormatError, CacheMismatchError, ConfigError, ResumeError
from tests.support.cache_faults import contents
from tests.support.cache_rows import GRID, IDENTITY, SOURCES, build, build_options, small_shard


@pytest.fixture
def cache(tmp_path):
    build(tmp_path / "cache")
    return tmp_path / "cache"


def test_manifest(cache):
    manifest = json.loads((cache / "manifest.json").read_bytes())
    assert list(manifest) == [
        "format", "version", "label_identity", "identity", "sources", "codec", "filter", "temperatures", "top_k",
        "tokenizer_size", "head_width", "documents_per_shard", "num_documents", "num_tokens", "num_entries",
        "statistics", "files", "build", "digest",
    ]  # fmt: skip
    assert (manifest["num_documents"], manifest["num_tokens"], manifest["num_entries"]) == (6, 26, 80)
    assert manifest["label_identity"] == label_identity(IDENTITY)
    assert list(manifest["files"]) == [
        "build.json", "doc_lengths.u32", "shard-00000.h5", "shard-00000.json", "shard-00001.h5", "shard-00001.json",
        "tokenizer/tokenizer.json",
    ]  # fmt: skip
    body, _, _ = (cache / "manifest.json").read_bytes().rpartition(b',\n  "digest"')
    assert manifest["digest"] == hashlib.sha256(body).hexdigest()
    assert (cache / "doc_lengths.u32").read_bytes() == np.array([5, 1, 7] * 2, "<u4").tobytes()
    assert verify_cache(cache) == []
    assert sorted(contents(cache)) == sorted([*manifest["files"], "manifest.json"])


def test_statistics_of_all_shards(cache):
    """Those of two equal halves, weighted by their rows and targets."""
    whole = Cache(cache).statistics
    parts = [json.loads((cache / f"shard-0000{i}.json").read_bytes())["statistics"] for i in range(2)]
    assert whole["tokens"] == 26 and whole["rows"] == 20
    for key in ("entropy_nats", "gold_in_topk", "teacher_nll_nats", "teacher_nll_all_nats"):
        assert whole[key] == pytest.approx(np.mean([part[key] for part in parts]), rel=1e-12)
    for T in ("0.5", "1", "1.5", "2"):
        assert whole["codec_kl_nats"][T]["max"] == max(part["codec_kl_nats"][T]["max"] for part in parts)
        assert whole["captured_mass"][T]["p1"] == min(part["captured_mass"][T]["p1"] for part in parts)


@pytest.mark.parametrize("T", GRID)
def test_documents_read_back(cache, T):
    opened = Cache(cache)
    assert opened.doc_lengths.tolist() == [5, 1, 7, 5, 1, 7]
    for doc in range(6):
        arrays = small_shard(doc // 3)
        rows = slice(*arrays.doc_indptr[doc % 3 : doc % 3 + 2])
        entries = slice(*arrays.row_indptr()[[rows.start, rows.stop]])
        assert np.array_equal(opened.tokens(doc), arrays.tokens[rows])
        assert np.array_equal(opened.loss_mask(doc), arrays.loss_mask[rows] == 1)
        assert opened.meta(doc) == arrays.doc_meta[doc % 3]
        targets = opened.targets(doc, T)
        n = rows.stop - rows.start
        assert (targets.ids.shape, targets.ids.dtype, targets.logp.dtype) == ((n, 4), np.int64, np.float32)
        assert np.array_equal(targets.ids[:-1].ravel(), arrays.topk_ids[entries])
        weights = np.exp(-arrays.topk_margins[entries].reshape(-1, 4).astype(np.float64) / T)
        tail = np.exp(arrays.tail_log[rows, GRID.index(T)][:-1])
        total = weights.sum(1) + tail
        np.testing.assert_allclose(targets.logp[:-1], np.log(weights / total[:, None]), atol=0.05)
        np.testing.assert_allclose(targets.log_tail[:-1], np.log(tail / total), atol=0.05)
        part = opened.targets(doc, T, 1, 4)
        assert np.array_equal(part.logp, targets.logp[1:4]) and np.array_equal(part.k, targets.k[1:4])


def test_a_temperature_off_the_grid_is_refused(cache):
    with pytest.raises(CacheMismatchError, match=r"expected: one of 0\.5, 1, 1\.5, 2; got: 3"):
        Cache(cache).targets(0, 3.0)


def test_documents_out_of_range(cache):
    for doc in (-1, 6):
        with pytest.raises(IndexError):
            Cache(cache).tokens(doc)


def test_decoded_shards_are_bounded(cache):
    opened = Cache(cache, memory=ShardMemory(1))
    first, second = opened.load_shard(0), opened.load_shard(1)
    assert opened.load_shard(1) is second
    assert opened.load_shard(0) is not first


def read_in_child(opened):
    return opened.targets(4, 1.0).logp.tolist(), opened.targets(2, 1.0).logp.tolist()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_other_processes_read(cache, method):
    opened = Cache(cache)
    expected = read_in_child(opened)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(read_in_child, (opened,)) == expected
    assert len(pickle.dumps(opened)) < 10_000


def test_a_read_only_folder_is_read_and_left_alone(cache):
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in [cache, *cache.rglob("*")]}
    for file in before:
        file.chmod(0o555 if file.is_dir() else 0o444)
    Cache(cache).targets(0, 1.0)
    assert verify_cache(cache) == [] and cache_info(cache)["finished"]
    build(cache)  # finished and equal: nothing to write
    assert {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in [cache, *cache.rglob("*")]} == before
    for file in before:
        file.chmod(0o755)


# --- resume ----------------------------------------------------------------------------------------------------------


def test_whole_shards_are_kept_and_damaged_ones_written_again(tmp_path):
    path = tmp_path / "cache"
    with CacheWriter(path, build_options()) as writer:
        for shard in range(2):
            writer.write_shard(shard, small_shard(shard), {})
    data = bytearray((path / "shard-00001.h5").read_bytes())
    data[-1] ^= 1
    (path / "shard-00001.h5").write_bytes(data)
    with CacheWriter(path, build_options()) as writer:
        assert (writer.has_shard(0), writer.has_shard(1), writer.has_shard(2)) == (True, False, False)
        with pytest.raises(CacheFormatError, match="a shard is incomplete"):
            writer.finish(IDENTITY, SOURCES)


def test_a_finished_cache_that_lost_a_shard_is_built_again(cache):
    before = contents(cache)
    (cache / "shard-00001.h5").unlink()
    build(cache)
    assert contents(cache) == before


def test_missing_shards_are_not_finished(tmp_path):
    with CacheWriter(tmp_path / "c", build_options()) as writer:
        writer.write_shard(1, small_shard(1), {})
        with pytest.raises(CacheFormatError, match=r"shards are missing.*expected: 2; got: 1"):
            writer.finish(IDENTITY, SOURCES)


@pytest.mark.parametrize("finished", [True, False])
def test_other_options_are_refused_by_name(tmp_path, finished):
    path = tmp_path / "cache"
    if finished:
        build(path, teacher={"digest": "a"})
    else:
        CacheWriter(path, build_options(teacher={"digest": "a"})).close()
    before = contents(path)
    for change, message in [
        ({"top_k": 5}, "another top_k;.*expected: 4; got: 5"),
        ({"teacher": {"digest": "b"}}, r"another teacher\.digest;.*expected: a; got: b"),
        ({"more": None}, "another more;.*"),
    ]:
        with pytest.raises(ResumeError, match=message):
            CacheWriter(path, build_options(**{"teacher": {"digest": "a"}} | change))
    assert contents(path) == before


@pytest.mark.parametrize("name", ["notes.txt", "build.json", "shard-00000.h5", "src/x.py"])
def test_a_foreign_folder_is_refused_and_left_alone(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    with pytest.raises(ResumeError):
        CacheWriter(tmp_path, build_options())
    assert contents(tmp_path) == {name: b"{}"}


def test_an_option_that_the_writer_needs(tmp_path):
    options = build_options()
    del options["top_k"]
    with pytest.raises(CacheFormatError, match="lacks an option; expected: top_k"):
        CacheWriter(tmp_path / "c", options)
    assert not (tmp_path / "c").exists()


def test_refused_labels_name_their_shard(tmp_path):
    with (
        CacheWriter(tmp_path / "c", build_options(tokenizer_size=20, head_width=20)) as writer,
        pytest.raises(
            CacheFormatError, match=r"token id is out of range; where: shard-00003, document 'doc/\d', position \d"
        ),
    ):
        writer.write_shard(3, small_shard(0), {})


def test_a_full_disk_is_an_ordinary_error(tmp_path):
    """A file-size limit stands for the full disk: both fail in write(2). What is there stays, and the build goes on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CacheWriter(tmp_path / "c", build_options()) as writer:
        writer.write_shard(0, small_shard(0), {"token_budget": 64})
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
            with pytest.raises(ResumeError, match=r"cannot be written;.*File too large"):
                writer.write_shard(1, small_shard(1), {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(contents(tmp_path / "c")) == ["build.json", "lock.json", "shard-00000.h5", "shard-00000.json"]
    build(tmp_path / "c")
    assert verify_cache(tmp_path / "c") == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResumeError, match=r"cannot be written;.*Not a directory"):
        CacheWriter(tmp_path / "file" / "c", build_options())


def test_something_foreign_that_appears_during_a_build_is_not_listed(tmp_path):
    with CacheWriter(tmp_path / "c", build_options(num_shards=1)) as writer:
        writer.write_shard(0, small_shard(0), {})
        (tmp_path / "c" / "notes.txt").write_text("")
        with pytest.raises(ResumeError, match=r"no cache;.*got: notes\.txt"):
            writer.finish(IDENTITY, SOURCES)


# --- integrity -------------------------------------------------------------------------------------------------------


def test_every_kind_of_damage_is_found(cache, tmp_path):
    def damage(edit):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        shutil.copytree(cache, tmp_path / "d")
        edit(tmp_path / "d")
        return verify_cache(tmp_path / "d")

    for name, data in contents(cache).items():
        rng = np.random.default_rng(len(name))
        for position in rng.integers(0, len(data), 12):
            flipped = bytearray(data)
            flipped[position] ^= 1 << int(rng.integers(8))
            assert damage(lambda d, n=name, f=flipped: (d / n).write_bytes(f)), (name, position)
        assert damage(lambda d, n=name: (d / n).write_bytes(contents(cache)[n][:-1])), name
        assert damage(lambda d, n=name: (d / n).unlink()), name
        assert damage(lambda d, n=name: (d / n).rename(d / "other")), name
    assert damage(lambda d: (d / "notes").write_text("")) == ["notes: not listed in the manifest"]
    swapped = damage(
        lambda d: [
            (d / f"shard-0000{i}.h5").write_bytes((cache / f"shard-0000{1 - i}.h5").read_bytes()) for i in (0, 1)
        ]
    )
    assert len(swapped) == 2


def replace_by_link(path):
    path.rename(path.with_name("aside"))
    path.symlink_to("aside")


def test_links_folders_and_pipes_in_odd_places(cache, tmp_path):
    def problems(edit):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        shutil.copytree(cache, tmp_path / "d")
        edit(tmp_path / "d")
        return verify_cache(tmp_path / "d")

    assert problems(lambda d: (d / "empty").mkdir()) == ["empty: a folder that is not of the cache"]
    assert problems(lambda d: (d / "tokenizer" / "a" / "b").mkdir(parents=True)) == [
        "tokenizer/a: a folder that is not of the cache", "tokenizer/a/b: a folder that is not of the cache"
    ]  # fmt: skip
    assert problems(lambda d: (d / "loop").symlink_to(".")) == ["loop: not listed in the manifest"]
    assert problems(lambda d: (d / "nothing").symlink_to("nowhere")) == ["nothing: not listed in the manifest"]
    assert problems(lambda d: os.mkfifo(d / "pipe")) == ["pipe: not listed in the manifest"]
    assert problems(lambda d: replace_by_link(d / "build.json")) == ["aside: not listed in the manifest"]
    assert problems(lambda d: (d / "a\nb\udcff").write_text("")) == ["'a\\nb\\udcff': not listed in the manifest"]

    def instead(make):
        def edit(directory):
            (directory / "shard-00000.h5").unlink()
            make(directory / "shard-00000.h5")

        return edit

    for make in (Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path.name), lambda path: path.symlink_to("/dev")):
        assert problems(instead(make))[0] == "shard-00000.h5: no regular file"
        (line,) = problems(lambda d: [(d / "manifest.json").unlink(), (d / "manifest.json").mkdir()])
    assert "the manifest is no regular file" in line
    (line,) = problems(lambda d: [(d / "manifest.json").unlink(), (d / "manifest.json").symlink_to("manifest.json")])
    assert "cannot be read" in line
    (tmp_path / "file").write_text("")
    for path in ("file", "nowhere"):
        assert "there is no cache here" in verify_cache(tmp_path / path)[0]


def leave(path, *names):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"\0\5\26\7")


def test_what_transports_leave_is_named_and_passes(cache):
    names = [
        *(".DS_Store", "._manifest.json", ".cache/huggingface/.gitignore"),
        *(".cache/huggingface/download/manifest.json.metadata", ".fuse_hidden0000000100000002", ".git/HEAD"),
        *(".git/lfs/objects/ab", ".gitattributes", ".gitignore", ".nfs000000000123abcd00000001"),
        *("README.md", "Thumbs.db", "desktop.ini", "tokenizer/._tokenizer.json"),
    ]
    before = contents(cache)
    leave(cache, *names)
    (cache / ".git" / "refs" / "tags").mkdir(parents=True)
    assert verify_cache(cache) == []
    assert verify_cache(cache, strict=True) == [f"{name}: left by a transport" for name in names]
    run = CliRunner().invoke
    passed, refused = run(cache_command, ["verify", str(cache)]), run(cache_command, ["verify", "--strict", str(cache)])
    assert passed.exit_code == 0 and passed.stdout.splitlines()[:-1] == [
        f"{name}: not of the cache; left by a transport" for name in names
    ]
    assert refused.exit_code == 1
    assert len(Cache(cache).tokens(0)) == 5
    assert repair_cache(cache) == []
    build(cache)
    assert contents(cache) == before | dict.fromkeys(names, b"\x00\x05\x16\x07")


@pytest.mark.parametrize("name", [
    ".cache/other/x", "tokenizer/README.md", "sub/.gitattributes", ".cache/huggingface", "tokenizer/.git/HEAD",
])  # fmt: skip
def test_what_only_looks_like_it_does_not_pass(cache, name):
    leave(cache, name)
    assert f"{name}: not listed in the manifest" in verify_cache(cache)


@pytest.mark.parametrize("name", ["inner", "tokenizer/deep/inner", "../link/inner"])
def test_nothing_is_built_inside_another_cache(cache, tmp_path, name):
    (tmp_path / "link").symlink_to(cache, target_is_directory=True)
    before = contents(cache)
    with pytest.raises(ResumeError, match=f"lies in another cache; where: .*inner; got: {cache.resolve()}"):
        build(cache / name)
    assert contents(cache) == before


def test_a_build_in_a_folder_with_side_files_lists_none_of_them(tmp_path):
    leave(tmp_path, ".DS_Store", ".cache/huggingface/x", "README.md")
    build(tmp_path)
    assert verify_cache(tmp_path) == []
    assert not {".DS_Store", "README.md"} & Cache(tmp_path).manifest.files.keys()


def test_hostile_manifests_give_one_line(cache):
    original = (cache / "manifest.json").read_bytes()
    for edit in (
        lambda m: m.update(documents_per_shard=[10**12]),
        lambda m: m.update(documents_per_shard=[]),
        lambda m: m.update(documents_per_shard=[2, 4]),
        lambda m: m["files"]["build.json"].update(bytes="many"),
        lambda m: m["files"].update({"a\0b": {"bytes": 0, "sha256": ""}}),
        lambda m: m["files"].update({"./build.json": m["files"]["build.json"]}),
        lambda m: m["files"].update({"": {"bytes": 0, "sha256": ""}}),
        lambda m: m.update(num_tokens=m["num_tokens"] + 1),
        lambda m: m["identity"]["teacher"].update(weights_digest="other"),
        lambda m: m.update(identity={}),
        lambda m: m.update(statistics={}),
        lambda m: m["statistics"].update(codec_kl_nats=[]),
        lambda m: m["statistics"]["captured_mass"].pop("0.5"),
        lambda m: m.update(sources=[1]),
        lambda m: m.update(temperatures=["1"]),
        lambda m: m.update(temperatures=[0.5]),
        lambda m: m.update(num_tokens=0),
        lambda m: m.update(top_k=65_536),
    ):
        rewrite_manifest(cache, edit)
        (line,) = verify_cache(cache)
        assert "\n" not in line
        shown = CliRunner().invoke(cache_command, ["info", str(cache)]).exception
        assert shown is None or isinstance(shown, CacheFormatError)
        (cache / "manifest.json").write_bytes(original)
    (cache / "manifest.json").write_bytes(b"[" * 100_000)
    assert "the manifest is damaged" in verify_cache(cache)[0]
    body = b'{\n  "format": ' + b"[" * 100_000
    seal = f',\n  "digest": "{hashlib.sha256(body).hexdigest()}"\n}}\n'
    (cache / "manifest.json").write_bytes(body + seal.encode())
    assert "the manifest is damaged" in verify_cache(cache)[0]


def test_pipes_in_the_place_of_files_block_nobody(cache):
    for name in ("shard-00000.json", "shard-00000.h5", "doc_lengths.u32", "manifest.json"):
        data = (cache / name).read_bytes()
        (cache / name).unlink()
        os.mkfifo(cache / name)
        assert len(verify_cache(cache)) == 1
        with pytest.raises(CacheCorruptError, match="no regular file"):
            opened = Cache(cache)
            opened.record(0), opened.doc_lengths, opened.load_shard(0)
        (cache / name).unlink()
        (cache / name).write_bytes(data)
    assert verify_cache(cache) == []


def test_the_reader_names_what_is_wrong(cache):
    shard = cache / "shard-00001.h5"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    opened = Cache(cache)
    opened.tokens(0)
    with pytest.raises(CacheCorruptError, match=r"shard-00001\.h5"):
        opened.load_shard(1)
    shard.write_bytes(data[:-1])
    with pytest.raises(CacheCorruptError, match=r"wrong size; where: .*shard-00001\.h5; expected: \d+ bytes"):
        Cache(cache).load_shard(1)
    shard.unlink()
    with pytest.raises(CacheCorruptError, match=r"missing; where: .*shard-00001\.h5"):
        Cache(cache)


def rewrite_manifest(path, edit):
    manifest = unseal((path / "manifest.json").read_bytes())
    edit(manifest)
    (path / "manifest.json").write_bytes(seal(manifest))


def test_manifests_that_are_refused(cache):
    data = (cache / "manifest.json").read_bytes()
    for changed in (data + b"\n", data[:-1], data.replace(b'"sources"', b'"sourceS"'), data.replace(b" [", b"\t[", 1)):
        (cache / "manifest.json").write_bytes(changed)
        with pytest.raises(CacheCorruptError, match=r"the manifest is damaged; .*; fix: copy the cache again"):
            Cache(cache)
    (cache / "manifest.json").write_bytes(data)
    rewrite_manifest(cache, lambda m: m.update(version=2))
    for read in (Cache, cache_info):
        with pytest.raises(CacheFormatError, match=r"unknown version.*expected: 1; got: 2"):
            read(cache)
    rewrite_manifest(cache, lambda m: m.update(version=1) or m.pop("head_width"))
    with pytest.raises(CacheFormatError, match=r"a field is missing.*head_width"):
        Cache(cache)
    rewrite_manifest(cache, lambda m: m.update(head_width=64))
    for name in ("../x", "/x", "a/../x", ".git/config", ".x.tmp-1", "lock.json", "manifest.json"):
        rewrite_manifest(cache, lambda m, name=name: m["files"].update({name: {"bytes": 0, "sha256": ""}}))
        with pytest.raises(CacheFormatError, match=rf"lists a file wrongly.*{re.escape(name)}"):
            Cache(cache)
        rewrite_manifest(cache, lambda m, name=name: m["files"].pop(name))
    rewrite_manifest(cache, lambda m: m.update(format="other"))
    with pytest.raises(CacheFormatError, match="not a logit cache"):
        Cache(cache)


@pytest.mark.parametrize("name", ["manifest.json", "teacher_eval", "other/x", "teacher_eval/../x", "/teacher_eval/x"])
def test_files_that_cannot_be_added(cache, name):
    with pytest.raises(ConfigError, match="cannot be added"):
        add_files(cache, {name: b""})


# --- identity --------------------------------------------------------------------------------------------------------


def test_label_identity_counts_digests_and_options_alone():
    other = copy.deepcopy(IDENTITY)
    other["teacher"]["name"] = "elsewhere"
    assert label_identity(other) == label_identity(IDENTITY)
    for part, key in [
        ("teacher", "weights_digest"),
        ("teacher", "config_digest"),
        ("tokenizer", "digest"),
        ("labels", "top_k"),
    ]:
        changed = copy.deepcopy(IDENTITY)
        changed[part][key] = "changed"
        assert label_identity(changed) != label_identity(IDENTITY)
        if part != "labels":
            del changed[part][key]
            with pytest.raises(CacheFormatError, match=f"expected: {part}.{key}"):
                label_identity(changed)


def test_require_same_names_both_sides():
    require_same("tokenizer", "a", "a", ours_name="x", theirs_name="y", fix="z")
    with pytest.raises(
        CacheMismatchError, match=r"tokenizer of x and y differ; expected: a \(x\); got: b \(y\); fix: z"
    ):
        require_same("tokenizer", "a", "b", ours_name="x", theirs_name="y", fix="z")


# --- the command line ------------------------------------------------------------------------------------------------


def test_info_and_verify_commands(cache):
    run = CliRunner().invoke
    data = json.loads(run(cache_command, ["info", str(cache), "--json"]).output)
    size = sum(len(data) for name, data in contents(cache).items() if not name.startswith("tokenizer/"))
    assert data["bytes_per_token"] == size / 26
    keys = (
        "num_documents num_tokens num_entries captured_mass_mean encoding_kl_mean_nats encoding_kl_max_nats teacher "
        "tokenizer sources label_identity"
    )
    assert set(keys.split()) <= set(data)
    assert data["teacher"]["name"] == "random" and data["sources"] == SOURCES
    text = run(cache_command, ["info", str(cache)]).output
    assert "6 in 2 shards" in text and label_identity(IDENTITY) in text
    done = run(cache_command, ["verify", str(cache)])
    assert (done.exit_code, done.stdout) == (0, f"{cache}: every file is as the manifest says\n")
    (cache / "extra").write_text("")
    (cache / "build.json").unlink()
    failed = run(cache_command, ["verify", str(cache)])
    assert failed.exit_code == 1
    assert failed.stdout == "build.json: missing\nextra: not listed in the manifest\n"


def test_attach_leaves_what_wandb_recorded_beside_the_results(cache, tmp_path):
    for name in ("fidelity.json", "humaneval/result.json", "wandb/offline-run-1/run-1.wandb"):
        file = tmp_path / "teacher" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"inputs": {}}')
    done = CliRunner().invoke(cache_command, ["attach", str(cache), "--teacher-eval", str(tmp_path / "teacher")])
    assert done.exit_code == 0, done.exception
    attached = {name for name in Cache(cache).manifest.files if name.startswith("teacher_eval/")}
    assert attached == {"teacher_eval/fidelity.json", "teacher_eval/humaneval/result.json"}
    before, times = contents(cache), {file: file.stat().st_mtime_ns for file in cache.rglob("*") if file.is_file()}
    done = CliRunner().invoke(cache_command, ["attach", str(cache), "--teacher-eval", str(tmp_path / "teacher")])
    assert done.exit_code == 0 and {file: file.stat().st_mtime_ns for file in times} == times
    (cache / "teacher_eval" / "fidelity.json").write_text("damaged")
    CliRunner().invoke(cache_command, ["attach", str(cache), "--teacher-eval", str(tmp_path / "teacher")])
    assert contents(cache) == before
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for folder, got in {
        "teacher/wandb": "offline-run-1",
        ".": "cache",
        "empty": "no result",
        "model": "config.json",
    }.items():
        refused = CliRunner().invoke(cache_command, ["attach", str(cache), "--teacher-eval", str(tmp_path / folder)])
        assert refused.exit_code == 1 and got in str(refused.exception), folder
    assert contents(cache) == before


def test_info_during_a_build(tmp_path):
    with CacheWriter(tmp_path / "c", build_options()) as writer:
        writer.write_shard(0, small_shard(0), {})
        info = cache_info(tmp_path / "c")
        assert (info["finished"], info["shards_done"], info["num_shards"], info["in_progress"]) == (False, 1, 2, True)
    output = CliRunner().invoke(cache_command, ["info", str(tmp_path / "c")]).output
    assert "unfinished" in output and "1 of 2 shards done" in output
    with pytest.raises(CacheFormatError, match=r"^an unfinished logit cache;.*1 shards and no manifest"):
        Cache(tmp_path / "c")
    with pytest.raises(CacheFormatError, match="no such folder"):
        cache_info(tmp_path / "nothing")


def test_a_folder_of_something_else_is_no_unfinished_cache(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "manifest.json").write_text("{}")  # of a web page, say
    assert verify_cache(tmp_path)[0].startswith("not a logit cache;")
    for open_cache in (Cache, cache_info):
        with pytest.raises(CacheFormatError, match=r"^not a logit cache;") as caught:
            open_cache(tmp_path)
        assert "again" not in str(caught.value)
    CacheWriter(tmp_path / "begun", build_options()).close()
    with pytest.raises(CacheFormatError, match=r"^an unfinished logit cache;.*the command that began it"):
        Cache(tmp_path / "begun")


def test_imports_need_no_torch_and_no_click():
    code = "import sys, shared.cache.writer, shared.cache.reader, shared.cache.verify, shared.cache.info; "
    code += "print(sorted({'torch', 'transformers', 'click'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
