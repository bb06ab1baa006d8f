"""`student train` on a card: a resume, float32's precision, float16 with a loss scaler, and two cards."""

import json
import signal

import pytest
import torch
from click.testing import CliRunner

from shared.cli import codedistill
from tests.stage2_student.test_ranks import torchrun
from tests.stage2_student.test_train import arguments, log_of, run
from tests.support.devices import ON_A_CARD, ON_TWO_CARDS
from tests.support.eval_models import save_model
from tests.support.student_cache import make_cache
from tests.support.student_kills import Trainings, outcome, progress

EXACT = {"full_determinism": True}  # attention's backward pass and the embedding's add in any order without it


def near(ours, theirs, tolerance):
    """Two training logs line by line."""
    assert len(ours) == len(theirs) > 3
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


@ON_A_CARD
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("settings", [EXACT, {"torch_compile": False, **EXACT}, {"bf16": False, **EXACT}])
def test_a_kill_changes_no_bit(tmp_path, settings):
    trainings, out = Trainings(tmp_path, **({"bf16": True} | settings)), tmp_path / "run"
    status, said = trainings.run(out, kill_when=lambda: list(out.glob("checkpoint-*/COMPLETE")) and progress(out) > 3)
    assert status == -signal.SIGKILL, said
    status, said = trainings.run(out)
    assert status == 0 and "continuing from" in said, said
    assert outcome(out) == trainings.expected


@ON_A_CARD
@pytest.mark.timeout(1800)
def test_every_way_to_train_has_the_figures_of_float32(tmp_path):
    make_cache(tmp_path / "train")
    logs = {}
    for name, settings in {
        "float32": {"bf16": False, "torch_compile": False},
        "compiled float32": {"bf16": False, "torch_compile": True},
        "bfloat16": {"bf16": True},
        "float16": {"bf16": False, "fp16": True},
        "recomputed": {"bf16": False, "gradient_checkpointing": True},
    }.items():
        out = tmp_path / name
        said = run(arguments(tmp_path / "train", out, logging_steps=1, max_grad_norm=0.0, **settings)).stderr
        assert (", compiled" in said) == (settings.get("torch_compile", True) and torch.cuda.is_available())
        logs[name] = [line["loss"] for line in log_of(out) if "loss" in line]
    for name, losses in logs.items():
        near(losses, logs["float32"], 1e-3 if name in ("compiled float32", "recomputed") else 0.05)


@ON_A_CARD
def test_training_leaves_float32_products_exact(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    make_cache(tmp_path / "train")
    command = arguments(tmp_path / "train", tmp_path / "run", max_steps=2, save_steps=0)
    done = CliRunner().invoke(codedistill, ["student", *command[command.index("train") :]])
    assert done.exit_code == 0, done.output
    assert torch.get_float32_matmul_precision() == "highest"
    if torch.cuda.is_available():
        x, y = torch.randn(2, 512, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        assert ((x @ y).double() - x.double() @ y.double()).abs().max() < 1e-3  # TF32: about 5e-2


@ON_TWO_CARDS
@pytest.mark.timeout(1800)
def test_two_cards_have_the_figures_of_one(tmp_path):
    make_cache(tmp_path / "train")
    settings = {"max_steps": 12, "save_steps": 4, "logging_steps": 1}
    run(arguments(tmp_path / "train", tmp_path / "one", per_device_train_batch_size=2, **settings))
    process = torchrun(arguments(tmp_path / "train", tmp_path / "two", per_device_train_batch_size=1, **settings))
    errors = process.communicate(timeout=900)[1]
    assert process.returncode == 0, errors
    near(*([line["loss"] for line in log_of(tmp_path / name) if "loss" in line] for name in ("one", "two")), 1e-3)


@ON_A_CARD
def test_latency_is_measured_and_counts_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    directory, out = save_model(tmp_path / "model"), tmp_path / "latency.json"
    options = ["--prompt-tokens", "16", "--new-tokens", "4", "--repeats", "2", "--out", str(out)]
    done = CliRunner().invoke(codedistill, ["eval", "latency", "--model", f"a={directory}", *options])
    assert done.exit_code == 0, done.output
    for batch in json.loads(out.read_text())["models"]["a"]["batches"].values():
        assert batch["decode_tokens_per_second"] > 0
        assert batch["peak_bytes"] or not torch.cuda.is_available()
