"""Files that belong together are replaced together."""

from pathlib import Path

import pytest

from shared.files import replace_files
from tests.support.cache_faults import file_size_limit


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_are_replaced_and_removed(tmp_path):
    before = {"a": b"1", "b": b"2", "last": b"3"}
    replace_files(tmp_path, before)
    assert contents(tmp_path) == before
    replace_files(tmp_path, {"a": b"4", "b": None, "last": b"5"})
    assert contents(tmp_path) == {"a": b"4", "last": b"5"}


def test_a_full_disk_leaves_the_old_files(tmp_path):
    before = {"a": b"1", "last": b"3"}
    replace_files(tmp_path, before)
    with file_size_limit(1000), pytest.raises(OSError):
        replace_files(tmp_path, {"a": b"4", "last": b"5" * 2000})
    assert contents(tmp_path) == before


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
