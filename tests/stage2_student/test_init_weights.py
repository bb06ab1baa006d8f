"""Students of any size, `--init-from`, `--init-embedding`: what may be started from, what it gives, what is refused."""

import json
import re
import shutil
from hashlib import sha256

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM, set_seed

from shared.cache.reader import Cache
from shared.errors import DistillError
from shared.files import sha256_file
from shared.model.gpt import GPT
from stage2_student.cli import student
from stage2_student.config import StudentConfig
from stage2_student.init_weights import EMBEDDING, HEAD, project_embedding, token_counts
from stage2_student.train import weights_digest
from tests.support.student_cache import VOCABULARY, make_cache, save_tokenizer

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
OPTIONS = SIZES | {"preset": "tiny", "block_size": 48, "max_steps": 2, "save_steps": 0, "bf16": False}


def train(cache, out, *options, **changes):
    """The domain error that a run ends with, as text, or None."""
    assigned = [f"--set={key}={json.dumps(value)}" for key, value in (OPTIONS | changes).items()]
    command = ["train", "--cache", str(cache), "--out", str(out), *map(str, options), *assigned]
    error = CliRunner().invoke(student, command).exception
    assert error is None or isinstance(error, DistillError), repr(error)
    return error and str(error)


def record_of(out):
    return json.loads((out / "run.json").read_text())


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("caches") / "train").path


