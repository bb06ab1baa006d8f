"""`codedistill cache show`: figures against dense float64 rows, the text as it is, and what hostile text may do."""

import dataclasses
import html
import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from shared.checkpoints import load_model
from shared.cli import codedistill
from shared.errors import CacheMismatchError, ConfigError
from shared.eval.show import documents as shown_documents
from shared.eval.show.page import look_into, render_page, terminal_text
from shared.eval.show.text import spell, visible
from shared.tokenizer import encode_text, load_tokenizer
from tests.support.eval_models import save_model
from tests.support.text_cache import make_text_cache, save_student

CODE = "def f(x):\n\treturn x  # ü…\r\n"
HOSTILE = "</script><script>alert(1)</script><b onclick='x'>\"&\x00\x1b[31m\u202eabc\u2066\ufeff{{ 7*7 }}<!--"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    cache, logits = make_text_cache(folder / "cache", [CODE, "print(1)\n", HOSTILE], ids=["code", "7", "</script>"])
    return cache, logits, save_student(folder / "student")


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def log_softmax(logits):
    z = logits.astype(np.float64)
    return z - z.max(1, keepdims=True) - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))


def test_rank_probability_entries_and_tail_are_those_of_the_dense_row(made):
    cache, logits, _ = made
    document = look_into(cache.path, ["0"]).documents[0]
    assert [token.row is None for token in document.tokens] == [True] + [False] * (len(document.tokens) - 1)
    logp = log_softmax(logits)
    for token in document.tokens[1:]:
        row, dense = token.row, logp[token.position - 1]
        order = np.argsort(-dense, kind="stable")
        p = np.exp(dense[order[:6]])
        count = min(int((np.cumsum(p) < 0.95).sum()) + 1, 6)
        assert [id for id, _, _ in row.entries] == order[:count].tolist()
        np.testing.assert_allclose([p for _, p, _ in row.entries], p[:count], rtol=0.02)  # the tail's step: 1/16 nat
        np.testing.assert_allclose(row.tail, 1 - p.sum(), rtol=0.035)
        np.testing.assert_allclose(row.more, p[count:].sum(), rtol=0.02)
        low, high = row.entropy_nats
        assert low - 0.02 <= -(np.exp(dense) @ dense) <= high + 0.02
        rank = int(np.flatnonzero(order == token.id)[0]) + 1
        if rank <= 6:
            assert row.rank == rank
            np.testing.assert_allclose(row.surprise_nats, -dense[token.id], atol=0.02)
        else:  # outside the row: a bound
            assert row.rank is None
            assert row.surprise_nats <= -dense[token.id] + 0.02
            assert row.p == pytest.approx(min(row.tail, np.exp(cache.targets(0, 1.0).logp[token.position - 1, 5])))


def test_the_colour_halves_the_probability_and_is_clipped():
    row = shown_documents.Row(p=1, rank=1, entries=[], k=1, num_more=0, more=0, tail=0, entropy_nats=(0, 0))
    for p, level in [(1, 0), (0.51, 0), (0.49, 1), (0.24, 2), (1 / 255, 7), (1 / 257, 8), (1e-30, 8), (0, 8)]:
        assert dataclasses.replace(row, p=p).level == level
    student = shown_documents.StudentRow(p=1, rank=1, tail=0, kl_nats=0, entries={})
    for kl, level in [(0, 0), (0.039, 0), (0.041, 1), (0.081, 2), (5.1, 7), (5.2, 8), (1e9, 8)]:
        assert dataclasses.replace(row, student=dataclasses.replace(student, kl_nats=kl)).kl_level == level


def test_a_split_character_is_joined_and_its_bytes_are_named(made):
    cache, _, _ = made
    tokenizer = load_tokenizer(cache.tokenizer_path)
    pieces = spell(tokenizer, [0, *encode_text(tokenizer, "aü…b"), 0])
    assert [(piece.text, piece.place, piece.parts, piece.raw) for piece in pieces] == [
        ("<|endoftext|>", 1, 1, ""),
        ("a", 1, 1, ""),
        ("ü", 1, 2, "C3"),
        ("", 2, 2, "BC"),
        ("…", 1, 3, "E2"),
        ("", 2, 3, "80"),
        ("", 3, 3, "A6"),
        ("b", 1, 1, ""),
        ("<|endoftext|>", 1, 1, ""),
    ]
    broken = spell(tokenizer, encode_text(tokenizer, "ü")[:1] * 3)
    assert [(piece.text, piece.parts, piece.raw) for piece in broken] == [("\ufffd", 1, "C3")] * 3


