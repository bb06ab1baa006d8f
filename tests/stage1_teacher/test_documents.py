import pytest

from data.records import Document
from shared.errors import ConfigError
from stage1_teacher import documents as pieces
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

    monkeypatch.setattr(pieces, "encode_document", encode)
    monkeypatch.setattr("shared.tokenizer.decode", lambda tokenizer, ids: "".join(chr(i) for i in ids if i))


def cut(*texts, max_length=None, on_long="split", head_width=200):
    documents = [Document(id=f"d{i}", source="s", prompt=p, completion=c) for i, (p, c) in enumerate(texts)]
    return cut_documents(documents, Letters(), max_length=max_length, on_long=on_long, head_width=head_width)


def spelled(piece):
    """The targets' text."""
    return "".join(chr(i) for i, learnt in zip(piece.ids, piece.is_target, strict=True) if i and learnt)


def test_a_document_that_fits_is_one_piece():
    corpus = cut(("ab", "cde"), max_length=7)
    (piece,) = corpus.pieces
    assert piece.ids == [0, *b"abcde", 0]
    assert piece.is_target == [False] * 3 + [True] * 4
    assert piece.meta["target_bytes"] == 3
    assert (piece.meta["id"], piece.meta["origin"], "part" in piece.meta) == ("d0", "corpus", False)
    assert (corpus.long, corpus.lossy) == ([], [])


@pytest.mark.parametrize("max_length", [2, 3, 4, 5, 6, 11])
def test_split_parts_predict_every_target_once(max_length):
    corpus = cut(("ab", "cdefghij"), max_length=max_length)
    assert corpus.long == ["d0"]
    assert all(2 <= len(piece.ids) <= max_length for piece in corpus.pieces)
    rebuilt = corpus.pieces[0].ids + [i for piece in corpus.pieces[1:] for i in piece.ids[1:]]
    assert rebuilt == [0, *b"abcdefghij", 0]
    assert "".join(spelled(piece) for piece in corpus.pieces) == "cdefghij"
    assert sum(piece.meta["target_bytes"] for piece in corpus.pieces) == 8
    assert [piece.meta["part"] for piece in corpus.pieces] == list(range(len(corpus.pieces)))


def test_truncate_keeps_the_first_part_and_its_bytes():
    (piece,) = cut(("ab", "cdefghij"), max_length=6, on_long="truncate").pieces
    assert piece.ids == [0, *b"abcde"]
    assert piece.meta["target_bytes"] == 3
    (piece,) = cut(("ab", "cdefghij"), max_length=2, on_long="truncate").pieces
    assert (any(piece.is_target), piece.meta["target_bytes"]) == (False, 0)  # the prompt alone fills it: no target


def test_drop_leaves_the_others_and_refuses_to_leave_none():
    corpus = cut(("a", "b"), ("a", "bcdef"), max_length=4, on_long="drop")
    assert [piece.meta["id"] for piece in corpus.pieces] == ["d0"]
    assert corpus.long == ["d1"]
    with pytest.raises(ConfigError, match="no document is left"):
        cut(("a", "bcdef"), max_length=4, on_long="drop")


def test_lossy_documents_are_named():
    assert cut(("a", "b~"), ("a", "b")).lossy == ["d0"]


def test_an_id_beyond_the_head_is_refused_by_document():
    with pytest.raises(ConfigError, match=r"s d1.*below 100.*got: 122"):
        cut(("a", "b"), ("a", "z"), head_width=100)