@pytest.fixture(scope="module")
def first(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        assert train(cache, out) is None
    return out


@pytest.fixture
def copy(first, tmp_path):
    return shutil.copytree(first, tmp_path / "copy")


def change(directory, edit):
    """Rewrite the weights of a copy."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_a_student_of_any_size(first):
    model = AutoModelForCausalLM.from_pretrained(first)
    assert {key: getattr(model.config, key) for key in SIZES} == SIZES
    assert model.config.max_position_embeddings == 1024  # the preset's
    H, F, L, kv = 24, 40, 2, 8
    layer = 4 * H + 2 * (H * H + H) + 2 * (H * kv + kv) + (H * F + F) + (F * H + H)
    assert record_of(first)["parameters"] == VOCABULARY * H + L * layer + 2 * H == model.num_parameters()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 5}, "a multiple of 2 x num_attention_heads = 10"),
        ({"num_key_value_heads": 2}, "a divisor of num_attention_heads = 3"),
        ({"num_hidden_layers": 0}, "GPTConfig.num_hidden_layers; expected: above 0; got: 0"),
        ({"max_position_embeddings": 47}, "at most max_position_embeddings = 47"),
        ({"hidden_size": 24.5}, "StudentConfig.hidden_size"),
        ({"vocab_size": 99}, "vocabulary is the cache's"),
        ({"num_layers": 3}, "did you mean 'num_hidden_layers'"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(cache, tmp_path, changes, words):
    assert words in train(cache, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_run_its_export_and_a_checkpoint_in_bfloat16_shards_start_the_same_student(cache, first, tmp_path):
    exported, sharded = tmp_path / "exported", tmp_path / "sharded"
    assert CliRunner().invoke(student, ["export", str(first), "--out", str(exported)]).exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(first, dtype=torch.bfloat16)
    model.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    for source in (first, exported, sharded):
        out = tmp_path / f"from-{source.name}"
        assert train(cache, out, "--init-from", source, seed=9) is None
        tensors = load_file(first / "model.safetensors")
        if source == sharded:
            tensors = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
        assert record_of(out)["initial_weights_sha256"] == sha256(save(dict(sorted(tensors.items())))).hexdigest()
    run, export = (record_of(tmp_path / f"from-{name}")["init_from"] for name in ("first", "exported"))
    digest = sha256_file(first / "model.safetensors")
    assert run == {"path": str(first), "weights_sha256": digest}
    assert export["weights_sha256"] == digest
    assert record_of(first)["init_from"] is None
    again = tmp_path / "again"
    assert CliRunner().invoke(student, ["export", str(tmp_path / "from-first"), "--out", str(again)]).exit_code == 0
    assert f"trained from weights `{digest}`" in (again / "README.md").read_text()
    assert "hidden_size = 24" in (again / "README.md").read_text()


def test_a_run_that_began_elsewhere_is_another_run(cache, first, tmp_path):
    out = tmp_path / "run"
    assert train(cache, out, "--init-from", first) is None
    assert train(cache, out, "--init-from", first) is None
    assert "another init_from" in train(cache, out)
    assert "another init_from" in train(cache, out, "--init-from", out)


def test_a_head_of_its_own(cache, copy, tmp_path):
    change(copy, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert train(cache, tmp_path / "equal", "--init-from", copy) is None
    change(copy, lambda tensors: tensors.update({HEAD: tensors[HEAD] + 1}))
    assert f"{HEAD} differs from {EMBEDDING}" in train(cache, tmp_path / "run", "--init-from", copy)
    change(copy, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    assert train(cache, tmp_path / "alone", "--init-from", copy) is None


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop("model.norm.bias"), "model.norm.bias expected: [24]; got: no such tensor"),
        (lambda t: t.update({"model.extra": torch.ones(1)}), "model.extra expected: no such tensor; got: [1]"),
        (lambda t: t.update({"model.norm.bias": torch.ones(25)}), "model.norm.bias expected: [24]; got: [25]"),
        (lambda t: t.update({HEAD: torch.ones(300, 24)}), "lm_head.weight expected: [257, 24]; got: [300, 24]"),
        (
            lambda t: t.update({"model.norm.bias": torch.ones(24).char()}),
            "model.norm.bias expected: [24]; got: the number",
        ),
    ],
)
def test_other_tensors_are_refused_by_name(cache, copy, tmp_path, edit, words):
    change(copy, edit)
    name, _, rest = words.partition(" ")
    error = train(cache, tmp_path / "run", "--init-from", copy)
    assert f"{name} of the weights to start from does not fit" in error and rest in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_size", 48, "another hidden_size; where: "),
        ("vocab_size", 300, "expected: 257 (the student's); got: 300"),
        ("norm_epsilon", 1e-6, "another norm_epsilon"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e6}, "another rope_parameters"),
        ("sliding_window", 64, "at least 1024; got: 64"),
        ("model_type", "llama", "got: llama"),
        ("num_hidden_layers", "two", "transformers refuses"),
    ],
)
def test_another_architecture_is_refused(cache, copy, tmp_path, key, value, words):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {key: value}))
    assert words in train(cache, tmp_path / "run", "--init-from", copy)
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused(cache, copy, tmp_path):
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace('"!":', '"!?":', 1))
    assert f"the tokenizers of {cache} and {copy} differ" in train(cache, tmp_path / "run", "--init-from", copy)
    save_tokenizer(copy)
    assert train(cache, tmp_path / "run", "--init-from", copy) is None


def test_two_sets_of_weights_are_refused_by_name(cache, copy, tmp_path):
    AutoModelForCausalLM.from_pretrained(copy).save_pretrained(tmp_path / "new", max_shard_size="20KB")
    shards = sorted(file.name for file in (tmp_path / "new").glob("model-*"))
    shutil.copytree(tmp_path / "new", copy, dirs_exist_ok=True)
    error = train(cache, tmp_path / "run", "--init-from", copy)
    assert f"got: model.safetensors; and {', '.join(shards[:3])}" in error
    assert not (tmp_path / "run").exists()
    for name in shards:  # the index alone is a leftover
        (copy / name).unlink()
    assert train(cache, tmp_path / "run", "--init-from", copy) is None
    assert record_of(tmp_path / "run")["init_from"]["weights_sha256"] == sha256_file(copy / "model.safetensors")


def test_what_holds_no_weights_is_refused(cache, copy, tmp_path):
    assert "cannot read a file" in train(cache, tmp_path / "run", "--init-from", tmp_path / "nowhere")
    (copy / "model.safetensors").write_bytes(b"no header")
    assert "cannot read the weights" in train(cache, tmp_path / "run", "--init-from", copy)
    (copy / "model.safetensors").unlink()
    assert "the model lacks a file" in train(cache, tmp_path / "run", "--init-from", copy)


# --- only the embedding -----------------------------------------------------------------------------------------------


def save_model(directory, rows=VOCABULARY + 7, width=40, name="transformer.wte.weight"):
    """Another architecture's embedding, with more rows than the tokenizer has ids; its tokenizer is the cache's."""
    save_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    generator = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(rows, width, generator=generator), "transformer.ln_f.weight": torch.ones(width)}
    save_file(tensors, directory / "model.safetensors")
    return tensors[name]


def test_the_leading_directions_by_frequency_in_float64():
    generator = torch.Generator().manual_seed(0)
    embedding, drawn = torch.randn(50, 12, generator=generator), torch.randn(50, 5, generator=generator)
    counts = torch.randint(0, 9, (50,), generator=generator).double()
    result = project_embedding(embedding, counts, drawn)
    rows = embedding.double().repeat_interleave(counts.long(), 0)  # the corpus, token by token
    *_, directions = torch.linalg.svd(rows, full_matrices=False)
    expected = embedding.double() @ directions[:5].T
    expected *= drawn.double().norm() / drawn.numel() ** 0.5 / (expected.norm() / expected.numel() ** 0.5)
    signs = (expected * result).sum(0).sign()
    torch.testing.assert_close(result.double(), expected * signs, rtol=1e-5, atol=1e-6)


def test_coordinates_beyond_the_width_of_the_embedding_stay_as_drawn():
    embedding, drawn = torch.randn(20, 4), torch.randn(20, 6)
    result = project_embedding(embedding, torch.ones(20).double(), drawn)
    assert torch.equal(result[:, 4:], drawn[:, 4:]) and not torch.equal(result[:, :4], drawn[:, :4])


def test_counts_are_those_of_all_caches(tmp_path, cache):
    caches = [Cache(cache), make_cache(tmp_path / "other", seed=5)]
    expected = sum(np.bincount(each.tokens(d), minlength=VOCABULARY) for each in caches for d in range(8))
    assert token_counts(caches).tolist() == expected.tolist()


def test_a_student_starts_from_another_models_embedding(cache, first, tmp_path):
    embedding = save_model(tmp_path / "teacher")
    out, by_key = tmp_path / "run", tmp_path / "by-key"
    assert train(cache, out, "--init-embedding", tmp_path / "teacher") is None
    assert train(cache, by_key, init_embedding=str(tmp_path / "teacher")) is None
    digest = sha256_file(tmp_path / "teacher" / "model.safetensors")
    assert record_of(out)["init_embedding"] == {"path": str(tmp_path / "teacher"), "weights_sha256": digest}
    assert record_of(first)["init_embedding"] is None
    begun = record_of(out)["initial_weights_sha256"]
    assert begun == record_of(by_key)["initial_weights_sha256"] != record_of(first)["initial_weights_sha256"]
    set_seed(0)
    model = GPT(StudentConfig(**OPTIONS).student_sizes(vocab_size=VOCABULARY))
    weight = model.model.embed_tokens.weight
    weight.data = project_embedding(embedding[:VOCABULARY], token_counts([Cache(cache)]), weight.data)
    assert weights_digest(model.state_dict()) == begun
    exported = tmp_path / "exported"
    assert CliRunner().invoke(student, ["export", str(out), "--out", str(exported)]).exit_code == 0
    assert json.loads((exported / "lineage.json").read_text())["init_embedding"] == {"weights_sha256": digest}
    assert f"trained from the embedding in weights `{digest}`" in (exported / "README.md").read_text()
    save_model(tmp_path / "teacher", width=41)  # another model in the same place
    assert "another init_embedding" in train(cache, out, "--init-embedding", tmp_path / "teacher")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"rows": VOCABULARY - 1},
            f"does not fit the vocabulary; .*expected: floating point, .{VOCABULARY} or more",
        ),
        ({"name": "transformer.wpe.weight"}, "the model has no embedding to start from"),
    ],
)
def test_an_embedding_that_does_not_fit_is_refused(cache, tmp_path, model, message):
    save_model(tmp_path / "teacher", **model)
    assert re.search(message, train(cache, tmp_path / "run", "--init-embedding", tmp_path / "teacher"))
    assert not (tmp_path / "run").exists()


def test_an_embedding_of_other_tokens_or_beside_all_weights_is_refused(cache, first, tmp_path):
    save_model(tmp_path / "teacher")
    options = ("--init-embedding", tmp_path / "teacher")
    assert "have their own embedding" in train(cache, tmp_path / "run", *options, "--init-from", first)
    path = tmp_path / "teacher" / "tokenizer.json"
    path.write_text(path.read_text().replace('"<|endoftext|>"', '"<|end|>"'))
    assert "take the embedding of the teacher" in train(cache, tmp_path / "run", *options)
    assert "no such model" in train(cache, tmp_path / "run", "--init-embedding", tmp_path / "absent")
    assert not (tmp_path / "run").exists()
