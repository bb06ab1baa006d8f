"""Caches at URLs: pushed, pulled, and read from servers that fail."""

import json
import os
import shutil
import subprocess
import threading
import time

import numpy as np
import pytest
from huggingface_hub import constants

from shared.cache import local as local_cache
from shared.cache import push, remote
from shared.cache.card import PLOT
from shared.cache.format import MANIFEST
from shared.cache.info import cache_info
from shared.cache.pull import pull_cache
from shared.cache.push import push_cache
from shared.cache.reader import Cache
from shared.cache.verify import verify_cache
from shared.errors import CacheCorruptError, CacheFormatError, ConfigError, ResumeError
from shared.lock import Lock
from tests.support.cache_faults import CLI
from tests.support.file_server import FileServer
from tests.support.loopback_hub import OWNER, TOKEN, Repository
from tests.support.student_cache import make_cache

SHARDS = 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("remote") / "cache", shards=SHARDS)


@pytest.fixture(autouse=True)
def local(tmp_path, monkeypatch):
    """The local cache; a server that is away is given up after a second."""
    monkeypatch.setenv(local_cache.LOCAL_CACHE, str(tmp_path / "local"))
    monkeypatch.setattr(remote, "PAUSES_SECONDS", (0.05, 0.1, 0.2, 0.4))
    return tmp_path / "local"


@pytest.fixture
def server(cache):
    with FileServer(cache.path) as server:
        yield server


