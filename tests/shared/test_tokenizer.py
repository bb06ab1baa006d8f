"""Text to ids and back, on a small byte-level BPE trained here."""

import errno
import json
import re

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shared.errors import ConfigError, DistillError
from shared.tokenizer import (
    adopt_ends,
    decode,
    document_ends,
    encode_documents,
    encode_prompt,
    encode_text,
    load_tokenizer,
    record_ends,
    recorded_ends,
    save_tokenizer,
    special_ids,
    tokenizer_digest,
)

SPECIAL = [("<|bos|>", 0), ("<|eos|>", 1)]
CORPUS = ["def f(x):\n    return x\n", "def g(y):\n    return y + 12\n", "class A:\n    x = 34\n"] * 3


def train(*, opening="<|bos|>", **special):
    """A byte-level BPE with digits split, which puts a special token before a text as Llama's does."""
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
    if opening:
        backend.post_processor = processors.TemplateProcessing(single=f"{opening} $A", special_tokens=SPECIAL)
    names = special or {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def encode_document(tokenizer, prompt, completion):
    return encode_documents(tokenizer, [(prompt, completion)])[0]


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
    eos_alone = train(opening=None, eos_token="<|eos|>")
    document = encode_document(eos_alone, "", "x\n")
    assert document.ids[-1] == 1
    assert 0 not in document.ids
    assert document.num_prompt_tokens == 0
    assert document.target_bytes == 1  # nothing predicts the first token, so its byte is no target
    assert encode_prompt(eos_alone, "") == []
    neither = train(opening=None, pad_token="<|eos|>")
    assert encode_document(neither, "x", "\n").ids == encode_prompt(neither, "x\n")


def template(single):
    """A tokenizer that makes this of a text; `$A` is the text."""
    made = train(opening=None)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=SPECIAL)
    return made


@pytest.mark.parametrize(
    ("single", "opening"),
    [
        ("<|bos|> $A", [0]),
        ("<|bos|> $A <|eos|>", [0]),
        ("<|eos|> <|bos|> $A", [1, 0]),
        ("<|eos|> $A", [1]),
        ("$A <|eos|>", []),
        ("$A", []),
    ],
)
def test_a_document_opens_with_what_the_tokenizer_itself_puts_before_a_text(single, opening):
    made = template(single)
    text = made("x\n", add_special_tokens=False).input_ids
    assert made("x\n").input_ids[: len(opening)] == opening
    for _ in range(2):
        assert encode_document(made, "x", "\n").ids == [*opening, *text, 1]  # never twice
        assert encode_prompt(made, "x") == [*opening, *text[:-1]]
        assert made("x\n").input_ids[: len(opening)] == opening  # and it is still there for others
        made.backend_tokenizer.enable_padding(length=20, direction="left")  # as a saved tokenizer may ask for
        made.backend_tokenizer.enable_truncation(3)


def test_a_bos_that_is_never_added_opens_a_document_only_where_it_is_eos_too():
    """SmolLM2-Instruct names `<|im_start|>` as BOS, which opens a turn; StarCoder2's one token stands between texts."""
    turns = train(opening=None, bos_token="<|bos|>", eos_token="<|eos|>")
    assert document_ends(turns) == ((), ("<|eos|>",))
    assert special_ids(turns) == {"bos": None, "eos": 1, "pad": None, "unk": None}
    assert encode_prompt(turns, "x") == encode_text(turns, "x")
    between = train(opening=None, bos_token="<|eos|>", eos_token="<|eos|>")
    assert document_ends(between) == (("<|eos|>",), ("<|eos|>",))
    assert encode_document(between, "x", "\n").ids == [1, *encode_text(between, "x\n"), 1]
    assert document_ends(train(opening=None, bos_token="<|bos|>")) == ((), ())


@pytest.mark.parametrize(
    ("open_with", "close_with", "opening", "closing"),
    [
        ("auto", "auto", [0], [1]),
        ("none", "none", [], []),
        ("eos", "bos", [1], [0]),
        ("bos", "eos", [0], [1]),
        ("<|eos|>", "none", [1], []),
    ],
)
def test_recorded_ends_are_those_of_whoever_loads_the_tokenizer(tmp_path, open_with, close_with, opening, closing):
    made, digest = train(), tokenizer_digest(train())
    ends = record_ends(made, open_with, close_with)
    document = encode_document(made, "def f(x):", "\n    return x\n")
    text = encode_text(made, "def f(x):\n    return x\n")
    assert document.ids == opening + text + closing
    assert document.num_prompt_tokens == len(opening) + len(encode_text(made, "def f(x):"))
    assert document.target_bytes == len("\n    return x\n")
    assert tokenizer_digest(made) == digest  # the vocabulary is the same
    save_tokenizer(made, tmp_path)
    for loaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert document_ends(loaded) == ends
        assert encode_prompt(loaded, "def f(x):") == opening + encode_text(loaded, "def f(x):")
        assert record_ends(loaded) == ends  # a recorded choice is the rule from then on
        assert (special_ids(loaded)["bos"], special_ids(loaded)["eos"]) == (*(opening or [None]), *(closing or [None]))
    assert recorded_ends(tmp_path) == {"opening": list(ends.opening), "closing": list(ends.closing)}


def test_ends_are_adopted_where_there_is_no_record(tmp_path):
    save_tokenizer(train(), tmp_path)
    assert recorded_ends(tmp_path) is None
    teacher, student = load_tokenizer(tmp_path), load_tokenizer(tmp_path)
    record_ends(student, "none", "none")
    for made in (teacher, student):
        adopt_ends(made, None)
    assert document_ends(teacher) == (("<|bos|>",), ("<|eos|>",))
    for made in (teacher, student):
        adopt_ends(made, {"opening": ["<|eos|>"], "closing": ["<|bos|>"]})
    assert document_ends(teacher) == (("<|eos|>",), ("<|bos|>",))
    assert document_ends(student) == ((), ())


@pytest.mark.parametrize("token", ["<|nope|>", "x", "", "BOS"])
def test_a_token_that_is_not_special_is_refused(token):
    message = "no such special token; where: {}; expected: auto, none, bos, eos or one of <|bos|>, <|eos|>; got: {}"
    with pytest.raises(ConfigError, match=re.escape(message.format("--open-with", token).strip())):
        record_ends(train(), token)
    with pytest.raises(ConfigError, match=re.escape(message.format("--close-with", token).strip())):
        record_ends(train(), "auto", token)
    with pytest.raises(ConfigError, match="--open-with"):
        record_ends(train(opening=None, eos_token="<|eos|>"), "bos")


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
