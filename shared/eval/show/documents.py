"""Documents of a cache, token by token: what stands there, and what the teacher expected."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.cache.format import Array
from shared.cache.reader import Cache
from shared.cache.shard import Targets
from shared.errors import ConfigError
from shared.eval.show.text import Piece, label, spell
from shared.tokenizer import Tokenizer

MASS = 0.95  # the entries shown of a row cover this probability,
MAX_ENTRIES = 20  # or are these many
MAX_DOCUMENT_TOKENS = 4_000
MAX_TOKENS = 20_000  # of all documents together
DEFAULT_DOCUMENTS = 12
LEVELS = 8
LEAST_KL = 0.04


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentRow:
    """What a student expected where the teacher's row is; probabilities at T = 1 over all ids."""

    p: float  # of the token that stands there
    rank: int  # 1 is the most likely
    tail: float  # of all ids outside the teacher's row
    kl_nats: float  # KL(teacher‖student) over the teacher's K+1 partition
    entries: Mapping[int, float]  # by id, the most likely ids of either model until 95 %


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What the teacher expected at a token; probabilities at T = 1.

    `entries` are the most likely ids in order until 95 %, at most 20, with teacher's and student's probability; then
    those that only the student finds likely, whose teacher's probability is None outside the row. Without a student,
    its probabilities are None.
    """

    p: float  # of the token that stands there; where it is outside the row, the most that it can be
    rank: int | None  # of that token, 1 is the most likely; None outside the row
    entries: Sequence[tuple[int, float | None, float | None]]
    k: int  # entries of the whole row
    num_more: int  # of them that are not among `entries`
    more: float  # their mass
    tail: float  # of all ids outside the row
    entropy_nats: tuple[float, float]  # bounds; the tail's own entropy is not in the cache
    student: StudentRow | None = None

    @property
    def surprise_nats(self) -> float:
        """−log p of the token; at least so much where it is outside the row."""
        return -math.log(max(self.p, 1e-45))

    @property
    def level(self) -> int:
        """Surprise in halvings of p, from 0 (above 1/2) to 8 (1/256 or less)."""
        return min(int(self.surprise_nats / math.log(2)), LEVELS)

    @property
    def kl_level(self) -> int:
        """KL in doublings, from 0 (below 0.04 nats) to 8 (5.12 or more)."""
        kl = self.student.kl_nats if self.student else 0.0
        return 0 if kl < LEAST_KL else min(1 + int(math.log2(kl / LEAST_KL)), LEVELS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """A token of a document; `label` is it on a line of its own, `row` is None where nothing predicts it."""

    position: int
    id: int
    label: str
    piece: Piece
    is_target: bool
    row: Row | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A document as it is shown."""

    number: int  # its place in the cache, from 0
    meta: Mapping[str, Any]
    num_tokens: int  # of the whole document; `tokens` may be fewer
    tokens: Sequence[Token]

    @property
    def judged(self) -> list[tuple[Token, Row]]:
        """The training targets that are shown; all tokens that have a row where there is no target."""
        pairs = [(token, token.row) for token in self.tokens if token.row]
        return [pair for pair in pairs if pair[0].is_target] or pairs

    @property
    def mean_surprise_nats(self) -> float:
        """Over `judged`; at least so much where a token is outside its row."""
        return _mean([row.surprise_nats for _, row in self.judged])

    @property
    def mean_kl_nats(self) -> float | None:
        """Over `judged`; None without a student."""
        kls = [row.student.kl_nats for _, row in self.judged if row.student]
        return _mean(kls) if kls else None

    def striking(self, count: int) -> list[tuple[Token, Row]]:
        """Of `judged` those of the largest KL, or of the greatest surprise where there is no student, in this order."""

        def strikes(pair: tuple[Token, Row]) -> float:
            return -(pair[1].student.kl_nats if pair[1].student else pair[1].surprise_nats)

        return sorted(self.judged, key=strikes)[:count]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def choose_documents(cache: Cache, names: Sequence[str], limit: int) -> list[int]:
    """The numbers of the documents that are asked for, by number or id; without names the first ones.

    An id of several documents, such as the parts of a long one, stands for all of them.

    Raises:
        ConfigError: there is no such document.
    """
    if not names:
        return list(range(min(limit, cache.num_documents)))
    wanted = {name for name in names if not (name.isascii() and name.isdigit())}
    by_id: dict[str, list[int]] = {}
    for shard in range(cache.num_shards) if wanted else ():
        for number, meta in enumerate(cache.document_meta(shard), start=cache.shard_indptr[shard]):
            if (id := str(meta.get("id"))) in wanted:
                by_id.setdefault(id, []).append(number)
    chosen: list[int] = []
    for name in names:
        numbers = by_id.get(name, []) if name in wanted else [int(name)]
        if not numbers or numbers[0] >= cache.num_documents:
            raise ConfigError(
                "the cache has no such document",
                where=f"--document {name}",
                expected=f"an id, such as {cache.meta(0).get('id')}, or a number from 0 to {cache.num_documents - 1:,}",
            )
        chosen += numbers
    return list(dict.fromkeys(chosen))


