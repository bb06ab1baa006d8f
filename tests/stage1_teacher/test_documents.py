import pytest

from data.records import Document
from shared.errors import ConfigError
from stage1_teacher import documents as module
from stage1_teacher.documents import cut_documents


class Letters:
    """A tokenizer of one token per letter, `ids` a=1 …; enough of the interface for `shared.tokenizer` stand-ins."""


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    from shared.tokenizer import Encoded

    def encode(tokenizer, prompt, completion):
        ids = [0, *(ord(c) for c in prompt + completion), 0]
        return Encoded(
            ids=ids,
            is_target=[i > len(prompt) for i in range(len(ids))],
            target_bytes=len(completion.encode()),
            lossless="~" not in prompt + completion,
        )

    monkeypatch.setattr(module, "encode_document", encode)
    monkeypatch.setattr("shared.tokenizer.decode", lambda tokenizer, ids: "".join(chr(i) for i in ids if i))


def cut(*texts, max_length=None, on_long="split", head_width=200):
    documents = [Document(id=f"d{i}", source="s", prompt=p, completion=c) for i, (p, c) in enumerate(texts)]
    return cut_documents(documents, Letters(), max_length=max_length, on_long=on_long, head_width=head_width)


def spelled(segment):
    """The targets' text."""
    return "".join(chr(i) for i, learnt in zip(segment.ids, segment.is_target, strict=True) if i and learnt)


def test_a_document_that_fits_is_one_segment():
    corpus = cut(("ab", "cde"), max_length=7)
    (segment,) = corpus.segments
    assert segment.ids == [0, *b"abcde", 0]
    assert segment.is_target == [False] * 3 + [True] * 4
    assert segment.meta["target_bytes"] == 3
    assert (segment.meta["id"], segment.meta["origin"], "part" in segment.meta) == ("d0", "corpus", False)
    assert (corpus.long, corpus.lossy) == ([], [])


@pytest.mark.parametrize("max_length", [2, 3, 4, 5, 6, 11])
def test_split_parts_predict_every_target_once(max_length):
    corpus = cut(("ab", "cdefghij"), max_length=max_length)
    assert corpus.long == ["d0"]
    assert all(2 <= len(segment.ids) <= max_length for segment in corpus.segments)
    rebuilt = corpus.segments[0].ids + [i for segment in corpus.segments[1:] for i in segment.ids[1:]]
    assert rebuilt == [0, *b"abcdefghij", 0]
    assert "".join(spelled(segment) for segment in corpus.segments) == "cdefghij"
    assert sum(segment.meta["target_bytes"] for segment in corpus.segments) == 8
    assert [segment.meta["part"] for segment in corpus.segments] == list(range(len(corpus.segments)))


def test_truncate_keeps_the_first_part_and_its_bytes():
    (segment,) = cut(("ab", "cdefghij"), max_length=6, on_long="truncate").segments
    assert segment.ids == [0, *b"abcde"]
    assert segment.meta["target_bytes"] == 3
    (segment,) = cut(("ab", "cdefghij"), max_length=2, on_long="truncate").segments
    assert (any(segment.is_target), segment.meta["target_bytes"]) == (False, 0)  # the prompt alone fills it: no target


def test_documents_that_truncation_leaves_without_a_target_are_counted():
    """One has its completion beyond the limit, one has a token of it within, one never had any and one fits."""
    texts = (("y" * 8, "zz"), ("yyy", "zz"), ("y" * 9, ""), ("y", "z"))
    corpus = cut(*texts, max_length=6, on_long="truncate")
    assert corpus.without_targets == ["d0", "d2"]
    assert [sum(segment.is_target) for segment in corpus.segments] == [0, 2, 0, 2]
    assert cut(*texts, max_length=6).without_targets == []


def test_drop_leaves_the_others_and_refuses_to_leave_none():
    corpus = cut(("a", "b"), ("a", "bcdef"), max_length=4, on_long="drop")
    assert [segment.meta["id"] for segment in corpus.segments] == ["d0"]
    assert corpus.long == ["d1"]
    with pytest.raises(ConfigError, match="no document is left"):
        cut(("a", "bcdef"), max_length=4, on_long="drop")


def test_lossy_documents_are_named():
    assert cut(("a", "b~"), ("a", "b")).lossy == ["d0"]


def test_an_id_beyond_the_head_is_refused_by_document():
    with pytest.raises(ConfigError, match=r"s d1.*below 100.*got: 122"):
        cut(("a", "b"), ("a", "z"), head_width=100)
