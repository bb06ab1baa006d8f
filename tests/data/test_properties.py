"""Properties of reading and tokenising that hold for any text."""

import io
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from data.tabular import parse_jsonl
from data.templates import normalise, prompt_document
from shared.tokenizer import decode, encode_documents, encode_prompt

PIECES = st.sampled_from(
    ["<|bos|>", "<|eos|>", "\n", "\r", "\r\n", "    ", "\t", "def f(x):", "12", '"""', "é", "😀", "\u2028"]
)
TEXT = st.lists(st.one_of(PIECES, st.text(max_size=5)), max_size=12).map("".join)


@pytest.fixture(scope="module", params=[True, False], ids=["regex", "no-regex"])
def tokenizer(request):
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=request.param)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["def f(x):\n    return 12\n", 'def g(y):\n    """é😀"""\n\ty <|eos|>\r\n'] * 3, trainer
    )
    backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>")


@given(TEXT, TEXT)
@example("😀", '"' * 3)
@settings(max_examples=300, deadline=None)
def test_encoding_is_whole_lossless_and_split_at_the_border(tokenizer, prompt, completion):
    (document,) = encode_documents(tokenizer, [(prompt, completion)])
    text = prompt + completion
    assert document.lossless
    assert document.ids == [*encode_prompt(tokenizer, text), 1]
    assert (document.ids[0], document.ids[-1]) == (0, 1)
    assert not {0, 1} & set(document.ids[1:-1])
    head = decode(tokenizer, document.ids[: document.num_prompt_tokens])
    while not prompt.startswith(head):  # the border token begins inside a character, which is then a target as a whole
        assert head.endswith("\ufffd")
        head = head[:-1]
    assert document.target_bytes == len(text.encode()) - len(head.encode())
    if document.num_prompt_tokens < len(document.ids) - 1:  # the first target reaches past the border
        reach = decode(tokenizer, document.ids[: document.num_prompt_tokens + 1])
        assert len(reach.encode()) > len(prompt.encode())


@given(TEXT, TEXT)
def test_rendering_moves_white_space_and_loses_nothing(prompt, completion):
    document = prompt_document("id", "source", prompt, completion)
    assert document.prompt == document.prompt.rstrip()
    assert "\r" not in document.prompt + document.completion
    whole = normalise(prompt) + normalise(completion)
    assert (document.prompt + document.completion).rstrip("\n") == whole.rstrip("\n")
    assert document.completion.endswith("\n")
    assert not document.completion.endswith("\n\n")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(
    rows=st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=5),
    ascii_only=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\r\n"]),
    mark=st.booleans(),
    last_end=st.booleans(),
)
def test_jsonl_reads_back_however_it_is_written(rows, ascii_only, end, mark, last_end):
    text = end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows) + (end if last_end else "")
    data = text.encode("utf-8-sig" if mark else "utf-8")
    assert [row.fields for row in parse_jsonl(io.BytesIO(data), "f")] == rows
