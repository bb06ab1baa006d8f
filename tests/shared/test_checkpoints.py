import hashlib
import json
import shutil

import pytest
import torch
from transformers import Starcoder2Config, Starcoder2ForCausalLM

from shared.checkpoints import (
    describe_model,
    identify_model,
    load_frozen,
    load_model,
    quantization_config,
    weight_files,
    weights_digest,
)
from shared.errors import ConfigError
from shared.files import sha256_json


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "tokenizer.json").write_text("[]")
    return path


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_a_directory_is_identified_by_content(model):
    files = identify_model(str(model))
    assert (files.path, files.name, files.commit, files.license) == (model, "model", None, None)
    assert files.weights_digest == sha256_json({"model.safetensors": sha256(b"weights")})
    assert files.config_digest == sha256(b"{}")
    (model / "tokenizer.json").write_text("[1]")
    edited = identify_model(str(model))
    assert edited.tokenizer_files_digest != files.tokenizer_files_digest
    assert edited.weights_digest == files.weights_digest


def test_sharded_weights_are_those_of_the_index(model):
    (model / "model.safetensors").unlink()
    (model / "a.safetensors").write_bytes(b"a")
    (model / "b.safetensors").write_bytes(b"b")
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    want = sha256_json({"a.safetensors": sha256(b"a"), "b.safetensors": sha256(b"b")})
    assert identify_model(str(model)).weights_digest == want
    (model / "b.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks a file.*b\.safetensors"):
        identify_model(str(model))


def save(folder, seed, **options):
    """A model of Starcoder2's architecture, its weights drawn from a seed."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    Starcoder2ForCausalLM(Starcoder2Config(**sizes, num_attention_heads=2)).save_pretrained(folder, **options)
    return folder


def equal(one, other):
    ours, theirs = (load_frozen(path, "float32").state_dict() for path in (one, other))
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_digested_is_what_transformers_loads(tmp_path):
    """A file that nothing names takes no part, nor does an index whose files are gone."""
    one, several = save(tmp_path / "one", 1), save(tmp_path / "several", 2, max_shard_size="4KB")
    alone, split = weights_digest(one), weights_digest(several)
    assert len(weight_files(several)) > 1 and not equal(one, several)
    clean = shutil.copytree(several, tmp_path / "clean")
    shutil.copy(one / "model.safetensors", several / "consolidated.safetensors")
    assert (weights_digest(several), equal(several, clean)) == (split, True)
    index = json.loads((several / "model.safetensors.index.json").read_text())
    left = shutil.copytree(one, tmp_path / "left")
    (left / "model.safetensors.index.json").write_text(json.dumps(index))
    assert (weights_digest(left), equal(left, one)) == (alone, True)
    described = describe_model(load_frozen(left), left)
    assert described["bytes"] == (one / "model.safetensors").stat().st_size
    (left / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model.safetensors"}}))
    assert (weights_digest(left), equal(left, one)) == (alone, True)


@pytest.mark.parametrize("left", ["all", "one"])
def test_two_sets_of_weights_are_refused_by_name(tmp_path, left):
    """As in a folder that was saved into twice: transformers loads the one file, vLLM what the index names."""
    both = save(tmp_path / "both", 2, max_shard_size="4KB")
    shards = [file.name for file in weight_files(both)]
    shutil.copy(save(tmp_path / "one", 1) / "model.safetensors", both)
    if left == "one":
        for name in shards[1:]:
            (both / name).unlink()
    for look in (weights_digest, load_frozen, load_model, lambda folder: identify_model(str(folder))):
        with pytest.raises(ConfigError, match="two sets of weights") as caught:
            look(both)
        seconds = f"{', '.join(shards[:3])} and {len(shards) - 3} more" if left == "all" else shards[0]
        assert caught.value.got == f"model.safetensors; and {seconds}"
    (both / "model.safetensors").unlink()
    if left == "all":
        assert weights_digest(both) == weights_digest(save(tmp_path / "again", 2, max_shard_size="4KB"))


def test_a_model_with_weights_missing_is_refused_instead_of_drawn_at_random(tmp_path):
    """As with an index that does not name a shard beside it."""
    several = save(tmp_path / "several", 2, max_shard_size="4KB")
    index = json.loads((several / "model.safetensors.index.json").read_text())
    lost = index["weight_map"].pop("model.norm.weight")
    kept = {name: file for name, file in index["weight_map"].items() if file != lost}
    num_lost = len(index["weight_map"]) - len(kept) + 1
    (several / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": kept}))
    with pytest.raises(ConfigError, match=rf"lack weights of the model.*got: no model\..*, {num_lost} missing in all"):
        load_frozen(several, "float32")


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ("{}", "None"),
        ('{"weight_map": {}}', "{}"),
        ('{"weight_map": {"x": 1}}', "{'x': 1}"),
        ('{"weight_map": {"x": "/a"}}', "{'x': '/a'}"),
        ("[]", "None"),
    ],
)
def test_an_index_that_names_no_files_is_refused(model, content, got):
    (model / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match="the index of the weights cannot be read") as caught:
        weight_files(model)
    assert caught.value.got == got


def test_an_index_that_only_transformers_refuses_is_one_error(tmp_path):
    several = save(tmp_path / "several", 2, max_shard_size="4KB")
    index = json.loads((several / "model.safetensors.index.json").read_text())
    (several / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index["weight_map"]}))
    with pytest.raises(ConfigError, match=r"cannot load the model.*KeyError: 'metadata'"):
        load_frozen(several, "float32")


def test_a_model_that_loads_more_than_its_safetensors_is_refused(model):
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"loads more than its safetensors.*got: adapter_config\.json"):
        identify_model(str(model))
    (model / "adapter_config.json").unlink()
    (model / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
    with pytest.raises(ConfigError, match=r"got: transformers_weights in config\.json"):
        identify_model(str(model))


def test_pickled_weights_are_refused(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        identify_model(str(model))


def test_the_license_is_the_model_cards(model):
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Card\n")
    assert (identify_model(str(model)).license, identify_model(str(model)).attribution) == ("apache-2.0", None)
    (model / "README.md").write_text("---\nlicense: other\nlicense_link: LICENSE\nbase_model: owner/base\n---\n")
    files = identify_model(str(model))
    assert files.license == "other"
    assert files.attribution == "owner/base, https://huggingface.co/owner/base, license text: LICENSE"
    for nothing in ("No front matter.\n", "---\n{\n---\n"):
        (model / "README.md").write_text(nothing)
        assert (identify_model(str(model)).license, identify_model(str(model)).attribution) == (None, None)


def test_neither_directory_nor_hub_id(model):
    with pytest.raises(ConfigError, match="no such model"):
        identify_model("artifacts/teachers/missing")
    with pytest.raises(ConfigError, match="no such model"):
        identify_model(str(model / "config.json"))
    with pytest.raises(ConfigError, match="no revision"):
        identify_model(str(model), "main")


def test_quantised_teachers_compute_in_the_builds_dtype(monkeypatch):
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: True)
    eight, four = quantization_config("8bit", "bfloat16"), quantization_config("4bit", "float16")
    assert (eight.load_in_8bit, eight.load_in_4bit) == (True, False)
    assert (four.load_in_8bit, four.load_in_4bit) == (False, True)
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_compute_dtype) == ("nf4", torch.float16)
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ConfigError, match="--load-in 8bit needs bitsandbytes"):
        quantization_config("8bit", "bfloat16")
