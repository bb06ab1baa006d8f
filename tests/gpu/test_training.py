"""`student train` on a card: a resume, float32's precision, float16 with a loss scaler, and two cards."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from shared.cli import codedistill
from tests.support.cache_faults import CLI
from tests.support.devices import ON_A_CARD, ON_TWO_CARDS
from tests.support.eval_models import save_model
from tests.support.student_cache import make_cache
from tests.support.student_kills import ENVIRONMENT, Trainings, outcome, progress

EXACT = {"full_determinism": True}  # attention's backward pass and the embedding's add in any order without it


def arguments(folder, name, **settings):
    """What to train, on a small cache, into a folder of that name."""
    if not (folder / "train").exists():
        make_cache(folder / "train")
    fixed = {"preset": "tiny", "block_size": 48, "max_steps": 12, "save_steps": 0, "logging_steps": 1}
    assigned = [f"--set={key}={json.dumps(value)}" for key, value in (fixed | settings).items()]
    return ["student", "train", "--cache", str(folder / "train"), "--out", str(folder / name), *assigned]


def train(folder, name, *launcher, **settings):
    """Train in processes of their own; what they said, and the losses by step."""
    command = [*launcher, *CLI, *arguments(folder, name, **settings)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (folder / name / "training_log.jsonl").read_text().splitlines()]
    return done.stderr, [line["loss"] for line in log if "loss" in line]


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
    losses = {}
    for name, settings in {
        "float32": {"bf16": False, "torch_compile": False},
        "compiled": {"bf16": False, "torch_compile": True},
        "recomputed": {"bf16": False, "gradient_checkpointing": True},
        "bfloat16": {"bf16": True},
        "float16": {"bf16": False, "fp16": True},
    }.items():
        said, losses[name] = train(tmp_path, name, **settings)
        assert (", compiled" in said) == (name != "float32")
    assert len(losses["float32"]) == 12
    for name in losses:
        assert losses[name] == pytest.approx(losses["float32"], rel=1e-3 if "float16" not in name else 0.05)


@ON_A_CARD
def test_training_leaves_float32_products_exact(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    done = CliRunner().invoke(codedistill, arguments(tmp_path, "run", max_steps=2))
    assert done.exit_code == 0, done.output
    assert torch.get_float32_matmul_precision() == "highest"
    if torch.cuda.is_available():
        x, y = torch.randn(2, 512, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        assert ((x @ y).double() - x.double() @ y.double()).abs().max() < 1e-3  # TF32: about 5e-2


@ON_TWO_CARDS
@pytest.mark.timeout(1800)
def test_two_cards_have_the_figures_of_one(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    _, one = train(tmp_path, "one", per_device_train_batch_size=2)
    _, two = train(tmp_path, "two", *launcher, per_device_train_batch_size=1)
    assert two == pytest.approx(one, rel=1e-3)


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
