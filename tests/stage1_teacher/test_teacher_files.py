import hashlib
import json

import pytest
import torch

from shared.errors import ConfigError
from shared.files import sha256_json
from stage1_teacher.teacher import locate_teacher, quantization_config


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
    files = locate_teacher(str(model))
    assert (files.path, files.name, files.commit, files.licence) == (model, "model", None, None)
    assert files.weights_digest == sha256_json({"model.safetensors": sha256(b"weights")})
    assert files.config_digest == sha256(b"{}")
    (model / "tokenizer.json").write_text("[1]")
    edited = locate_teacher(str(model))
    assert edited.tokenizer_files_digest != files.tokenizer_files_digest
    assert edited.weights_digest == files.weights_digest


def test_sharded_weights_are_those_of_the_index(model):
    (model / "a.safetensors").write_bytes(b"a")
    (model / "b.safetensors").write_bytes(b"b")
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    want = sha256_json({"a.safetensors": sha256(b"a"), "b.safetensors": sha256(b"b")})
    assert locate_teacher(str(model)).weights_digest == want
    (model / "b.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks a file.*b\.safetensors"):
        locate_teacher(str(model))


def test_pickled_weights_are_refused(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        locate_teacher(str(model))


def test_the_licence_is_the_model_cards(model):
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Card\n")
    assert (locate_teacher(str(model)).licence, locate_teacher(str(model)).attribution) == ("apache-2.0", None)
    (model / "README.md").write_text("---\nlicense: other\nlicense_link: LICENSE\nbase_model: owner/base\n---\n")
    files = locate_teacher(str(model))
    assert files.licence == "other"
    assert files.attribution == "owner/base, https://huggingface.co/owner/base, licence text: LICENSE"
    for nothing in ("No front matter.\n", "---\n{\n---\n"):
        (model / "README.md").write_text(nothing)
        assert (locate_teacher(str(model)).licence, locate_teacher(str(model)).attribution) == (None, None)


def test_neither_directory_nor_hub_id(model):
    with pytest.raises(ConfigError, match="no such teacher"):
        locate_teacher("artifacts/teachers/missing")
    with pytest.raises(ConfigError, match="no such teacher"):
        locate_teacher(str(model / "config.json"))
    with pytest.raises(ConfigError, match="no revision"):
        locate_teacher(str(model), "main")


def test_quantised_teachers_compute_in_the_builds_dtype(monkeypatch):
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: True)
    eight, four = quantization_config("8bit", "bfloat16"), quantization_config("4bit", "float16")
    assert (eight.load_in_8bit, eight.load_in_4bit) == (True, False)
    assert (four.load_in_8bit, four.load_in_4bit) == (False, True)
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_compute_dtype) == ("nf4", torch.float16)
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ConfigError, match="--load-in 8bit needs bitsandbytes"):
        quantization_config("8bit", "bfloat16")