def test_the_pieces_of_any_text_are_the_text(made):
    cache, _, _ = made
    tokenizer = load_tokenizer(cache.tokenizer_path)
    for text in (CODE, HOSTILE, "  indented\n\n\ttab \u05d0\u05d1 \U0001f600", ""):
        assert "".join(piece.text for piece in spell(tokenizer, encode_text(tokenizer, text))) == text


def test_what_is_invisible_is_named():
    assert visible("a b\t\n\r\x1b\u202e\u00a0\ud800") == "a␣b→↵<U+000D><U+001B><U+202E><U+00A0><U+D800>"
    assert visible("abc", 2) == "ab…"


def test_hostile_text_stays_text_on_page_and_terminal(made):
    cache, _, _ = made
    look = look_into(cache.path)
    page = render_page(look).decode()
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "alert(1)</" not in page and "49" not in re.findall(r"\{\{.*?\}\}", page)
    assert not set(page) & set("\x00\x1b\u202e\u2066\ufeff\r")
    text = html.unescape(re.sub(r"<[^>]*>", "", page.split('class="text"')[3].split(">", 1)[1].split("</details>")[0]))
    text = re.sub(r"U\+([0-9A-F]{4})", lambda found: chr(int(found[1], 16)), text.strip())
    assert text == f"<|endoftext|>{HOSTILE}<|endoftext|>"
    printed = terminal_text(look)
    assert not {c for c in printed if ord(c) < 32 and c != "\n"} and "\u202e" not in printed


def test_the_page_asks_nothing_of_any_server(made):
    cache, _, student = made
    page = render_page(look_into(cache.path, student=student)).decode()
    assert "default-src 'none'" in page
    assert not re.search(r"""(?:src|href|url|@import)\s*[=(]""", page.split("<body>")[0].replace("-src", ""))
    assert not re.search(r"""<(?:img|link|iframe|script src)""", page)


def test_documents_are_named_by_number_or_id(made):
    cache, _, _ = made

    def names(*names):
        return [d.number for d in look_into(cache.path, names).documents]

    assert names("1", "code", "1") == [1, 0]
    assert names("</script>") == [2]
    for name in ("3", "none"):
        with pytest.raises(ConfigError, match=r"no such document.*number from 0 to 2"):
            names(name)


def test_parts_of_one_document_are_shown_together(tmp_path):
    cache, _ = make_text_cache(tmp_path / "cache", ["a", "b", "c"], ids=["long", "other", "long"])
    assert [d.number for d in look_into(cache.path, ["long"]).documents] == [0, 2]


def test_the_page_is_bounded_and_says_what_it_left_out(tmp_path, monkeypatch):
    cache, _ = make_text_cache(tmp_path / "cache", ["x = 1\n" * 50, "abc", "y" * 40, "z"], k=200, scale=0.01)
    monkeypatch.setattr(shown_documents, "MAX_DOCUMENT_TOKENS", 100)
    monkeypatch.setattr(shown_documents, "MAX_TOKENS", 120)
    look = look_into(cache.path)
    assert [len(document.tokens) for document in look.documents] == [100, 5, 15]
    left_out = "229 tokens at the ends of long documents and 1 of the documents asked for (number 3)"
    assert look.left_out_text == f"Left out: {left_out}."
    page = render_page(look).decode()
    assert look.left_out_text in page and "302 tokens, the first 100 shown" in page
    tokens = [token for document in data_of(page)["documents"] for token in document if "e" in token]
    assert {len(token["e"]) for token in tokens} == {shown_documents.MAX_ENTRIES}
    assert len(page) < 60_000 + 500 * 120


