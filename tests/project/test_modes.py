"""Whatever a command writes has the mode that the umask gives."""

import json
import os

import pytest
from click.testing import CliRunner

from shared.cli import codedistill
from tests.support.eval_models import save_model


@pytest.fixture
def umask(monkeypatch):
    # One W&B service writes for all tests of a process, under the umask of the test that started it.
    monkeypatch.setenv("WANDB_MODE", "disabled")
    before = os.umask(0o027)
    yield
    os.umask(before)


def run(*arguments):
    done = CliRunner().invoke(codedistill, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)


def modes(folder):
    return {str(path.relative_to(folder)): oct(path.stat().st_mode & 0o7777) for path in sorted(folder.rglob("*"))}


def test_every_file_of_every_folder(tmp_path, umask):
    teacher = save_model(tmp_path / "teacher", positions=512)
    rows = [{"text": f"def f{i}(a):\n    return a + {i}\n"} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    out.mkdir()
    cache, model, results = out / "cache", out / "run", out / "eval" / "mine"
    settings = ("max_steps=2", "save_steps=1", "block_size=64", "bf16=false", "per_device_train_batch_size=1")
    run("teacher", "build", "--teacher", teacher, "--dataset", tmp_path / "data.jsonl", "--out", cache)
    run("cache", "slice", cache, "--out", out / "sliced", "--top-k", 4)
    run("student", "train", "--cache", cache, "--out", model, "--preset", "tiny", *(f"--set={s}" for s in settings))
    run("student", "export", model, "--out", out / "exported")
    run("eval", "fidelity", "--model", model, "--cache", cache, "--out", results / "fidelity.json")
    run("eval", "humaneval", "--model", model, "--limit", 1, "--max-new-tokens", 2, "--out", results / "humaneval")
    run(
        "eval",
        "report",
        "--eval",
        out / "eval",
        "--student",
        f"mine={model}",
        "--cache",
        cache,
        "--out",
        out / "report",
    )
    found = modes(out)
    files = {name: mode for name, mode in found.items() if (out / name).is_file()}
    assert set(files.values()) == {"0o640"}, {name: mode for name, mode in files.items() if mode != "0o640"}
    assert {mode for name, mode in found.items() if name not in files} == {"0o750"}
    for name in ("run/checkpoint-1/model.safetensors", "exported/model.safetensors", "cache/tokenizer/tokenizer.json",
                 "sliced/manifest.json", "eval/mine/humaneval/result.json", "report/report.html"):  # fmt: skip
        assert name in files
