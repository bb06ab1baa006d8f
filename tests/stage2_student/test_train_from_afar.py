"""Training from caches at URLs: the same weights as from disk, and nothing is fetched twice."""

import signal

import pytest

from shared.cache.local import LOCAL_CACHE
from shared.cache.push import push_cache
from shared.files import read_json, sha256_file
from shared.process import own_command
from tests.stage2_student.test_train import ENVIRONMENT, arguments, run, run_afresh, stop_when
from tests.support.file_server import FileServer
from tests.support.loopback_hub import OWNER, TOKEN, Hub
from tests.support.student_cache import make_cache

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("afar")


@pytest.fixture(scope="module")
def cache(folder):
    return make_cache(folder / "cache", shards=4)


@pytest.fixture(scope="module")
def from_disk(cache, folder):
    run(arguments(cache.path, folder / "from-disk"))
    return sha256_file(folder / "from-disk" / WEIGHTS)


@pytest.fixture(autouse=True)
def local(tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, LOCAL_CACHE, str(tmp_path / "local"))


def test_a_server_that_drops_connections_gives_the_same_weights(cache, from_disk, tmp_path):
    with FileServer(cache.path) as server:
        server.drop_every = 10
        run(arguments(server.url, tmp_path / "run"))
        assert sha256_file(tmp_path / "run" / WEIGHTS) == from_disk
        assert read_json(tmp_path / "run" / "run.json")["cache_paths"] == [server.url]


def test_a_killed_run_fetches_nothing_twice_and_goes_on_from_another_copy(cache, from_disk, tmp_path):
    out = tmp_path / "run"
    with FileServer(cache.path) as server:
        code, _ = stop_when(arguments(server.url, out), lambda: (out / "checkpoint-5").exists(), signal.SIGKILL)
        assert code == -signal.SIGKILL
        run(arguments(server.url, out))
        assert sha256_file(out / WEIGHTS) == from_disk
        shards = sorted(name for name in server.requests if name.endswith(".h5"))
        assert shards == [f"shard-{number:05d}.h5" for number in range(4)]
    assert "up to date" in run(arguments(cache.path, out)).stderr


def test_the_hub_gives_the_same_weights(cache, from_disk, tmp_path, monkeypatch):
    with Hub() as hub:
        for name, value in hub.environment(tmp_path / "home", HF_TOKEN=TOKEN).items():
            monkeypatch.setitem(ENVIRONMENT, name, value)
        monkeypatch.delitem(ENVIRONMENT, "HF_HUB_OFFLINE")
        url = f"hf://datasets/{OWNER}/logits"
        pushed = run_afresh(own_command("cache", "push", str(cache.path), url)).stdout.strip()
        run_afresh(arguments(url, tmp_path / "run"))
        assert sha256_file(tmp_path / "run" / WEIGHTS) == from_disk
        assert read_json(tmp_path / "run" / "run.json")["cache_paths"] == [pushed]


def test_an_object_store_gives_the_same_weights(cache, from_disk, tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    moto_server = pytest.importorskip("moto.server")
    import fsspec

    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        settings = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in (settings | {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}).items():
            monkeypatch.setenv(name, value)
            monkeypatch.setitem(ENVIRONMENT, name, value)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("student")
        push_cache(cache.path, "s3://student/cache")
        run(arguments("s3://student/cache", tmp_path / "run"))
        assert sha256_file(tmp_path / "run" / WEIGHTS) == from_disk
    finally:
        server.stop()
