"""Fidelity and latency on tiny models, through the code that `codedistill eval` runs."""

import json

import pytest
from click.testing import CliRunner

from shared.cli import codedistill
from shared.errors import CacheMismatchError
from shared.eval.fidelity import evaluate_fidelity
from shared.eval.models import load_model, num_parameters
from tests.eval_models import save_model

PROMPTS = ["def add(a, b):", "for", "x = 1\nwhile x < 100:\n    x = x + add(x, x)", "print(name)", "a", "return b + a"]


@pytest.fixture(scope="module", autouse=True)
def no_tracking():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def test_tied_parameters_count_once(directory):
    model, _ = load_model(directory)
    names = {name: p.numel() for name, p in model.named_parameters()}
    assert "lm_head.weight" not in names
    assert num_parameters(model) == sum(names.values())
    assert names["model.embed_tokens.weight"] == model.config.vocab_size * 32


def test_latency_command(directory, tmp_path):
    out = tmp_path / "latency.json"
    options = ["--prompt-tokens", "16", "--new-tokens", "4", "--repeats", "2", "--out", str(out)]
    done = CliRunner().invoke(codedistill, ["eval", "latency", "--model", f"a={directory}", *options])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    model = result["models"]["a"]
    assert model["bytes"] == (directory / "model.safetensors").stat().st_size
    assert result["settings"]["new_tokens"] == 4
    low, high = model["prefill_ms_range"]
    assert 0 < low <= model["prefill_ms"] <= high
    doubled = ["--model", f"a={directory}", "--model", f"a={directory}"]
    assert CliRunner().invoke(codedistill, ["eval", "latency", *doubled, *options]).exit_code == 2


@pytest.fixture(scope="module")
def cache(directory, tmp_path_factory):
    """The model's own cache, built by stage 1 in float32."""
    from stage1_teacher.cli import teacher

    folder = tmp_path_factory.mktemp("cache")
    rows = [{"prompt": prompt, "completion": f" {prompt}[{i}]\n" * (i + 1)} for i, prompt in enumerate(PROMPTS)]
    (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--teacher", str(directory), "--dataset", str(folder / "docs.jsonl"), "--split", "train"]
    options += ["--out", str(folder / "cache"), "--top-k", "8", "--shard-tokens", "60", "--dtype", "float32"]
    done = CliRunner().invoke(teacher, ["build", *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder / "cache"


def test_a_teacher_against_its_own_cache(directory, cache, tmp_path):
    out = tmp_path / "new" / "fidelity.json"
    done = CliRunner().invoke(
        codedistill,
        [
            "eval",
            "fidelity",
            "--model",
            str(directory),
            "--cache",
            str(cache),
            "--out",
            str(out),
            "--batch-tokens",
            "64",
        ],
    )
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert result["top1_agreement"] == 1.0
    assert abs(result["kl_to_teacher_nats"]) < 1e-4
    assert result["nll_nats"] == pytest.approx(result["teacher_nll_nats"], abs=1e-5)
    assert result["kind"] == "partition K=8"
    assert result["reasons"] == {}


def test_another_model_is_not_its_teacher(cache, tmp_path):
    result = evaluate_fidelity(save_model(tmp_path, seed=1), cache, dtype="float32", batch_tokens=4096)
    assert result["kl_to_teacher_nats"] > 0.5
    assert result["top1_agreement"] < 0.5


def test_another_tokenizer_is_refused(directory, cache, tmp_path):
    import shutil

    other = tmp_path / "model"
    shutil.copytree(directory, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"add_prefix_space": false', '"add_prefix_space": true'))
    with pytest.raises(CacheMismatchError, match="tokenizer"):
        evaluate_fidelity(other, cache, dtype="auto", batch_tokens=64)
