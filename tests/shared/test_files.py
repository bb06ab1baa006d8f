"""Files that belong together are replaced together; folders appear whole; JSONL is read strictly."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import ConfigError
from shared.files import publish_folder, read_json_lines, replace_files
from tests.support.cache_faults import file_size_limit


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_are_replaced_and_removed(tmp_path):
    before = {"a": b"1", "b": b"2", "last": b"3"}
    replace_files(tmp_path, before)
    assert contents(tmp_path) == before
    replace_files(tmp_path, {"a": b"4", "b": None, "last": b"5"})
    assert contents(tmp_path) == {"a": b"4", "last": b"5"}


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(os.devnull)
    for name in ("pipe", "link"):
        with pytest.raises(ConfigError, match=f"not a regular file.*{name}"):
            replace_files(tmp_path, {"a": b"1", name: b"2"})
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_char_device()
    assert not (tmp_path / "a").exists() and len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_the_old_files(tmp_path):
    before = {"a": b"1", "last": b"3"}
    replace_files(tmp_path, before)
    with file_size_limit(1000), pytest.raises(OSError) as caught:
        replace_files(tmp_path, {"a": b"4", "last": b"5" * 2000})
    assert contents(tmp_path) == before
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "last"))


FULL = """
import atexit, resource, signal
import click
from pathlib import Path
from shared.files import write_bytes
from shared.process import run_cli
@click.command()
@click.argument("path", type=Path)
def command(path):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    atexit.register(resource.setrlimit, resource.RLIMIT_FSIZE, before)  # coverage still writes its own file
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    write_bytes(path, bytes(2000))
run_cli(command)
"""


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    path = tmp_path / "result.json"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=60)
    fix = "fix: check the path, the rights and the free space"
    assert (done.returncode, done.stderr) == (1, f"error: File too large; where: {path}; {fix}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [0, 1, 2])
def test_stopped_between_renames_the_last_file_never_stands_beside_others_content(tmp_path, monkeypatch, number):
    replace_files(tmp_path, {"a": b"old", "b": b"old", "last": b"old"})
    renamed = []
    replace = Path.replace

    def stop(self, target):
        if len(renamed) == number:
            raise KeyboardInterrupt
        renamed.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        replace_files(tmp_path, {"a": b"new", "b": b"new", "last": b"new"})
    expected = {"a": b"old", "b": b"old"} | dict.fromkeys(renamed, b"new")
    assert contents(tmp_path) == expected


def test_a_folder_appears_whole(tmp_path):
    out = tmp_path / "made" / "out"
    with publish_folder(out) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_bytes(b"1")
        (folder.parent / "download").write_bytes(b"2")
        assert not out.exists()
    assert contents(out / "sub") == {"a": b"1"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_block_that_fails_leaves_nothing_and_a_folder_that_holds_something_stays(tmp_path):
    with pytest.raises(KeyboardInterrupt), publish_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_bytes(b"1")
    with pytest.raises(OSError), publish_folder(tmp_path / "out") as folder:
        (folder / "a").write_bytes(b"2")
    assert contents(tmp_path / "out") == {"mine": b"1"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_removed_and_a_living_one_s_kept(tmp_path):
    code = "import os, signal, sys; from pathlib import Path; from shared.files import publish_folder\n"
    code += "with publish_folder(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "other")], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    living = tmp_path / left.name.replace(left.name.split("-")[-2], str(os.getpid()))
    living.mkdir()
    with publish_folder(tmp_path / "out"):
        pass
    assert sorted(tmp_path.iterdir()) == sorted([living, tmp_path / "out"])


def test_lines_of_json_are_read_without_a_last_one_that_a_kill_cut(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": "\u2028"}\n{"a":')
    assert read_json_lines(tmp_path / "a.jsonl") == [{"a": 1}, {"a": "\u2028"}]


@pytest.mark.parametrize("content", [b"{\n", b"[]\n", b'{"a": NaN}\n', b'{"a": 1e999}\n', b"\n"])
def test_a_broken_line_of_json_is_refused_by_its_number(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + content)
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 2") as caught:
        read_json_lines(tmp_path / "a.jsonl")
    assert "line 1" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\n", None])
def test_a_file_of_lines_that_cannot_be_read_is_refused(tmp_path, content):
    if content:
        (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot read a file; where: .*a\.jsonl"):
        read_json_lines(tmp_path / "a.jsonl")
