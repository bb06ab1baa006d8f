"""Which checkpoints count."""

import pytest

from shared.errors import ResumeError
from stage2_student.checkpoint import (
    MARKER,
    WINDOW,
    checkpoints,
    damage,
    newest_whole,
    remove_leftovers,
    require_no_file,
    rotate,
    seal,
)
from tests.support.student_kills import STRAYS, strew


def make(run, *steps, complete=True):
    for step in steps:
        folder = run / f"checkpoint-{step}"
        (folder / "deep").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "deep" / "state.pt").write_bytes(b"state")
        if complete:
            seal(folder)


def names(run):
    return sorted(path.name for path in run.iterdir())


def test_steps_are_ordered_as_numbers_and_other_folders_ignored(tmp_path):
    make(tmp_path, 100, 9, 20)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-7-old").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-100"


def test_what_a_kill_left_of_a_save_or_a_removal_is_cleared_away(tmp_path):
    make(tmp_path, 10)
    make(tmp_path, 5, 20, complete=False)
    (tmp_path / ".run.json.tmp-123").write_text("half")
    (tmp_path / "run.json").write_text("{}")
    remove_leftovers(tmp_path)
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-10"
    assert names(tmp_path) == ["checkpoint-10", "run.json"]


def test_no_checkpoint(tmp_path):
    assert newest_whole(tmp_path) is None
    make(tmp_path, 5, complete=False)
    assert newest_whole(tmp_path) is None
    assert names(tmp_path) == []


def test_a_whole_save_without_its_marker_is_set_aside(tmp_path):
    """A kill just before the seal leaves this, and so does a copy that lost the marker."""
    make(tmp_path, 5, complete=False)
    (tmp_path / "checkpoint-5" / WINDOW).write_text("[0, 0, 0, 0]")
    for expected in (["damaged-checkpoint-5"], ["damaged-checkpoint-5", "damaged-checkpoint-5.1"]):
        assert newest_whole(tmp_path) is None
        assert names(tmp_path) == expected
        make(tmp_path, 5, complete=False)
        (tmp_path / "checkpoint-5" / WINDOW).write_text("[0, 0, 0, 0]")


def test_several_checkpoints_without_markers_are_never_taken_for_none(tmp_path):
    make(tmp_path, 5, 10, complete=False)
    with pytest.raises(ResumeError, match=r"checkpoint-5: no COMPLETE; checkpoint-10: no COMPLETE; fix: restore"):
        newest_whole(tmp_path)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-5"]


def test_rotation_keeps_the_newest_complete_ones(tmp_path):
    make(tmp_path, 10, 20, 30, 40)
    make(tmp_path, 5, complete=False)
    rotate(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-30", "checkpoint-40", "checkpoint-5"]


def test_rotation_killed_half_way_leaves_nothing_that_counts(tmp_path, monkeypatch):
    make(tmp_path, 10, 20)
    seen = []
    monkeypatch.setattr("stage2_student.checkpoint.shutil.rmtree", lambda path: seen.append((path / MARKER).exists()))
    rotate(tmp_path, 1)
    assert seen == [False]
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-20"


def test_the_best_checkpoint_outlives_rotation(tmp_path):
    make(tmp_path, 10, 20, 30)
    rotate(tmp_path, 1, best="/where/the/run/was/checkpoint-10")
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-30"]


def flip(path):
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


HARMS = [
    (lambda folder: flip(folder / "model.safetensors"), "model.safetensors is not what was saved"),
    (lambda folder: (folder / "deep/state.pt").write_bytes(b"stat"), "deep/state.pt is not what was saved"),
    (lambda folder: (folder / "deep/state.pt").unlink(), "deep/state.pt is missing"),
    (lambda folder: (folder / MARKER).write_bytes(b""), "not valid JSON"),
    (lambda folder: (folder / MARKER).write_text("[]"), "names no files"),
    (lambda folder: (folder / MARKER).write_text('{"files": {}}'), "names no files"),
    (lambda folder: ((folder / MARKER).unlink(), (folder / MARKER).mkdir()), "cannot read a file"),
]


@pytest.mark.parametrize(("harm", "words"), HARMS)
def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_used(tmp_path, capsys, harm, words):
    make(tmp_path, 10, 20)
    assert damage(tmp_path / "checkpoint-20") is None
    harm(tmp_path / "checkpoint-20")
    before = {path.relative_to(tmp_path / "checkpoint-20") for path in (tmp_path / "checkpoint-20").rglob("*")}
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-10"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'checkpoint-20'} is damaged and set aside as damaged-checkpoint-20: ")
    assert words in line
    assert names(tmp_path) == ["checkpoint-10", "damaged-checkpoint-20"]
    aside = tmp_path / "damaged-checkpoint-20"
    assert {path.relative_to(aside) for path in aside.rglob("*")} == before


