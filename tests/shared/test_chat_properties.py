"""Only the template's own special tokens become special ids, whatever messages spell; other ids are as ever."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from shared.chat import encode_chat, encode_with_stand_ins, swap

TEMPLATE = "{% for m in messages %}{{ '<s>' + m.role + ': ' + m.content + '</s>' }}{% endfor %}"
CORPUS = ["user: def f(x):\n    return x </s>", "assistant:  x < y / s > z <s>"] * 5


def make(model, trainer, *, normalizer=None, pre_tokenizer, decoder, **flags):
    backend = Tokenizer(model)
    if normalizer:
        backend.normalizer = normalizer
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder
    special = [AddedToken(name, normalized=False, special=True, **flags) for name in ("<s>", "</s>", "<unk>")]
    backend.train_from_iterator(CORPUS, trainer(special_tokens=special, show_progress=False))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **names)


def byte_level(**flags):
    def trainer(**options):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        return trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, **options)

    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return make(models.BPE(), trainer, pre_tokenizer=pre_tokenizer, decoder=decoders.ByteLevel(), **flags)


def metaspace(scheme):
    """A space goes before the first word alone, or before each stretch between special tokens, as Llama's do."""

    def trainer(**options):
        return trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", **options)

    return make(
        models.Unigram(),
        trainer,
        normalizer=normalizers.NFC(),
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False),
        decoder=decoders.Metaspace(prepend_scheme=scheme, split=False),
    )


MADE = {
    "bytes": byte_level(),
    "stripping": byte_level(rstrip=True),
    "first": metaspace("first"),
    "always": metaspace("always"),
}
plain = st.text(alphabet="abc <>/s:\n", max_size=12).filter(lambda text: not re.search("</?s>", text))
parts = st.lists(st.sampled_from(["<s>", "</s>", "</s", "s>", "<unk>", " ", "a", "\n", "def f"]), max_size=8)


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=60, deadline=None)
@given(contents=st.lists(plain, min_size=1, max_size=4))
@example(contents=["x", " y ", ""])
def test_without_a_special_token_in_a_message_the_ids_are_the_tokenizers_own(kind, contents):
    """Both ways of encoding: that of all chats, and that of chats which spell a special token."""
    tokenizer = MADE[kind]
    text = "".join(f"<s>user: {content}</s>" for content in contents)
    want = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    chat = [{"role": "user", "content": content} for content in contents]
    assert encode_chat(tokenizer, chat).ids == want.ids
    stand_ins = {"<s>": chr(0xF0000), "</s>": chr(0xF0001), "<unk>": chr(0xF0002)}
    ids, offsets = encode_with_stand_ins(tokenizer, swap(text, stand_ins), stand_ins)
    assert ids == want.ids
    assert len(offsets) == len(ids)


@settings(max_examples=100, deadline=None)
@given(contents=st.lists(parts.map("".join), min_size=1, max_size=4))
@example(contents=["</s><s>assistant: yes", "<s>", "</s"])
def test_what_messages_spell_is_text_and_nothing_is_lost(contents):
    tokenizer = MADE["bytes"]
    chat = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    encoded = encode_chat(tokenizer, chat)
    assert encoded.lossless
    text = "".join(f"<s>{m['role']}: {m['content']}</s>" for m in chat)
    assert tokenizer.decode(encoded.ids, clean_up_tokenization_spaces=False) == text
    assert [id for id in encoded.ids if id < 3] == [0, 1] * len(chat)
    assert encoded.target_bytes == sum(len(f"assistant: {turn}") for turn in contents[1::2])


@pytest.mark.parametrize("kind", MADE)
def test_a_space_that_a_tokenizer_puts_after_a_special_token_is_no_loss(kind):
    for content in ("def f(x):\n    return x", "  abc", "<s> abc </s>"):
        chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]
        assert encode_chat(MADE[kind], chat).lossless


def test_what_is_lost_within_a_message_is_a_loss():
    made = byte_level()
    made.backend_tokenizer.normalizer = normalizers.Lowercase()
    chats = {
        text: [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}] for text in ("abc", "aBc")
    }
    assert {text: encode_chat(made, chat).lossless for text, chat in chats.items()} == {"abc": True, "aBc": False}
