"""How `--cache` is read: a weight is a number behind the last colon of a path that does not exist."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import stage2_student.train
from shared.records import to_dict
from stage2_student.cli import student


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What `train` is called with."""
    calls = []
    monkeypatch.setattr(stage2_student.train, "train", lambda *given, **named: calls.append((*given, named)))
    monkeypatch.setattr("stage2_student.cli._open", lambda *paths: None)
    monkeypatch.setattr("stage2_student.request.request_digest", lambda *request: None)
    monkeypatch.chdir(tmp_path)

    def ask(*caches):
        arguments = [part for cache in caches for part in ("--cache", cache)]
        done = CliRunner().invoke(student, ["train", *arguments, "--out", "run", "--preset", "tiny"])
        if done.exit_code:
            return done
        (config, paths, out, named) = calls.pop()
        assert (to_dict(config)["preset"], out, named["validation_path"]) == ("tiny", Path("run"), None)
        return [str(path) for path in paths], named["weights"]

    return ask


def test_weights_and_paths(asked, tmp_path):
    assert asked("a") == (["a"], None)
    assert asked("a", "b") == (["a", "b"], None)
    assert asked("a:0.7", "b:3e-1") == (["a", "b"], [0.7, 0.3])
    assert asked("a:b:2", "c:.5") == (["a:b", "c"], [2.0, 0.5])
    assert asked("a:b", "C:\\cache", "c:1.5.2") == (["a:b", "C:\\cache", "c:1.5.2"], None)
    (tmp_path / "run:2").mkdir()
    assert asked("run:2") == (["run:2"], None)
    assert asked("run:2:0.5") == (["run:2"], [0.5])


@pytest.mark.parametrize("weight", ["0", "-1", "1e999", "0.0"])
def test_a_weight_that_is_none(asked, weight):
    done = asked(f"a:{weight}")
    assert done.exit_code == 2
    assert f"the weight of 'a' must be above 0 and finite, not {weight}" in done.output


def test_all_or_none(asked):
    done = asked("a:0.5", "b")
    assert done.exit_code == 2
    assert "some caches have a weight and some have none" in done.output


def test_a_cache_that_is_not_there_is_refused_before_torch_is_loaded(tmp_path):
    code = f"""
import sys
from shared.__main__ import main
sys.argv[1:] = ["student", "train", "--cache", "{tmp_path}/none", "--out", "{tmp_path}/run"]
try:
    main()
except SystemExit as stop:
    print(stop.code, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "1 False", done.stderr
    assert "there is no cache here" in done.stderr
