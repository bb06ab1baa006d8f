"""StarCoder2-3B's true shape, with random weights in bfloat16, captures MBPP documents on a CPU by the usual command.

Needs about 10 GB of memory and 7 GB of disk.
"""

import json
import resource
import shutil
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
import torch
from transformers import Starcoder2Config, Starcoder2ForCausalLM

from shared.cache.reader import Cache
from shared.cache.verify import verify_cache
from shared.process import own_command
from tests.support import hub_contents

NUM_DOCUMENTS = 4
REAL_MBPP = Path(__file__).parents[3] / "shared/data/mbpp.jsonl"
# https://huggingface.co/bigcode/starcoder2-3b/blob/main/config.json
SHAPE = {
    "vocab_size": 49_152,
    "hidden_size": 3_072,
    "intermediate_size": 12_288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16_384,
    "sliding_window": 4_096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 999_999.4420358813},
    "norm_epsilon": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "use_bias": True,
    "tie_word_embeddings": True,
}


@pytest.fixture
def teacher(tmp_path):
    """The directory of a 3-billion-parameter model; N(0, 0.02²) weights, zero biases, unit norms."""
    folder = tmp_path / "starcoder2-3b"
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text(errors="replace") for file in [*library, *library[0].parent.glob("*/*.py")]]
    tokenizer = hub_contents.bpe_tokenizer(texts, SHAPE["vocab_size"])
    assert len(tokenizer) == SHAPE["vocab_size"]
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Starcoder2ForCausalLM(Starcoder2Config(**SHAPE))
    model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter.data, std=0.02)
        else:
            torch.nn.init.constant_(parameter.data, float(name.endswith("norm.weight") or "layernorm.weight" in name))
    assert model.num_parameters() == 3_030_371_328
    model.save_pretrained(folder, max_shard_size="2GB")
    yield folder
    shutil.rmtree(folder)


def test_the_true_shape_is_captured(teacher, tmp_path):
    data = REAL_MBPP
    if not data.exists():
        data = tmp_path / "mbpp.jsonl"
        rows = [hub_contents.mbpp_row(i) for i in range(601, 601 + NUM_DOCUMENTS)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = own_command("teacher", "build", "--teacher", str(teacher))
    command += ["--dataset", str(data), "--limit-docs", str(NUM_DOCUMENTS), "--out", str(tmp_path / "cache")]
    start = time.monotonic()
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    weights = sum(file.stat().st_size for file in teacher.glob("*.safetensors"))
    cache = Cache(tmp_path / "cache")
    print(f"{cache.num_tokens} tokens in {seconds:.0f} s; weights {weights:,} bytes, peak memory {peak:,} bytes")

    assert verify_cache(cache.path) == []
    assert cache.num_documents == NUM_DOCUMENTS
    assert cache.head_width == SHAPE["vocab_size"]
    assert peak < weights + 2 * 2**30
