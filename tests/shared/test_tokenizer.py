"""Text to ids and back, on a small byte-level BPE trained here."""

import errno
import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shared.errors import DistillError
from shared.tokenizer import (
    decode,
    encode_document,
    encode_prompt,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    tokenizer_digest,
)

CORPUS = ["def f(x):\n    return x\n", "def g(y):\n    return y + 12\n", "class A:\n    x = 34\n"] * 3


def train(**special):
    """A byte-level BPE with digits split."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    names = special or {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture(scope="module")
def tokenizer():
    return train()


def test_a_document_is_bos_text_eos(tokenizer):
    document = encode_document(tokenizer, "def f(x):", "\n    return x\n")
    prompt = encode_prompt(tokenizer, "def f(x):")
    assert prompt == document.ids[: document.num_prompt_tokens]
    assert special_ids(tokenizer) == {"bos": 0, "eos": 1, "pad": None, "unk": None}
    assert document.ids[0] == 0
    assert document.ids[-1] == 1
    assert not {0, 1} & set(document.ids[1:-1])
    assert decode(tokenizer, document.ids) == "def f(x):\n    return x\n"
    assert decode(tokenizer, document.ids[document.num_prompt_tokens :]) == "\n    return x\n"
    assert document.target_bytes == len("\n    return x\n")
    assert document.lossless


def test_only_the_ends_that_exist_are_added():
    eos_alone = train(eos_token="<|eos|>")
    document = encode_document(eos_alone, "", "x\n")
    assert document.ids[-1] == 1
    assert 0 not in document.ids
    assert document.num_prompt_tokens == 0
    assert document.target_bytes == 1  # nothing predicts the first token, so its byte is no target
    assert encode_prompt(eos_alone, "") == []
    neither = train(pad_token="<|eos|>")
    assert encode_document(neither, "x", "\n").ids == encode_prompt(neither, "x\n")


def test_a_post_processor_never_adds_a_second_bos(tokenizer):
    doubled = train()
    doubled.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)]
    )
    assert doubled("x").input_ids[0] == 0
    assert encode_document(doubled, "x", "\n").ids == encode_document(tokenizer, "x", "\n").ids
    assert encode_prompt(doubled, "x") == encode_prompt(tokenizer, "x")
    assert doubled("x").input_ids[0] == 0  # and it is still there for others


@pytest.mark.parametrize("text", ["<|bos|>", "a <|eos|> b", "<|eos|><|eos|>\n"])
def test_spelled_special_tokens_are_text(tokenizer, text):
    assert {0, 1} & set(tokenizer(text).input_ids)  # what would happen otherwise
    document = encode_document(tokenizer, text, text)
    assert not {0, 1} & set(document.ids[1:-1])
    assert document.lossless
    assert decode(tokenizer, document.ids) == text + text
    assert {0, 1} & set(tokenizer(text).input_ids)  # the tokenizer is left as it was


@pytest.mark.parametrize("trim", [False, True])
def test_a_straddling_token_belongs_to_the_completion(trim):
    """Here `:` and the space that follows are one token, whose offsets a byte-level post-processor trims to `:`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, ":Ġ"])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[(":", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    document = encode_document(tokenizer, "if x:", " y\n")
    assert document.ids == [vocabulary[token] for token in ["i", "f", "Ġ", "x", ":Ġ", "y", "Ċ"]]
    assert document.num_prompt_tokens == 4
    assert document.target_bytes == len(": y\n")


def test_borders_between_multi_byte_characters(tokenizer):
    document = encode_document(tokenizer, "é😀", "ü\n")
    assert document.num_prompt_tokens == 1 + 6  # BOS, then one token per byte
    assert document.target_bytes == 3
    assert document.lossless


def test_saved_truncation_and_padding_do_not_cut():
    cut = train()
    whole = encode_document(cut, "def f(x):", "\n    return x\n").ids
    digest = tokenizer_digest(cut)
    cut.backend_tokenizer.enable_truncation(3)
    cut.backend_tokenizer.enable_padding(length=50)
    assert tokenizer_digest(cut) == digest
    assert encode_document(cut, "def f(x):", "\n    return x\n").ids == whole


def test_lost_characters_are_reported(tokenizer):
    lossy = train()
    lossy.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert not encode_document(lossy, "A", "\n").lossless
    assert encode_document(lossy, "a", "\n").lossless
    assert encode_document(tokenizer, "a , b .", " ' s n't\t\0\n").lossless


def test_digest_survives_saving_and_reloading(tokenizer, tmp_path):
    digest = tokenizer_digest(tokenizer)
    save_tokenizer(tokenizer, tmp_path / "one")
    one = load_tokenizer(tmp_path / "one")
    assert tokenizer_digest(one) == digest
    one("text", truncation=True, max_length=2)
    save_tokenizer(one, tmp_path / "two")
    assert tokenizer_digest(load_tokenizer(tmp_path / "two")) == digest
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path / "two")) == digest


