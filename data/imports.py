"""Caches from top-k logprobs recorded elsewhere: by vLLM (`prompt_logprobs`), SGLang (`meta_info`) or DistillKit."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.tabular import Row, read_rows
from shared.cache.documents import MASS_TOLERANCE
from shared.cache.writer import CacheWriter
from shared.errors import CacheFormatError, ConfigError, require
from shared.files import output_path, sha256_file
from shared.process import log
from shared.progress import progress
from shared.tokenizer import load_tokenizer, save_tokenizer, special_ids, tokenizer_digest

MAX_DIGITS = 10  # of a token id
TOKEN_FIELDS = ("prompt_token_ids", "input_ids", "tokens")
SGLANG_TOKENS, SGLANG_ROWS = "input_token_logprobs", "input_top_logprobs"
Rows = list[list[tuple[int, float]]]  # ids and logprobs, the most likely first
PACKED = ("compressed_logprobs", "bytepacked_indices", "packed_indices", "exact_values", "coeffs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """A document of n tokens as it was recorded; row t holds the entries for token t + 1."""

    where: str  # file and line
    id: str
    tokens: list[int]
    loss_mask: list[int]  # n values, 1 where the next token is a target
    rows: Rows  # n − 1
    adds_next: bool  # whether a row may hold the next token on top of the k most likely (see `without_extra`)
    gold_logprobs: list[float]  # n − 1, of the next tokens; NaN where the row does not tell
    gold_ranks: list[int | None]  # n − 1, ids as likely as the next token or more, itself included; None where unknown

    def may_end_in_extra(self, row: int) -> bool:
        """Whether a row holds the next token and nothing less likely, so that it may be there on top of the k."""
        return self.adds_next and self.gold_logprobs[row] == self.rows[row][-1][1]

    def possible_k(self) -> frozenset[int]:
        """The k that its request may have had: each row holds k entries, or k + 1 where the last is the extra one.

        Empty for rows that no one k explains; two where every row may end in an extra entry.
        """
        lengths = {len(row) for row in self.rows}
        plain = {len(row) for at, row in enumerate(self.rows) if not self.may_end_in_extra(at)}
        candidates = lengths | {length - 1 for length in lengths}
        return frozenset(k for k in candidates if lengths <= {k, k + 1} and plain <= {k})

    def without_extra(self, k: int | None) -> Rows:
        """The rows without the next token's entry where it comes on top of the k most likely.

        The number of entries tells. A rank does not: it counts every id that is as likely, so a tie at the k-th place
        lifts it above k. Where k is unknown, the entry stays only if its rank proves that the row holds all ids as
        likely as it.
        """
        rows = []
        for at, row in enumerate(self.rows):
            is_in_place = self.gold_ranks[at] == len(row) if k is None else len(row) == k
            if self.may_end_in_extra(at) and not is_in_place:
                row = [entry for entry in row if entry[0] != self.tokens[at + 1]]
            rows.append(row)
        return rows


def import_cache(
    file: Path,
    out: Path,
    *,
    tokenizer: str,
    teacher_name: str,
    top_k: int | None = None,
    codec: str = "q",
    compression: str = "gzip",
    shard_tokens: int = 32_768,
) -> None:
    """Make a cache with the grid {1} from recorded rows; run again, it resumes.

    Teacher and tokenizer are recorded as declared: nothing proves that they made these rows.

    Args:
        file: `.jsonl` or `.parquet`; the columns are described in shared/cache/FORMAT.md, "Importing".
        tokenizer: directory (or Hub id) of the tokenizer that the ids are of.
        top_k: most entries of a row; by default the longest row's, without vLLM's extra entry for the next token.
        codec, compression, shard_tokens: as for `teacher build`.

    Raises:
        ConfigError: a malformed row, with file, line and field, or rows of the next token's own entry only.
        ResumeError: `out` was begun with other options or from another file.
    """
    out = output_path(out)
    loaded = load_tokenizer(tokenizer)
    size, digest = len(loaded), tokenizer_digest(loaded)
    survey = _survey(file, size)
    kept = top_k or survey.longest
    labels = {"temperatures": [1.0], "top_k": kept, "codec": codec}
    file_digest = sha256_file(file)
    build = {
        "command": "cache import",
        "sources": [{"name": file.name, "digest": file_digest}],
        "teacher": teacher_name,
        "tokenizer_digest": digest,
        "tokenizer_size": size,
        "head_width": size,
        "shard_tokens": shard_tokens,
        "filter": compression,
        **labels,
    }
    identity = {
        "declared": True,
        "teacher": _declared_teacher(teacher_name),
        "tokenizer": {"digest": digest, **special_ids(loaded)},
        "labels": labels,
    }
    source = {"name": file.name, "split": "train", "revision": None, "license": None, "digest": file_digest}
    with CacheWriter(out, build) as writer:
        if writer.finished:
            return
        num_rows = num_extra = num_cut = 0
        with progress("importing", survey.num_documents, "documents") as bar:
            for document in read_recorded(file, size):
                rows = survey.without_extra(document)
                num_rows += len(rows)
                num_extra += sum(len(before) - len(row) for before, row in zip(document.rows, rows, strict=True))
                num_cut += sum(max(len(row) - kept, 0) for row in rows)
                _add(writer, document, [row[:kept] for row in rows], file.name)
                bar.advance(1)
        if num_extra:
            log(f"{file.name}: {num_extra:,} of {num_rows:,} rows held the next token on top of the most likely ids; "
                "that entry is left out, and counts as the teacher's likelihood")  # fmt: skip
        if num_cut:
            log(f"{file.name}: {num_cut:,} entries beyond --top-k {kept} are left out")
        save_tokenizer(loaded, out / "tokenizer")
        writer.finish(identity, [source | {"num_documents": survey.num_documents}])


def _declared_teacher(name: str) -> dict[str, str | None]:
    declared = f"declared: {name}"
    return {"name": name, "commit": None, "license": None, "weights_digest": declared, "config_digest": declared}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Survey:
    """What a file holds."""

    num_documents: int
    certain: frozenset[int]  # every k that some document's rows prove (see `Recorded.possible_k`)
    longest: int  # entries of the longest row, without the extra one

    def without_extra(self, document: Recorded) -> Rows:
        """A document's rows; its own entries tell k, and where they leave two, the file's other documents.

        Raises:
            ConfigError: nothing is left of a row.
        """
        rows = document.without_extra(_only(document.possible_k(), self.certain))
        if [] in rows:
            where = f"{document.where}, field 'prompt_logprobs[{rows.index([]) + 1}]'"
            raise ConfigError("a row holds the next token's own entry only", where=where,
                              expected="the most likely ids beside it",
                              fix="record with prompt_logprobs=K, K of at least 1")  # fmt: skip
        return rows


def _survey(file: Path, tokenizer_size: int) -> _Survey:
    num_documents, certain, seen = 0, frozenset[int](), set()
    for document in read_recorded(file, tokenizer_size):
        num_documents += 1
        possible = document.possible_k()
        if len(possible) == 1:
            certain |= possible
        else:
            seen.add((possible, max(map(len, document.without_extra(None)), default=0)))
    require(num_documents, "an empty data set", where=file, expected="at least one row")
    unproven = {length if (k := _only(possible, certain)) is None else k for possible, length in seen}
    return _Survey(num_documents=num_documents, certain=certain, longest=max({1} | certain | unproven))


def _only(possible: frozenset[int], certain: frozenset[int]) -> int | None:
    """The one k that a document's rows leave, or the file's other documents do; None where more than one is left."""
    left = possible if len(possible) == 1 else possible & certain
    return next(iter(left)) if len(left) == 1 else None


def read_recorded(file: Path, tokenizer_size: int) -> Iterator[Recorded]:
    """Read recorded documents one by one.

    Raises:
        ConfigError: the file cannot be read, or a row is malformed (file, line and field).
    """
    for number, row in enumerate(read_rows(file), start=1):
        if packed := [name for name in PACKED if name in row.fields]:
            raise row.error(
                packed[0],
                expected="uncompressed rows: input_ids, token_ids and top_values",
                got="DistillKit's packed columns, whose layout is in a configuration beside the file",
            )
        id = row.fields.get("id")
        adds_next, ranks, first = "prompt_logprobs" in row.fields, None, 1
        if "meta_info" in row.fields or SGLANG_ROWS in row.fields:
            source = SGLANG_ROWS
            tokens, rows, gold = _sglang(row, tokenizer_size)
        else:
            field = next((name for name in TOKEN_FIELDS if name in row.fields), TOKEN_FIELDS[0])
            tokens = _integers(row, field, row.fields.get(field), tokenizer_size)
            if not tokens:
                raise row.error(field, expected="at least one token id", got="none")
            if adds_next:
                source = "prompt_logprobs"
                rows, gold, ranks = _vllm(row, tokens, tokenizer_size)
            else:
                source, first = "top_values", 0
                rows = _lists(row, tokens, tokenizer_size)
                gold = [math.nan] * len(rows)
        for at, entries in enumerate(rows, start=first):
            mass = math.fsum(math.exp(logprob) for _, logprob in entries)
            if mass > 1 + MASS_TOLERANCE:
                expected = "probabilities that add up to 1 at most"
                raise row.error(f"{source}[{at}]", expected=expected, got=f"{mass:.4f}")
        yield Recorded(
            where=row.where,
            id=str(number if id is None else id),
            tokens=tokens,
            loss_mask=_loss_mask(row, len(tokens)),
            rows=rows,
            adds_next=adds_next,
            gold_logprobs=gold,
            gold_ranks=ranks or [None] * len(rows),
        )


def _add(writer: CacheWriter, document: Recorded, rows: Rows, name: str) -> None:
    try:
        writer.add_document(
            document.tokens,
            [[id for id, _ in row] for row in rows],
            [[logprob for _, logprob in row] for row in rows],
            loss_mask=document.loss_mask,
            gold_logprobs=document.gold_logprobs,
            meta={"id": document.id, "source": name},
        )
    except CacheFormatError as error:
        where = f"{document.where}, {error.where}"
        raise ConfigError(error.what, where=where, expected=error.expected, got=error.got) from error


def _vllm(row: Row, tokens: list[int], size: int) -> tuple[Rows, list[float], list[int | None]]:
    """vLLM's `prompt_logprobs`: null first, then for each token {id: {"logprob", "rank", …}} of what could stand there.

    The token that does stand there is always among them, with its rank, also where that is beyond the top-k. Returns
    the rows, and of the next tokens the log-probabilities and the ranks.
    """
    field = "prompt_logprobs"
    expected = f"a list of {len(tokens)} positions, one for each token"
    positions = _listed(row, field, row.fields[field], expected, len(tokens))
    if positions[0] is not None:
        raise row.error(f"{field}[0]", expected="null: nothing predicts the first token", got="entries")
    rows, gold, ranks = Rows(), list[float](), list[int | None]()
    for at, entries in enumerate(positions[1:], start=1):
        place = f"{field}[{at}]"
        if not isinstance(entries, dict) or not entries:
            raise row.error(place, expected="an object of token ids", got=repr(entries)[:60])
        known = []
        for key, value in entries.items():
            if not (key.isascii() and key.isdigit() and len(key) <= MAX_DIGITS and int(key) < size):
                raise row.error(place, expected=f"token ids from 0 to {size - 1} as keys", got=repr(key))
            if not isinstance(value, dict):
                raise row.error(f"{place}.{key}", expected="an object with logprob", got=repr(value)[:60])
            rank = value.get("rank")
            if rank is not None and (type(rank) is not int or rank < 1):
                raise row.error(f"{place}.{key}.rank", expected="an integer from 1, or null", got=repr(rank))
            known.append((rank, int(key), _logprob(row, f"{place}.{key}.logprob", value.get("logprob"))))
        if len({id for _, id, _ in known}) < len(known):
            raise row.error(place, expected="each token id once", got="one of them in two spellings")
        rank, logprob = next(((r, lp) for r, id, lp in known if id == tokens[at]), (None, math.nan))
        gold.append(logprob)
        ranks.append(rank)
        rows.append(_descending((id, lp) for _, id, lp in known))
    return rows, gold, ranks


def _sglang(row: Row, size: int) -> tuple[list[int], Rows, list[float]]:
    """SGLang's answer of `/generate`: for each prompt token [logprob, id, text], and a list of such of the most likely.

    Rows have exactly the k entries asked for. The first token has no logprob and no row. Returns the tokens, the rows,
    and the log-probabilities of the next tokens.
    """
    answer = row.fields.get("meta_info", row.fields)
    given, tops = (answer.get(field) if isinstance(answer, dict) else None for field in (SGLANG_TOKENS, SGLANG_ROWS))
    given = _listed(row, SGLANG_TOKENS, given, "a list of at least one [logprob, id, text]")
    tops = _listed(row, SGLANG_ROWS, tops, f"a list of {len(given)} rows, one for each token", len(given))
    if (count := answer.get("prompt_tokens", len(given))) != len(given):
        expected = f"all {count} tokens of the prompt: a request with logprob_start_len=0"
        raise row.error(SGLANG_TOKENS, expected=expected, got=len(given))
    if tops[0]:
        raise row.error(f"{SGLANG_ROWS}[0]", expected="null: nothing predicts the first token", got="entries")
    tokens = [_pair(row, f"{SGLANG_TOKENS}[{at}]", entry, size)[0] for at, entry in enumerate(given)]
    gold = [_logprob(row, f"{SGLANG_TOKENS}[{at}][0]", entry[0]) for at, entry in enumerate(given[1:], start=1)]
    rows = []
    for at, entries in enumerate(tops[1:], start=1):
        field = f"{SGLANG_ROWS}[{at}]"
        entries = _listed(row, field, entries, "a list of [logprob, id, text]")
        pairs = [_pair(row, f"{field}[{place}]", entry, size) for place, entry in enumerate(entries)]
        logprobs = [_logprob(row, f"{field}[{place}][0]", value) for place, (_, value) in enumerate(pairs)]
        rows.append(_descending(zip([id for id, _ in pairs], logprobs, strict=True)))
    return tokens, rows, gold


def _pair(row: Row, field: str, entry: Any, size: int) -> tuple[int, Any]:
    """Id and logprob of SGLang's [logprob, id, text]."""
    _listed(row, field, entry, "[logprob, id, text]", 2, 3)
    if type(entry[1]) is not int or not 0 <= entry[1] < size:
        raise row.error(f"{field}[1]", expected=f"a token id from 0 to {size - 1}", got=repr(entry[1])[:60])
    return entry[1], entry[0]