@pytest.fixture
def hub_client(hub, tmp_path, monkeypatch):
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    where = {"ENDPOINT": hub.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template}
    for name, value in {**where, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def assert_same(ours, theirs):
    assert ours.num_documents == theirs.num_documents > 0
    for doc in range(ours.num_documents):
        np.testing.assert_array_equal(ours.tokens(doc), theirs.tokens(doc))
        np.testing.assert_array_equal(ours.targets(doc, 1.0).logp, theirs.targets(doc, 1.0).logp)


def test_a_cache_is_read_from_a_server_and_every_file_is_fetched_once(cache, server):
    assert_same(Cache(server.url), cache)
    assert_same(Cache(server.url), cache)
    shards = sorted(name for name in server.requests if name.endswith(".h5"))
    assert shards == [f"shard-{number:05d}.h5" for number in range(SHARDS)]
    assert server.requests.count("doc_lengths.u32") == 1


def test_the_first_document_needs_the_manifest_the_index_and_one_shard(cache, server):
    opened = Cache(server.url)
    opened.reads_in_order = False
    opened.tokens(0)
    assert sorted(server.requests) == ["doc_lengths.u32", MANIFEST, "shard-00000.h5"]


def test_shards_ahead_are_fetched_in_the_background(cache, server):
    opened = Cache(server.url)
    opened.tokens(0)
    opened.expect([2, 3])
    deadline = time.monotonic() + 20
    while not (opened.store.has("shard-00002.h5") and opened.store.has("shard-00003.h5")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.down = True
    opened.load_shard(3)


def test_dropped_connections_and_servers_without_ranges_change_nothing(cache, server, monkeypatch):
    monkeypatch.setattr(remote, "PIECE_BYTES", 4096)
    server.drop_every = 3
    assert_same(Cache(server.url), cache)
    server.ranges, server.drop_every = False, 0
    assert verify_cache(server.url) == []


def test_a_stalled_answer_is_asked_for_again(cache, server, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT_SECONDS", 0.3)
    opened = Cache(server.url)
    server.stall_first = 5.0
    start = time.monotonic()
    assert_same(opened, cache)
    assert time.monotonic() - start < 5


def test_a_server_that_is_away_for_a_while_is_waited_for(cache, server):
    opened = Cache(server.url)
    server.down = True
    threading.Timer(0.3, lambda: setattr(server, "down", False)).start()
    assert_same(opened, cache)


def test_a_server_that_stays_away_is_one_error_that_names_url_and_shard(server):
    opened = Cache(server.url)
    server.down = True
    with pytest.raises(ConfigError, match="cannot be reached") as caught:
        opened.load_shard(1)
    assert f"{server.url}/shard-00001.h5" in str(caught.value) or "doc_lengths" in str(caught.value)


def test_a_flipped_byte_is_refused_by_name(server, local):
    server.flipped = "shard-00001.h5"
    with pytest.raises(CacheCorruptError, match="bytes have changed") as caught:
        Cache(server.url).load_shard(1)
    assert f"{server.url}/shard-00001.h5" in str(caught.value)
    assert not list(local.rglob("*shard-00001.h5*.tmp*"))
    [problem] = verify_cache(server.url)
    assert problem.startswith("shard-00001.h5: SHA-256")


def test_an_interrupted_download_goes_on_where_it_ended(cache, server, monkeypatch):
    monkeypatch.setattr(remote, "PIECE_BYTES", 2048)
    opened = Cache(server.url)
    entry = opened.manifest.files["shard-00000.h5"]
    part = remote.part_of(opened.store.folder / "shard-00000.h5", entry)
    part.write_bytes((cache.path / "shard-00000.h5").read_bytes()[: entry.bytes - 100])
    opened.store.fetch("shard-00000.h5")
    assert server.requests.count("shard-00000.h5") == 1 and not part.exists()
    part = remote.part_of(opened.store.folder / "shard-00001.h5", opened.manifest.files["shard-00001.h5"])
    part.write_bytes(b"other bytes")
    assert_same(opened, cache)


def test_a_missing_cache_and_a_missing_shard_are_named(cache, tmp_path):
    shutil.copytree(cache.path, tmp_path / "site" / "c")
    with FileServer(tmp_path / "site") as server:
        with pytest.raises(CacheFormatError, match="no finished cache"):
            Cache(f"{server.url}/nothing")
        (tmp_path / "site" / "c" / "shard-00002.h5").unlink()
        with pytest.raises(CacheCorruptError, match=r"missing; where: http.*shard-00002\.h5"):
            Cache(f"{server.url}/c").load_shard(2)


def test_shards_used_longest_ago_are_evicted_and_nothing_else(cache, server, local, monkeypatch):
    sizes = {name: entry.bytes for name, entry in cache.manifest.files.items()}
    shards = [size for name, size in sizes.items() if name.endswith(".h5")]
    small = sum(sizes.values()) - sum(shards) + (cache.path / MANIFEST).stat().st_size
    mine = local / "mine.txt"
    local.mkdir()
    mine.write_text("not fetched here")
    need = small + max(shards)
    monkeypatch.setenv(local_cache.LOCAL_BYTES, str(need - 1))
    with pytest.raises(ConfigError, match=f"too small.*--local-bytes {need:,}"):
        Cache(server.url)
    monkeypatch.setenv(local_cache.LOCAL_BYTES, str(need + max(shards) + mine.stat().st_size))
    opened = Cache(server.url)
    opened.memory.limit_bytes = 0
    assert opened.tokenizer_path.is_dir()
    assert_same(opened, cache)
    kept = {file.name for file in local.rglob("*.h5")}
    assert "shard-00003.h5" in kept and "shard-00000.h5" not in kept and mine.exists()
    total = sum(file.stat().st_size for file in local.rglob("*") if file.is_file() and ".lock" not in str(file))
    assert total <= need + max(shards) + mine.stat().st_size


def test_a_local_cache_that_holds_other_caches_keeps_them(cache, server, local, monkeypatch):
    mine = make_cache(local / "mine", shards=SHARDS)
    (local / ".unfinished.tmp-1").write_text("not fetched here")
    held = sum(file.stat().st_size for file in local.rglob("*") if file.is_file())
    monkeypatch.setenv(local_cache.LOCAL_BYTES, str(held + 90_000))
    opened = Cache(server.url)
    opened.memory.limit_bytes = 0
    assert_same(opened, cache)
    assert verify_cache(mine.path, strict=True) == [] and (local / ".unfinished.tmp-1").exists()


def test_a_local_cache_that_cannot_be_written_is_one_error(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(local_cache.LOCAL_CACHE, str(tmp_path / "file" / "local"))
    with pytest.raises(ResumeError, match=r"cannot be written; where: .*file"):
        Cache(server.url)


@pytest.mark.parametrize("fault", ["longer", "shorter", "page"])
def test_a_server_whose_files_are_others_is_refused(cache, tmp_path, fault, monkeypatch):
    shutil.copytree(cache.path, tmp_path / "site")
    shard = tmp_path / "site" / "shard-00001.h5"
    data = shard.read_bytes()
    shard.write_bytes({"longer": data + b"x", "shorter": data[:-100], "page": b"<html>sign in</html>"}[fault])
    monkeypatch.setattr(remote, "PIECE_BYTES", len(data) - 100)  # the second piece begins where the shorter file ends
    with FileServer(tmp_path / "site") as server:
        server.ranges = fault != "longer"
        with pytest.raises(CacheCorruptError, match=r"shard-00001\.h5; expected: .*; got: "):
            Cache(server.url).load_shard(1)
        (tmp_path / "site" / MANIFEST).write_bytes(b"<!doctype html>")
        with pytest.raises(CacheFormatError, match=r"no cache here.*doctype.*check the URL"):
            Cache(server.url)


def test_another_range_than_the_one_asked_for_is_no_answer(cache, server):
    server.shift = 3
    with pytest.raises(ConfigError, match=r"cannot be reached.*another range"):
        Cache(server.url).load_shard(0)


@pytest.mark.parametrize(
    "url",
    ["http://user:secret@host/c", "s3://key:secret@bucket/c", "hf://u:secret@datasets/a/b", "https://h/c?k=secret"],
)
def test_a_url_with_credentials_is_refused_and_not_repeated(url, cache, tmp_path):
    for action in (Cache, cache_info, lambda url: pull_cache(url, tmp_path), lambda url: push_cache(cache.path, url)):
        with pytest.raises(ConfigError, match="no credentials") as caught:
            action(url)
        assert "secret" not in str(caught.value)


def test_several_processes_fetch_a_shard_once(cache, server, local):
    server.delay_seconds = 0.2
    code = (
        "import sys; from shared.cache.reader import Cache; c = Cache(sys.argv[1]); print(len(c.load_shard(0).tokens))"
    )
    command = [CLI[0], "-c", code, server.url]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ) for _ in range(3)]
    answers = {process.communicate(timeout=60)[0] for process in started}
    assert len(answers) == 1 and all(process.returncode == 0 for process in started)
    assert server.requests.count("shard-00000.h5") == 1


def test_info_of_a_url_reads_the_manifest_only(cache, server):
    assert cache_info(server.url) == cache_info(cache.path)
    assert server.requests == [MANIFEST]


def test_a_cache_is_pushed_pulled_and_both_continue(cache, tmp_path, monkeypatch):
    target, out = tmp_path / "there", tmp_path / "out"
    url = f"file://{target}"
    push_cache(cache.path, url)
    assert verify_cache(target, strict=True) == [] == verify_cache(url)
    (target / MANIFEST).unlink()  # as a killed push leaves it
    (target / "shard-00001.h5").write_bytes(b"half")
    (target / "build.json").write_bytes(b"{")
    (target / f".{MANIFEST}.tmp-7").write_bytes(b"half")
    with pytest.raises(CacheFormatError):
        Cache(url)
    before = (target / "shard-00000.h5").stat().st_mtime_ns
    push_cache(cache.path, url)
    assert (target / "shard-00000.h5").stat().st_mtime_ns == before
    assert verify_cache(target, strict=True) == []
    pull_cache(url, out)
    (out / MANIFEST).unlink()
    (out / "shard-00002.h5").unlink()
    pull_cache(url, out)
    assert verify_cache(out, strict=True) == []
    assert_same(Cache(out), cache)


def test_what_cannot_be_pushed_or_pulled_is_refused(cache, tmp_path):
    with pytest.raises(ConfigError, match="cannot be pushed there"):
        push_cache(cache.path, "https://example.org/cache")
    other = make_cache(tmp_path / "other", seed=1)
    push_cache(cache.path, f"file://{tmp_path}/there")
    with pytest.raises(ConfigError, match="another cache is there"):
        push_cache(other.path, f"file://{tmp_path}/there")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"no cache.*thesis\.txt"):
        pull_cache(f"file://{tmp_path}/there", tmp_path / "full")
    damaged = tmp_path / "damaged"
    shutil.copytree(cache.path, damaged)
    (damaged / "shard-00001.h5").write_bytes(b"damaged")
    with pytest.raises(CacheCorruptError, match="bytes have changed"):
        push_cache(damaged, f"file://{tmp_path}/new")
    assert not (tmp_path / "new" / MANIFEST).exists()


def test_what_lies_at_a_target_is_never_overwritten(cache, tmp_path):
    other = make_cache(tmp_path / "other", k=4)
    (other.path / MANIFEST).unlink()  # unfinished
    shard = (other.path / "shard-00000.h5").read_bytes()
    with pytest.raises(ConfigError, match="another cache is there"):
        push_cache(cache.path, f"file://{other.path}")
    with pytest.raises(ConfigError, match="holds another cache"):
        pull_cache(f"file://{cache.path}", other.path)
    (other.path / MANIFEST).write_text('{"format": "of something else"}')
    with pytest.raises(CacheFormatError, match="not a logit cache"):
        push_cache(cache.path, f"file://{other.path}")
    assert (other.path / "shard-00000.h5").read_bytes() == shard


def test_a_damaged_copy_is_pulled_over(cache, tmp_path):
    shutil.copytree(cache.path, tmp_path / "out")
    for name in (MANIFEST, "shard-00001.h5", ".shard-00002.h5.tmp-7"):
        (tmp_path / "out" / name).write_bytes(b"damaged")
    pull_cache(f"file://{cache.path}", tmp_path / "out")
    assert verify_cache(tmp_path / "out", strict=True) == []


def test_a_file_url_is_a_path_as_it_stands(cache, tmp_path):
    push_cache(cache.path, f"file://{tmp_path}/a%20b c")
    assert_same(Cache(f"file://{tmp_path}/a%20b c"), Cache(tmp_path / "a%20b c"))


@pytest.mark.parametrize(
    "command", ["repair", "attach --teacher-eval .", "slice --out o", "merge --out o", "audit --teacher t"]
)
def test_commands_that_need_a_cache_here_say_so(server, command):
    name, *options = command.split()
    done = subprocess.run([*CLI, "cache", name, server.url, *options], capture_output=True, text=True)
    assert done.returncode == 1 and f"codedistill cache pull {server.url} DIR" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and server.requests == []


def test_a_cache_is_shared_on_the_hub(cache, hub_client, tmp_path):
    url = f"hf://datasets/{OWNER}/logits"
    pinned = push_cache(cache.path, url, private=True)
    repository = hub_client.datasets[f"{OWNER}/logits"]
    assert repository.private and pinned == f"{url}@{repository.branches['main']}"
    files = repository.commits[repository.branches["main"]]
    card = files["README.md"].decode()
    assert f"--cache {url}" in card and cache.label_identity in card and files[PLOT].startswith(b"\x89PNG")
    opened = Cache(url)
    assert opened.location == pinned
    assert_same(opened, cache)
    pull_cache(pinned, tmp_path / "out")
    assert verify_cache(tmp_path / "out", strict=True) == []
    uploads = len(hub_client.lfs_objects)
    sent = len([path for method, path in hub_client.requests if path.startswith("/lfs/")])
    assert uploads == sent == SHARDS
    push_cache(cache.path, url)
    assert len([path for method, path in hub_client.requests if path.startswith("/lfs/")]) == sent


def test_a_push_to_the_hub_removes_shards_of_an_earlier_manifest_with_the_same_commit(cache, hub_client):
    push_cache(cache.path, f"hf://datasets/{OWNER}/stale")
    repository = hub_client.datasets[f"{OWNER}/stale"]
    before = repository.commits[repository.branches["main"]]
    repository.commit(before | {"shard-00009.h5": b"of an earlier manifest", "notes.md": b"mine"})
    num_commits = len(repository.commits)
    push_cache(cache.path, f"hf://datasets/{OWNER}/stale")
    files = repository.commits[repository.branches["main"]]
    assert files == before | {"notes.md": b"mine"} and len(repository.commits) == num_commits + 1


def test_of_two_pushes_to_one_data_set_at_once_the_second_is_refused(cache, hub_client, monkeypatch):
    url = f"hf://datasets/{OWNER}/raced"
    check = push._require_whole

    def check_while_another_pushes(file, entry):
        check(file, entry)
        repository = hub_client.datasets[f"{OWNER}/raced"]
        if len(repository.commits) == 1:
            repository.commit({"build.json": b"of another cache"})

    monkeypatch.setattr(push, "_require_whole", check_while_another_pushes)
    with pytest.raises(ConfigError, match=r"another process has changed.*run the command again"):
        push_cache(cache.path, url)
    with pytest.raises(ConfigError, match="another cache is there"):
        push_cache(cache.path, url)


def test_of_two_pushes_to_one_folder_at_once_the_second_is_refused(cache, tmp_path):
    (tmp_path / "there").mkdir()
    lock = Lock(tmp_path / "there", "pushing a cache to this folder")
    with pytest.raises(ResumeError, match="another process is pushing a cache"):
        push_cache(cache.path, f"file://{tmp_path}/there")
    lock.release()
    push_cache(cache.path, f"file://{tmp_path}/there")
    assert verify_cache(tmp_path / "there", strict=True) == []


def test_a_push_leaves_no_shard_that_the_manifest_does_not_list(cache, tmp_path):
    there = tmp_path / "there"
    push_cache(cache.path, f"file://{there}")
    (there / MANIFEST).unlink()  # as a push leaves it that was killed while it replaced this cache
    (there / "shard-00009.h5").write_bytes(b"of an earlier manifest")
    (there / "README.md").write_text("mine")
    push_cache(cache.path, f"file://{there}")
    assert not (there / "shard-00009.h5").exists() and (there / "README.md").read_text() == "mine"
    assert verify_cache(there) == []


def test_a_branch_of_the_hub(cache, hub_client):
    push_cache(cache.path, f"hf://datasets/{OWNER}/branches@v1")
    assert_same(Cache(f"hf://datasets/{OWNER}/branches@v1"), cache)
    with pytest.raises(CacheFormatError, match="no finished cache"):
        Cache(f"hf://datasets/{OWNER}/branches")


def test_hub_refusals_are_one_clear_error(cache, hub_client, monkeypatch):
    with pytest.raises(ConfigError, match="no such repository"):
        Cache("hf://datasets/writer/nothing")
    with pytest.raises(ConfigError, match="not a data set on the Hub"):
        Cache("hf://writer/nothing")
    with pytest.raises(ConfigError, match="refuses this token"):
        push_cache(cache.path, "hf://datasets/somebody/else")
    gated = hub_client.datasets["writer/gated"] = Repository()
    gated.commit_folder(cache.path)
    gated.gated = True
    with pytest.raises(ConfigError, match=r"refused.*ask for access"):
        Cache("hf://datasets/writer/gated")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="switched off"):
        Cache(f"hf://datasets/{OWNER}/logits")