@pytest.mark.parametrize(("harm", "words"), HARMS)
def test_where_no_checkpoint_is_whole_nothing_changes_and_the_run_is_refused(tmp_path, harm, words):
    make(tmp_path, 10, 20)
    for step in (10, 20):
        harm(tmp_path / f"checkpoint-{step}")
    for _ in range(2):
        with pytest.raises(ResumeError, match=r"no checkpoint of this run is whole") as caught:
            newest_whole(tmp_path)
        assert str(caught.value).count(words) == 2
        assert "start over: choose another --out, or delete this folder" in str(caught.value)
        assert names(tmp_path) == ["checkpoint-10", "checkpoint-20"]


def test_a_checkpoint_that_was_set_aside_still_counts_as_one_that_existed(tmp_path):
    make(tmp_path, 10, 20)
    flip(tmp_path / "checkpoint-20" / "model.safetensors")
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "model.safetensors").unlink()
    with pytest.raises(ResumeError, match="damaged-checkpoint-20: set aside earlier"):
        newest_whole(tmp_path)


def test_files_that_were_not_sealed_never_count(tmp_path, capsys):
    make(tmp_path, 10, 20)
    strew(tmp_path)
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-20"
    assert capsys.readouterr().err == ""
    for step in (10, 20):
        assert {name for name in STRAYS if (tmp_path / f"checkpoint-{step}" / name).exists()} == set(STRAYS)


def test_what_systems_leave_is_not_sealed(tmp_path):
    """They take such files away again."""
    make(tmp_path, 10, complete=False)
    folder = tmp_path / "checkpoint-10"
    for name in (".DS_Store", "._model.safetensors", ".nfs000000000000001", "notes.txt", "model.safetensors.sha256"):
        (folder / name).write_bytes(b"x")
    (folder / ".metadata").write_bytes(b"torch's own, of a distributed checkpoint")
    seal(folder)
    (folder / ".nfs000000000000001").unlink()
    (folder / "notes.txt").write_text("edited later")
    assert damage(folder) is None
    (folder / ".metadata").unlink()
    assert damage(folder) == ".metadata is missing"


def test_a_file_under_a_checkpoints_name_is_not_ours(tmp_path):
    make(tmp_path, 4)
    (tmp_path / "checkpoint-8").write_text("notes about step 8")
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-4"
    rotate(tmp_path, 1)
    assert (tmp_path / "checkpoint-8").read_text() == "notes about step 8"
    with pytest.raises(ResumeError, match=r"a file stands where a checkpoint goes; where: .*checkpoint-8; fix: "):
        require_no_file(tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-9").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ResumeError, match="a file stands"):
        require_no_file(tmp_path / "checkpoint-9")
    for step in (4, 12):
        require_no_file(tmp_path / f"checkpoint-{step}")


def test_a_checkpoint_that_lies_elsewhere_counts_and_only_its_link_is_removed(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    make(run, 10, 20)
    (run / "checkpoint-10").rename(elsewhere)
    (run / "checkpoint-10").symlink_to(elsewhere)
    flip(run / "checkpoint-20" / "model.safetensors")
    assert newest_whole(run) == run / "checkpoint-10"
    make(run, 30)
    rotate(run, 1)
    assert names(run) == ["checkpoint-30", "damaged-checkpoint-20"]
    assert damage(elsewhere) is None


def test_a_checkpoint_that_cannot_be_removed_ends_no_training(tmp_path, monkeypatch, capsys):
    def busy(path):
        raise OSError(16, "Device or resource busy")

    make(tmp_path, 10, 20)
    monkeypatch.setattr("stage2_student.checkpoint.shutil.rmtree", busy)
    rotate(tmp_path, 1)
    assert "checkpoint-10 cannot be removed: [Errno 16] Device or resource busy" in capsys.readouterr().err
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-20"
