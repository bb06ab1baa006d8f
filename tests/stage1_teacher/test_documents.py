import pytest

from data.records import Document
from shared.errors import ConfigError
from shared.tokenizer import Ends
from stage1_teacher import documents as module
from stage1_teacher.documents import Limits, cut_documents


class Letters:
    """A tokenizer of one token per letter, `ids` a=1 …; enough of the interface for `shared.tokenizer` stand-ins."""


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    from shared.tokenizer import Encoded

    def encode(prompt, completion):
        ids = [0, *(ord(c) for c in prompt + completion), 0]
        return Encoded(
            ids=ids,
            is_target=[i > len(prompt) for i in range(len(ids))],
            target_bytes=len(completion.encode()),
            lossless="~" not in prompt + completion,
        )

    monkeypatch.setattr(module, "encode_documents", lambda tokenizer, parts, _: [encode(*part) for part in parts])
    monkeypatch.setattr("shared.tokenizer.decode", lambda tokenizer, ids: "".join(chr(i) for i in ids if i))


def cut(*texts, max_length=None, on_long="split", head_width=200):
    documents = [Document(id=f"d{i}", source="s", prompt=p, completion=c) for i, (p, c) in enumerate(texts)]
    limits = Limits(max_length=max_length, on_long=on_long, head_width=head_width)
    return cut_documents([(document, document.digest) for document in documents], Letters(), limits)


def spelled(segment):
    """The targets' text."""
    return "".join(chr(i) for i, learnt in zip(segment.ids, segment.is_target, strict=True) if i and learnt)


def test_a_document_that_fits_is_one_segment():
    (document,) = cut(("ab", "cde"), max_length=7)
    (segment,) = document.segments
    assert segment.ids.tolist() == [0, *b"abcde", 0]
    assert segment.is_target.tolist() == [False] * 3 + [True] * 4
    assert segment.meta["target_bytes"] == 3
    assert (segment.meta["id"], segment.meta["origin"], "part" in segment.meta) == ("d0", "corpus", False)
    assert (document.is_long, document.is_lossy, document.lacks_targets) == (False, False, False)


def test_a_document_that_was_cut_off_is_not_closed(monkeypatch):
    monkeypatch.setattr(module, "document_ends", lambda tokenizer: Ends(("<",), (">",)))
    document = Document(id="d", source="s", prompt="ab", completion="cde", is_cut=True)
    limits = Limits(max_length=None, on_long="split", head_width=200)
    (segment,) = cut_documents([(document, document.digest)], Letters(), limits)[0].segments
    assert segment.ids.tolist() == [0, *b"abcde"]
    assert segment.is_target.tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("max_length", [2, 3, 4, 5, 6, 11])
def test_split_parts_predict_every_target_once(max_length):
    (document,) = cut(("ab", "cdefghij"), max_length=max_length)
    segments = document.segments
    assert document.is_long
    assert all(2 <= len(segment.ids) <= max_length for segment in segments)
    rebuilt = segments[0].ids.tolist() + [i for segment in segments[1:] for i in segment.ids[1:]]
    assert rebuilt == [0, *b"abcdefghij", 0]
    assert "".join(spelled(segment) for segment in segments) == "cdefghij"
    assert sum(segment.meta["target_bytes"] for segment in segments) == 8
    assert [segment.meta["part"] for segment in segments] == list(range(len(segments)))


def test_truncate_keeps_the_first_part_and_its_bytes():
    (segment,) = cut(("ab", "cdefghij"), max_length=6, on_long="truncate")[0].segments
    assert segment.ids.tolist() == [0, *b"abcde"]
    assert segment.meta["target_bytes"] == 3
    (segment,) = cut(("ab", "cdefghij"), max_length=2, on_long="truncate")[0].segments
    assert (any(segment.is_target), segment.meta["target_bytes"]) == (False, 0)  # the prompt alone fills it: no target


def test_documents_that_truncation_leaves_without_a_target_are_counted():
    """One has its completion beyond the limit, one has a token of it within, one never had any and one fits."""
    texts = (("y" * 8, "zz"), ("yyy", "zz"), ("y" * 9, ""), ("y", "z"))
    documents = cut(*texts, max_length=6, on_long="truncate")
    assert [document.lacks_targets for document in documents] == [True, False, True, False]
    assert [int(segment.is_target.sum()) for document in documents for segment in document.segments] == [0, 2, 0, 2]
    assert [document.lacks_targets for document in cut(*texts, max_length=6)] == [False] * 4


def test_drop_leaves_the_others():
    kept, dropped = cut(("a", "b"), ("a", "bcdef"), max_length=4, on_long="drop")
    assert [segment.meta["id"] for segment in kept.segments] == ["d0"]
    assert (dropped.segments, dropped.is_long) == ([], True)


def test_lossy_documents_are_marked():
    assert [document.is_lossy for document in cut(("a", "b~"), ("a", "b"))] == [True, False]


def test_an_id_beyond_the_head_is_refused_by_document():
    with pytest.raises(ConfigError, match=r"s d1.*below 100.*got: 122"):
        cut(("a", "b"), ("a", "z"), head_width=100)
