"""Documents of a cache as one static page that asks nothing of any server, and as a few lines for a terminal."""

import base64
import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shared.cache.reader import Cache
from shared.eval.show.documents import (
    DEFAULT_DOCUMENTS,
    LEAST_KL,
    Document,
    Row,
    Token,
    choose_documents,
    show_document,
    within_bounds,
)
from shared.eval.show.text import label, runs, visible
from shared.eval.templates import environment
from shared.tokenizer import Tokenizer, load_tokenizer

STRIKING = 5  # tokens that a document names first
TERMINAL_TOKENS = 10
NAME_CHARACTERS = 120


@dataclass(frozen=True)
class Look:
    """What is shown of a cache."""

    cache: Cache
    tokenizer: Tokenizer
    documents: Sequence[Document]  # of the greatest KL first where there is a student, else as they were asked for
    student: Path | None
    left_out: Sequence[int]  # numbers of documents for which there was no room

    @cached_property
    def left_out_text(self) -> str:
        """Which documents and tokens are not shown; empty where all are."""
        cut = sum(document.num_tokens - len(document.tokens) for document in self.documents)
        parts = [f"{cut:,} tokens at the ends of long documents"] if cut else []
        if self.left_out:
            names = ", ".join(map(str, self.left_out[:20])) + (", …" if len(self.left_out) > 20 else "")
            parts.append(f"{len(self.left_out):,} of the documents asked for (number {names})")
        return "Left out: " + " and ".join(parts) + "." if parts else ""

    def name(self, document: Document) -> str:
        """A document's id, safe and short."""
        return visible(str(document.meta.get("id", document.number)), NAME_CHARACTERS)


def look_into(
    path: Path, names: Sequence[str] = (), student: Path | None = None, *, limit: int = DEFAULT_DOCUMENTS
) -> Look:
    """Read documents of a cache by id or number, or its first `limit`, and run a student (a run or export) over them.

    Raises:
        ConfigError: no such document.
        CacheFormatError, CacheCorruptError: no finished cache, or a damaged one.
        CacheMismatchError: the student has another tokenizer.
    """
    cache = Cache(path)
    tokenizer = load_tokenizer(cache.tokenizer_path)
    numbers = choose_documents(cache, names, limit)
    shown, rows = within_bounds(cache, numbers), {}
    if student:
        from shared.eval.show.student import student_rows

        rows = student_rows(student, cache, shown)
    documents = [show_document(cache, tokenizer, number, count, rows.get(number)) for number, count in shown.items()]
    documents.sort(key=lambda document: -(document.mean_kl_nats or 0.0))
    return Look(cache, tokenizer, documents, student, [number for number in numbers if number not in shown])


# --- the page --------------------------------------------------------------------------------------------------------


def render_page(look: Look) -> bytes:
    """The page: text, colours and figures as HTML, and each token's row as JSON that its script lays out."""
    templates = environment("shared.eval.show")
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    templates.filters |= {"runs": runs, "visible": visible}
    script = Path(__file__).with_name("templates").joinpath("show.js").read_text(encoding="utf-8")
    page = templates.get_template("show.html.j2").render(
        look=look,
        data=_data(look),
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        striking=STRIKING,
        teacher=visible(str(look.cache.manifest.identity["teacher"]["name"]), NAME_CHARACTERS),
        least_kl=LEAST_KL,
        title=visible(look.cache.path.resolve().name, NAME_CHARACTERS),
        student=look.student and visible(look.student.resolve().name, NAME_CHARACTERS),
    )
    return page.encode(errors="backslashreplace")


def _data(look: Look) -> dict[str, Any]:
    """Labels of ids, and of each document's tokens what the script shows."""
    places: defaultdict[int, int] = defaultdict(lambda: len(places))
    documents = [[_token(token, places) for token in document.tokens] for document in look.documents]
    return {"labels": [label(look.tokenizer, id) for id in places], "documents": documents}


def _token(token: Token, places: Mapping[int, int]) -> dict[str, Any]:
    """One token as JSON values with short names; probabilities to four digits."""
    shown: dict[str, Any] = {"i": token.id, "l": places[token.id], "t": int(token.is_target)}
    if token.piece.parts > 1:
        shown |= {"s": [token.piece.place, token.piece.parts]}
    if token.piece.raw:
        shown["b"] = token.piece.raw
    if row := token.row:
        shown |= {"p": _digits(row.p), "r": row.rank, "k": row.k, "m": [row.num_more, _digits(row.more)]}
        shown |= {"o": _digits(row.tail), "h": [_digits(bound) for bound in row.entropy_nats]}
        shown["e"] = [[places[id], _digits(p), *([_digits(q)] if row.student else [])] for id, p, q in row.entries]
        if row.student:
            student = row.student
            shown["q"] = [_digits(student.p), student.rank, _digits(student.tail), _digits(student.kl_nats)]
    return shown


def _digits(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def percent(p: float) -> str:
    """A probability for people: `12.3 %`, or `2.1e-05` where it is small."""
    return f"{100 * p:.1f} %" if p >= 0.0005 else f"{p:.1e}"


# --- the terminal ----------------------------------------------------------------------------------------------------


def terminal_text(look: Look) -> str:
    """The figures of each document, and its ten most surprising tokens (with a student: those of the largest KL)."""
    lines = []
    for document in look.documents:
        figures = f"surprise {document.mean_surprise_nats:.3f} nats per target"
        if document.mean_kl_nats is not None:
            figures += f", KL {document.mean_kl_nats:.4f} nats"
        lines += [f"document {document.number}  {look.name(document)}", f"  {document.num_tokens:,} tokens, {figures}"]
        lines += [_terminal_row(look, document, token, row) for token, row in document.striking(TERMINAL_TOKENS)]
        lines.append("")
    return "\n".join([*lines, look.left_out_text]).rstrip()


def _terminal_row(look: Look, document: Document, token: Token, row: Row) -> str:
    before = visible("".join(t.piece.text for t in document.tokens[max(token.position - 8, 0) : token.position]))[-24:]
    place = f"rank {row.rank}, {percent(row.p)}" if row.rank else f"outside the row, at most {percent(row.p)}"
    expected = ", ".join(f"{label(look.tokenizer, id, 16)} {percent(p)}" for id, p, _ in row.entries[:3] if p)
    kl = f"  KL {row.student.kl_nats:.3f}" if row.student else ""
    return (
        f"  {token.position:>6}  {before}[{token.label}]  {row.surprise_nats:.2f} nats, {place}{kl}; "
        f"expected {expected}; tail {percent(row.tail)}"
    )