def _lists(row: Row, tokens: list[int], size: int) -> Rows:
    """DistillKit's uncompressed rows: `token_ids` and `top_values`, [n or n − 1][k]; row t is for token t + 1."""
    n = len(tokens)
    ids_TK, values_TK = (
        _listed(row, field, row.fields.get(field), f"a list of {n - 1} rows for {n} tokens", n - 1, n)[: n - 1]
        for field in ("token_ids", "top_values")
    )
    rows = []
    for at, (ids, values) in enumerate(zip(ids_TK, values_TK, strict=True)):
        known = _integers(row, f"token_ids[{at}]", ids, size)
        if not known:
            raise row.error(f"token_ids[{at}]", expected="at least one id", got="none")
        values = _listed(row, f"top_values[{at}]", values, f"as many values as ids, {len(known)}", len(known))
        logprobs = [_logprob(row, f"top_values[{at}]", value) for value in values]
        rows.append(_descending(zip(known, logprobs, strict=True)))
    return rows


def _loss_mask(row: Row, n: int) -> list[int]:
    """What each row learns, from `loss_mask` (1 for each token to be learnt) or `prompt_tokens`; else all of it."""
    if "loss_mask" in row.fields:
        learnt = row.fields["loss_mask"]
        if not isinstance(learnt, list) or len(learnt) != n or any(value not in (0, 1) for value in learnt):
            raise row.error("loss_mask", expected=f"{n} values, each 0 or 1", got=repr(learnt)[:60])
    elif "prompt_tokens" in row.fields:
        length = row.integer("prompt_tokens")
        if not 0 <= length <= n:
            raise row.error("prompt_tokens", expected=f"0 to {n}", got=length)
        learnt = [int(at >= length) for at in range(n)]
    else:
        learnt = [1] * n
    return [*map(int, learnt[1:]), 0]


