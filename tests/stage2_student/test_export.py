"""An exported student as the draft of a larger model of the same tokenizer."""

import hashlib
import json
import os
import signal

import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from stage2_student.cli import student
from tests.support import warm
from tests.support.student_cache import make_cache, save_tokenizer

NEW_TOKENS = 24


def run_of(tmp_path, monkeypatch, **settings):
    """A student of four steps."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    options = {"preset": "tiny", "block_size": 48, "max_steps": 4, "save_steps": 0, "bf16": False} | settings
    assigned = [f"--set={key}={json.dumps(value)}" for key, value in options.items()]
    cache = make_cache(tmp_path / "cache").path
    command = ["train", "--cache", str(cache), "--out", str(tmp_path / "run"), *assigned]
    assert CliRunner().invoke(student, command).exit_code == 0
    return tmp_path / "run"


def test_a_killed_export_leaves_nothing_behind_once_another_is_made(tmp_path, monkeypatch):
    run, exports = run_of(tmp_path, monkeypatch), tmp_path / "exports"
    code = (
        "import os, shutil, signal, sys; from pathlib import Path; from stage2_student.export import export\n"
        "shutil.copyfile = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "export(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    killed = warm.run(run, exports / "student", program=code, env=os.environ, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(exports.iterdir())) == 1
    assert CliRunner().invoke(student, ["export", str(run), "--out", str(exports / "student")]).exit_code == 0
    assert [path.name for path in exports.iterdir()] == ["student"]


def test_older_readers_find_the_rotary_base_and_the_dtype_where_they_look(tmp_path, monkeypatch):
    run = run_of(tmp_path, monkeypatch, rope_theta=500_000.0)
    assert CliRunner().invoke(student, ["export", str(run), "--out", str(tmp_path / "export")]).exit_code == 0
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500_000.0
    assert config["torch_dtype"] == config["dtype"] == "float32"
    tokenizer = json.loads((tmp_path / "export" / "tokenizer_config.json").read_text())
    assert tokenizer == {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "model_max_length": 10**30 + 19884624838656,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 500_000.0}
    again = CliRunner().invoke(student, ["train", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "again"),
                                         "--init-from", str(tmp_path / "export"), "--set=preset=\"tiny\"",
                                         "--set=block_size=48", "--set=max_steps=1", "--set=rope_theta=500000.0",
                                         "--set=save_steps=0", "--set=bf16=false"])  # fmt: skip
    assert again.exit_code == 0, again.exception


def test_only_what_the_run_made_is_exported_and_only_as_training_ended(tmp_path, monkeypatch):
    run = run_of(tmp_path, monkeypatch)
    for stray in ("consolidated.safetensors", "modeling.py", "pytorch_model.bin"):
        (run / stray).write_bytes(b"{}")
    assert CliRunner().invoke(student, ["export", str(run), "--out", str(tmp_path / "one")]).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "lineage.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    again = CliRunner().invoke(student, ["export", str(tmp_path / "one"), "--out", str(tmp_path / "two")])
    assert "not a finished training run" in str(again.exception)
    nowhere = CliRunner().invoke(student, ["export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "two")])
    assert "there is no such folder" in str(nowhere.exception)
    same = CliRunner().invoke(student, ["export", str(run), "--out", str(tmp_path / "one")])
    assert same.exit_code == 0 and "is up to date" in same.output
    (tmp_path / "one" / "config.json").write_text("{}")
    edited = CliRunner().invoke(student, ["export", str(run), "--out", str(tmp_path / "one")])
    assert "the export's folder is not empty" in str(edited.exception)

    weights = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(weights[:-4] + bytes(4))
    altered = CliRunner().invoke(student, ["export", str(run), "--out", str(tmp_path / "two")])
    assert "not those that training ended with" in str(altered.exception)
    assert hashlib.sha256(weights).hexdigest() in str(altered.exception)
    (run / "model.safetensors").write_bytes(weights)
    (run / "model-00001-of-00001.safetensors").write_bytes(weights)
    (run / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00001.safetensors"}}')
    both = CliRunner().invoke(student, ["export", str(run), "--out", str(tmp_path / "two")])
    assert "got: model.safetensors; and model-00001-of-00001.safetensors" in str(both.exception)
    assert not (tmp_path / "two").exists()


def test_assisted_generation_takes_an_export_as_draft_and_gives_the_teachers_greedy_text(tmp_path, monkeypatch):
    run = run_of(tmp_path, monkeypatch)
    assert CliRunner().invoke(student, ["export", str(run), "--out", str(tmp_path / "draft")]).exit_code == 0
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    # A teacher that mostly agrees: the same weights, moved a little, in a directory of its own.
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std().nan_to_num() * 0.05)
    teacher.save_pretrained(tmp_path / "teacher")
    save_tokenizer(tmp_path / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(None))
    inputs = AutoTokenizer.from_pretrained(tmp_path / "teacher")("def add(a, b):", return_tensors="pt")
    greedy = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    plain = teacher.generate(**inputs, **greedy)
    assert len(calls) == NEW_TOKENS
    calls.clear()
    assisted = teacher.generate(**inputs, **greedy, assistant_model=draft)
    assert torch.equal(plain, assisted)
    assert len(calls) < NEW_TOKENS  # some of the draft's tokens were taken
