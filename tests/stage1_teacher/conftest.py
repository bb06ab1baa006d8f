"""What the tests of stage 1 share: a tiny teacher, some documents, and no tracking."""

import json

import pytest

from tests.support.small_teacher import VOCABULARY, save_teacher


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(
        ["def add(a, b):\n    return a + b\n" * 20, "for name in names:\n    print(name)\n"], trainer
    )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=special[0], eos_token=special[0])
    return made


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tokenizer):
    return save_teacher(tmp_path_factory.mktemp("teacher"), tokenizer, width=len(tokenizer))


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = [{"prompt": f"# task {i}", "completion": f"\nx = {i}\n" + "y = x\n" * (i % 5)} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return path


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