def edit_vocabulary(state):
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def edit_merges(state):
    merges = state["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def edit_normaliser(state):
    state["normalizer"] = {"type": "NFC"}


def edit_pre_tokenizer(state):
    state["pre_tokenizer"]["pretokenizers"].pop(0)


def edit_decoder(state):
    state["decoder"] = {"type": "Fuse"}


def edit_added_flag(state):
    state["added_tokens"][0]["lstrip"] = True


@pytest.mark.parametrize(
    "edit", [edit_vocabulary, edit_merges, edit_normaliser, edit_pre_tokenizer, edit_decoder, edit_added_flag]
)
def test_digest_sees_every_change(tokenizer, tmp_path, edit):
    save_tokenizer(tokenizer, tmp_path)
    file = tmp_path / "tokenizer.json"
    state = json.loads(file.read_text())
    edit(state)
    file.write_text(json.dumps(state))
    assert tokenizer_digest(load_tokenizer(tmp_path)) != tokenizer_digest(tokenizer)


def test_digest_sees_added_tokens_and_ends(tokenizer):
    more = train()
    assert tokenizer_digest(more) == tokenizer_digest(tokenizer)
    more.add_tokens([AddedToken("<new>")])
    other_end = train(bos_token="<|bos|>", eos_token="<|bos|>")
    assert len({tokenizer_digest(t) for t in (tokenizer, more, other_end)}) == 3


@pytest.mark.parametrize("class_name", ["GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_tokenizer_json_is_read_as_it_is(tokenizer, tmp_path, class_name):
    """`AutoTokenizer` drops the digit splitting of a file that names GPT2Tokenizer, as StarCoder2's does."""
    save_tokenizer(tokenizer, tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": class_name}))
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_digest(loaded) == tokenizer_digest(tokenizer)
    save_tokenizer(loaded, tmp_path / "again")
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path / "again")) == tokenizer_digest(tokenizer)


def test_what_cannot_be_loaded_is_named(tokenizer, tmp_path):
    with pytest.raises(DistillError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
    with pytest.raises(DistillError, match="absent"):
        load_tokenizer(tmp_path / "absent")
    save_tokenizer(tokenizer, tmp_path / "damaged")
    (tmp_path / "damaged/tokenizer.json").write_text('{"version"')
    with pytest.raises(DistillError, match="damaged"):
        load_tokenizer(tmp_path / "damaged")


def test_code_beside_a_tokenizer_is_never_run(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    file = tmp_path / "tokenizer_config.json"
    remote = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | remote))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    assert tokenizer_digest(load_tokenizer(tmp_path)) == tokenizer_digest(tokenizer)
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_is_a_system_error(tmp_path):
    """The tokenizers library itself raises a bare Exception."""

    class Full:
        def save_pretrained(self, directory):
            raise Exception("No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left on device") as error:
        save_tokenizer(Full(), tmp_path)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path))


def test_what_is_saved_names_nothing_that_older_readers_do_not_know(tokenizer, tmp_path):
    """tests/soak/test_older_transformers.py loads such files with transformers 4."""
    tokenizer = train(bos_token="<|bos|>", eos_token="<|eos|>", additional_special_tokens=["<fim>"])
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    remote = {"auto_map": {"AutoTokenizer": ["there.Tokenizer", None]}, "is_local": False, "local_files_only": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | remote))
    again = load_tokenizer(tmp_path)
    (tmp_path / "again").mkdir()
    save_tokenizer(again, tmp_path / "again")
    assert config == json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert config == {
        "additional_special_tokens": ["<fim>"],
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "model_max_length": 10**30 + 19884624838656,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    assert again.extra_special_tokens == ["<fim>"]
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path)("def f<fim>").input_ids == tokenizer("def f<fim>").input_ids