def test_an_object_store_is_pushed_to_and_read(cache, tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    import fsspec

    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        fsspec.filesystem("s3").mkdir("bucket")
        assert push_cache(cache.path, "s3://bucket/a/cache") == "s3://bucket/a/cache"
        assert_same(Cache("s3://bucket/a/cache"), cache)
        assert verify_cache("s3://bucket/a/cache") == []
        pull_cache("s3://bucket/a/cache", tmp_path / "out")
        assert verify_cache(tmp_path / "out", strict=True) == []
        with pytest.raises(ConfigError, match="target is not there"):
            push_cache(cache.path, "s3://no-bucket/cache")
        with pytest.raises(CacheFormatError, match="no finished cache"):
            Cache("s3://bucket/nothing")
    finally:
        server.stop()


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"gs:// needs gcsfs.*codedistill\[gs\]"):
        Cache("gs://bucket/cache")


def test_the_commands_take_urls(cache, server, tmp_path):
    def run(*words):
        done = subprocess.run([*CLI, "cache", *words], env=os.environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert json.loads(run("info", server.url, "--json")) == cache_info(cache.path)
    assert "every file is as the manifest says" in run("verify", server.url, "--local-cache", str(tmp_path / "l"))
    run("pull", server.url, str(tmp_path / "pulled"))
    assert run("push", str(tmp_path / "pulled"), f"file://{tmp_path}/pushed") == f"file://{tmp_path}/pushed\n"
    assert verify_cache(tmp_path / "pushed", strict=True) == []