def _listed(row: Row, field: str, value: Any, expected: str, *lengths: int) -> list[Any]:
    """The value if it is a list of one of these lengths; without any named, one that holds something."""
    if not isinstance(value, list) or not (len(value) in lengths if lengths else value):
        got = len(value) if isinstance(value, list) and lengths else repr(value)[:60]
        raise row.error(field, expected=expected, got=got)
    return value


def _descending(entries: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """The most likely first, equals by id."""
    return sorted(entries, key=lambda entry: (-entry[1], entry[0]))


def _integers(row: Row, field: str, value: Any, size: int) -> list[int]:
    if not isinstance(value, list):
        raise row.error(field, expected="a list of token ids", got="none" if value is None else repr(value)[:60])
    for at, id in enumerate(value):
        if type(id) is not int or not 0 <= id < size:
            raise row.error(f"{field}[{at}]", expected=f"a token id from 0 to {size - 1}", got=repr(id)[:60])
    return value


def _logprob(row: Row, field: str, value: Any) -> float:
    """A natural log-probability; rounding may lift it above 0 by a little."""
    known = type(value) is float or (type(value) is int and abs(value) < 1 << 64)
    number = float(value) if known else math.nan
    if not number <= 1e-3:
        raise row.error(field, expected="a log-probability, at most 0", got=repr(value)[:60])
    return number
