"""`--load-in` without bitsandbytes: what is recorded, refused and handed on; the weights are loaded as they are."""

import pytest
from click.testing import CliRunner

from shared.errors import ResumeError
from stage1_teacher import audit, capture
from stage1_teacher.cli import audit as audit_command
from tests.stage1_teacher.test_build import build


@pytest.fixture
def asked(monkeypatch):
    """What `load_frozen` is asked to quantise to, call by call."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    load_frozen, asked = capture.load_frozen, []

    def unquantised(path, dtype, *, load_in=None, **options):
        asked.append(load_in)
        return load_frozen(path, dtype, **options)

    monkeypatch.setattr(capture, "load_frozen", unquantised)
    monkeypatch.setattr(audit, "load_frozen", unquantised)
    return asked


def test_a_quantised_teacher_is_another_teacher(teacher, rows, tmp_path, asked):
    """The cache's identity says so, a resume keeps to it, and an audit loads the same."""
    plain, _ = build(teacher, rows, tmp_path / "plain")
    cache, _ = build(teacher, rows, tmp_path / "cache", "--load-in", "4bit")
    assert asked == [None, "4bit"]
    labels = plain.manifest.identity["labels"]
    assert cache.manifest.identity["labels"] == labels | {"load_in": "4bit"}
    assert cache.manifest.label_identity != plain.manifest.label_identity

    (cache.path / "manifest.json").unlink()  # as a kill leaves it
    (cache.path / "shard-00001.h5").unlink()
    for options in (["--load-in", "8bit"], []):
        with pytest.raises(ResumeError, match="load_in"):
            build(teacher, rows, cache.path, *options)
    assert len(asked) == 2  # refused before anything is loaded
    build(teacher, rows, cache.path, "--load-in", "4bit")

    result = CliRunner().invoke(audit_command, [str(cache.path), "--teacher", str(teacher)])
    assert result.exit_code == 0, result.output
    assert asked == [None, "4bit", "4bit", "4bit"]