def within_bounds(cache: Cache, numbers: Sequence[int]) -> dict[int, int]:
    """How many tokens of each document are shown; documents for which there is no room are left out."""
    left, shown = MAX_TOKENS, {}
    for number in numbers:
        count = min(int(cache.doc_lengths[number]), MAX_DOCUMENT_TOKENS, left)
        if count:
            shown[number] = count
            left -= count
    return shown


def show_document(
    cache: Cache, tokenizer: Tokenizer, number: int, num_tokens: int, student: Sequence[StudentRow] | None = None
) -> Document:
    """Read a document's first tokens; `student` are its rows, one for each token but the first."""
    ids = cache.tokens(number)[:num_tokens]
    targets = cache.targets(number, 1.0, 0, len(ids) - 1)
    is_target = cache.loss_mask(number)[: len(ids) - 1].tolist()
    rows = [
        _row(targets, at, int(gold), cache.tokenizer_size, student[at] if student else None)
        for at, gold in enumerate(ids[1:])
    ]
    labels = {id: label(tokenizer, id) for id in set(ids.tolist())}
    tokens = [
        Token(
            position=at,
            id=id,
            label=labels[id],
            piece=piece,
            is_target=at > 0 and is_target[at - 1],
            row=rows[at - 1] if at else None,
        )
        for at, (id, piece) in enumerate(zip(ids.tolist(), spell(tokenizer, ids.tolist()), strict=True))
    ]
    return Document(number=number, meta=cache.meta(number), num_tokens=int(cache.doc_lengths[number]), tokens=tokens)


def _row(targets: Targets, at: int, gold: int, tokenizer_size: int, student: StudentRow | None) -> Row:
    k, log_tail = int(targets.k[at]), float(targets.log_tail[at])
    ids, logp_K = targets.ids[at, :k].tolist(), targets.logp[at, :k].astype(np.float64)
    p_K, tail = np.exp(logp_K), math.exp(log_tail)
    in_row = dict(zip(ids, p_K.tolist(), strict=True))
    beside = student.entries if student else {}
    shown = dict.fromkeys([*ids[: num_entries(p_K)], *beside])
    entropy = -float(p_K @ logp_K) - (tail * log_tail if tail else 0.0)
    rest = [p for id, p in in_row.items() if id not in shown]
    return Row(
        p=in_row.get(gold, min(tail, float(p_K[-1]))),
        rank=ids.index(gold) + 1 if gold in in_row else None,
        entries=[(id, in_row.get(id), beside.get(id)) for id in shown],
        k=k,
        num_more=len(rest),
        more=math.fsum(rest),
        tail=tail,
        entropy_nats=(entropy, entropy + tail * math.log(max(tokenizer_size - k, 1))),
        student=student,
    )


def num_entries(p_K: Array) -> int:
    """How many of the probabilities, in descending order, reach 95 % together; at most 20."""
    return min(int(np.searchsorted(np.cumsum(p_K), MASS)) + 1, len(p_K), MAX_ENTRIES)