def test_a_token_of_many_characters_is_cut(made):
    cache, _, _ = made
    tokenizer = load_tokenizer(cache.tokenizer_path)
    tokenizer.add_tokens(["w" * 1000])
    assert [(len(p.text), p.num_cut) for p in spell(tokenizer, [len(tokenizer) - 1])] == [(200, 800)]


def test_the_students_rows_and_kl_are_those_of_its_dense_logits(made):
    cache, _, student = made
    model = load_model(student, "float32")[0].double()
    look = look_into(cache.path, student=student)
    kls = [document.mean_kl_nats for document in look.documents]
    assert kls == sorted(kls, reverse=True) and len(kls) == 3
    document = next(document for document in look.documents if document.number == 0)
    ids = torch.tensor([token.id for token in document.tokens])
    with torch.inference_mode():
        logq = model(ids[None], use_cache=False).logits[0].log_softmax(1).numpy()
    targets = cache.targets(0, 1.0)
    for token in document.tokens[1:]:
        at, row, q = token.position - 1, token.row.student, np.exp(logq[token.position - 1])
        np.testing.assert_allclose(row.p, q[token.id], rtol=1e-3)
        assert row.rank == (q > q[token.id]).sum() + 1
        head = targets.ids[at, : targets.k[at]]
        tail = 1 - q[head].sum()
        np.testing.assert_allclose(row.tail, tail, rtol=1e-3, atol=1e-6)
        p, p_tail = np.exp(targets.logp[at]), np.exp(targets.log_tail[at])
        expected = (p * (targets.logp[at] - np.log(q[head]))).sum() + p_tail * (targets.log_tail[at] - np.log(tail))
        np.testing.assert_allclose(row.kl_nats, expected, rtol=2e-3, atol=1e-5)
        for id, value in row.entries.items():
            np.testing.assert_allclose(value, q[id], rtol=1e-3, atol=1e-7)
        assert np.argmax(q) in row.entries and token.row.entries[0][0] in row.entries
        shown = {id: beside for id, _, beside in token.row.entries}
        assert shown == dict(row.entries)


def test_a_document_beyond_the_students_positions_is_scored_in_pieces(made, tmp_path):
    cache, _, student = made
    short = save_student(tmp_path / "short", positions=8)
    row = look_into(cache.path, ["0"], short).documents[0].tokens[12].row.student
    again = look_into(cache.path, ["0"], student).documents[0].tokens[5].row.student
    ours = load_model(short, "float32")[0]
    ids = torch.tensor(cache.tokens(0)[8:16])
    with torch.inference_mode():
        q = ours(ids[None], use_cache=False).logits[0, 3].softmax(0)
    np.testing.assert_allclose(row.p, float(q[int(cache.tokens(0)[12])]), rtol=1e-3)
    assert again.p == pytest.approx(look_into(cache.path, ["0"], short).documents[0].tokens[5].row.student.p, rel=1e-3)


def test_a_student_of_another_tokenizer_is_refused(made, tmp_path):
    with pytest.raises(CacheMismatchError, match="tokenizer is not the cache's"):
        look_into(made[0].path, student=save_model(tmp_path / "other"))


def test_the_command_prints_lines_or_writes_a_page(made, tmp_path):
    cache, _, _ = made

    def run(*more):
        return CliRunner().invoke(codedistill, ["cache", "show", str(cache.path), *more], catch_exceptions=False)

    done = run("--document", "code")
    assert done.exit_code == 0
    first, figures, *rows = done.output.splitlines()
    assert first == "document 0  code"
    assert re.fullmatch(r"  32 tokens, surprise \d+\.\d{3} nats per target", figures)
    assert len(rows) == 10 and all("expected" in row and "tail" in row for row in rows)
    surprises = [float(re.search(r"([\d.]+) nats", row)[1]) for row in rows]
    assert surprises == sorted(surprises, reverse=True)
    page = tmp_path / "new" / "page.html"
    assert run("--html", str(page)).output == f"wrote {page}: 3 documents.\n"
    assert page.read_bytes() == render_page(look_into(cache.path))
