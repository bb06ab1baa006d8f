"""The lock: who is refused, whose lock is removed, and that no clock but the watcher's own decides."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shared import lock as locks
from shared.errors import ResumeError
from shared.lock import Lock, SharedLock, is_abandoned, is_locked

DAYS = 2 * 24 * 3600


def elsewhere(folder, *, age_seconds=0.0):
    """The lock of a process of another machine, whose clock may be another one."""
    (folder / "lock.json").write_text(json.dumps({"pid": os.getpid(), "host": "elsewhere", "token": "x"}))
    when = time.time() - age_seconds
    os.utime(folder / "lock.json", (when, when))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.4)
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.02)


def test_a_second_lock_is_refused_until_the_first_is_released(tmp_path):
    first = Lock(tmp_path, "training in this folder")
    with pytest.raises(ResumeError, match=f"another process is training in this folder;.*process {os.getpid()} on"):
        Lock(tmp_path, "training in this folder")
    assert is_locked(tmp_path) and not is_abandoned(tmp_path)
    first.release()
    assert list(tmp_path.iterdir()) == [] and not is_locked(tmp_path)
    Lock(tmp_path).release()


def test_the_lock_of_a_killed_process_is_removed_at_once(tmp_path):
    code = "import pathlib, sys, time; from shared.lock import Lock; "
    code += "lock = Lock(pathlib.Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"locked\n"
        with pytest.raises(ResumeError, match=f"got: process {process.pid} on"):
            Lock(tmp_path)
        process.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while not is_abandoned(tmp_path) and time.monotonic() < deadline:  # killed, and not yet waited for
            time.sleep(0.01)
        assert is_abandoned(tmp_path)
        Lock(tmp_path).release()


def test_a_process_that_has_the_number_of_a_dead_one_protects_nothing(tmp_path):
    lock = Lock(tmp_path)
    holder = json.loads((tmp_path / "lock.json").read_text())
    (tmp_path / "lock.json").write_text(json.dumps(holder | {"started": holder["started"] - 1}))
    assert is_abandoned(tmp_path)
    lock.release()


@pytest.mark.parametrize("age_seconds", [0, -DAYS, DAYS])
def test_another_machines_lock_goes_once_it_has_not_changed(tmp_path, quick, capfd, age_seconds):
    elsewhere(tmp_path, age_seconds=age_seconds)
    assert is_locked(tmp_path)
    start = time.monotonic()
    Lock(tmp_path).release()
    assert time.monotonic() - start >= 0.4
    assert "is locked by process" in capfd.readouterr().err


@pytest.mark.parametrize("age_seconds", [0, -DAYS, DAYS])
def test_another_machines_lock_that_is_refreshed_holds(tmp_path, quick, age_seconds):
    elsewhere(tmp_path, age_seconds=age_seconds)
    refresh = threading.Timer(0.1, elsewhere, (tmp_path,), {"age_seconds": age_seconds - 10})
    refresh.start()
    with pytest.raises(ResumeError, match=f"got: process {os.getpid()} on elsewhere"):
        Lock(tmp_path)
    refresh.join()


def test_a_lock_that_its_holder_releases_while_it_is_watched(tmp_path, quick):
    elsewhere(tmp_path)
    threading.Timer(0.1, (tmp_path / "lock.json").unlink).start()
    start = time.monotonic()
    Lock(tmp_path).release()
    assert time.monotonic() - start < 0.4


def test_an_empty_lock_is_what_a_kill_left(tmp_path, quick):
    (tmp_path / "lock.json").write_text("")
    Lock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_holder_that_lost_its_lock_stops(tmp_path):
    lock = Lock(tmp_path)
    lock.check()
    (tmp_path / "lock.json").write_text("{}")
    with pytest.raises(ResumeError, match="another process has taken this folder over"):
        lock.check()
    lock.release()
    assert (tmp_path / "lock.json").read_text() == "{}"


def test_the_lock_is_refreshed(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "REFRESH_SECONDS", 0.01)
    lock = Lock(tmp_path)
    os.utime(tmp_path / "lock.json", (0, 0))
    deadline = time.monotonic() + 5
    while (tmp_path / "lock.json").stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "lock.json").stat().st_mtime > time.time() - 60
    lock.release()


def test_a_shared_lock_is_the_other_processs(tmp_path):
    with pytest.raises(ResumeError, match="nobody has locked this folder"):
        SharedLock(tmp_path)
    lock = Lock(tmp_path)
    shared = SharedLock(tmp_path)
    shared.check()
    shared.release()
    assert is_locked(tmp_path)
    lock.release()
    with pytest.raises(ResumeError, match=r"taken this folder over;.*got: no lock"):
        shared.check()
