"""Which checkpoints count."""

from stage2_student.checkpoint import MARKER, checkpoints, latest_complete, remove_incomplete, rotate, seal


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
