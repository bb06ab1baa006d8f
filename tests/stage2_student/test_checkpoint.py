"""Which checkpoints count."""

import pytest

from stage2_student.checkpoint import MARKER, checkpoints, damage, latest_complete, remove_incomplete, rotate, seal


def make(run, *steps, complete=True):
    for step in steps:
        folder = run / f"checkpoint-{step}"
        (folder / "deep").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "deep" / "state").write_bytes(b"state")
        if complete:
            seal(folder)


def names(run):
    return sorted(path.name for path in run.iterdir())


def test_steps_are_ordered_as_numbers_and_other_folders_ignored(tmp_path):
    make(tmp_path, 100, 9, 20)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-7-old").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]
    assert latest_complete(tmp_path) == tmp_path / "checkpoint-100"


def test_a_folder_without_the_marker_never_counts_and_is_removed(tmp_path):
    make(tmp_path, 10)
    make(tmp_path, 20, complete=False)
    assert latest_complete(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / ".run.json.tmp-123").write_text("half")
    (tmp_path / "run.json").write_text("{}")
    remove_incomplete(tmp_path)
    assert names(tmp_path) == ["checkpoint-10", "run.json"]


def test_no_checkpoint(tmp_path):
    assert latest_complete(tmp_path) is None
    make(tmp_path, 5, complete=False)
    assert latest_complete(tmp_path) is None


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
    assert latest_complete(tmp_path) == tmp_path / "checkpoint-20"


def test_the_best_checkpoint_outlives_rotation(tmp_path):
    make(tmp_path, 10, 20, 30)
    rotate(tmp_path, 1, best=str(tmp_path / "checkpoint-10"))
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-30"]


def flip(path):
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: flip(folder / "model.safetensors"), "model.safetensors is not what was saved"),
        (lambda folder: (folder / "deep/state").write_bytes(b"stat"), "deep/state is not what was saved"),
        (lambda folder: (folder / "deep/state").unlink(), "deep/state is missing"),
        (lambda folder: (folder / "optimizer.pt").write_bytes(b""), "optimizer.pt was not there when it was saved"),
        (lambda folder: (folder / MARKER).write_bytes(b""), "not valid JSON"),
        (lambda folder: (folder / MARKER).write_text("[]"), "names no files"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, capsys, harm, words):
    make(tmp_path, 10, 20)
    assert damage(tmp_path / "checkpoint-20") is None
    harm(tmp_path / "checkpoint-20")
    assert latest_complete(tmp_path) == tmp_path / "checkpoint-10"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'checkpoint-20'} is damaged and removed: ")
    assert words in line
    assert names(tmp_path) == ["checkpoint-10"]
