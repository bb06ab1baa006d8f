"""Documents by data set name: MBPP, the standard library, a local file, a Hub id."""

import itertools
import platform
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from data import mbpp, stdlib
from data.records import Document, DocumentSet
from data.tabular import Row, read_rows
from data.templates import prompt_document
from shared.errors import ConfigError


def load_documents(dataset: str, split: str, *, limit_docs: int | None = None) -> DocumentSet:
    """Read one split of a data set.

    Args:
        dataset: `mbpp`, `stdlib`, `FILE.jsonl`, `FILE.parquet` or a Hub id `owner/name`. Files and Hub data sets have
            MBPP's columns, or `prompt` and `completion`, or `text`; an `id` column is used where there is one.
        split: a split of that data set; a local file that is not MBPP has `train` alone.
        limit_docs: keep only the first so many documents.

    Raises:
        ConfigError: an unknown data set or split, a malformed row (by file, line and field), or no documents.
    """
    if limit_docs is not None and limit_docs < 1:
        raise ConfigError("a limit that keeps no document", where="limit_docs", expected="1 or more", got=limit_docs)
    revision: str | None = None
    licence: str | None
    if dataset == "stdlib":
        name, revision, licence = "stdlib", platform.python_version(), stdlib.LICENCE
        documents = stdlib.read_split(split)
    elif dataset.endswith((".jsonl", ".parquet")):
        path = Path(dataset)
        name, licence, documents = _from_rows(read_rows(path), split, path.name, splits_named=False)
    elif dataset == "mbpp" or (re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) and not Path(dataset).exists()):
        from data.hub import read_hub

        hub_id = mbpp.HUB_ID if dataset == "mbpp" else dataset
        revision, stated_licence, rows = read_hub(hub_id, split)
        name, known_licence, documents = _from_rows(rows, split, hub_id, splits_named=True)
        licence = known_licence or stated_licence
    else:
        expected = "mbpp, stdlib, FILE.jsonl, FILE.parquet or a Hub id owner/name"
        raise ConfigError("unknown data set", where="dataset", expected=expected, got=repr(dataset))
    kept = tuple(documents[:limit_docs])
    return DocumentSet(name=name, split=split, revision=revision, licence=licence, documents=kept)


def _from_rows(
    rows: Iterator[Row], split: str, name: str, *, splits_named: bool
) -> tuple[str, str | None, list[Document]]:
    """Name, licence and documents of rows whose first one tells the columns."""
    first = next(rows, None)
    if first is None:
        raise ConfigError("an empty data set", where=name, expected="at least one row")
    rows = itertools.chain([first], rows)
    if mbpp.is_mbpp(first.fields):
        return "mbpp", mbpp.LICENCE, mbpp.read_split(rows, split)
    if not splits_named and split != "train":
        raise ConfigError("unknown split", where=name, expected="a local file has only: train", got=repr(split))
    return name, None, list(_plain_documents(rows, first.fields.keys(), name))


def _plain_documents(rows: Iterable[Row], columns: Iterable[str], name: str) -> Iterator[Document]:
    """Documents from `prompt` and `completion`, or from `text`, as the first row's columns say."""
    columns = set(columns)
    if not ({"prompt", "completion"} <= columns or "text" in columns):
        expected = "prompt and completion, or text, or MBPP's (task_id, text or prompt, code, test_list)"
        raise ConfigError("unknown columns", where=name, expected=expected, got=", ".join(sorted(columns)))
    seen: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        id = row.text("id") if "id" in columns else str(number)
        if id in seen:
            raise row.error("id", expected="each id once", got=f"{id!r}, as {seen[id]}")
        seen[id] = row.where
        if "completion" in columns:
            prompt, completion = row.text("prompt"), row.text("completion", blank=False)
        else:
            prompt, completion = "", row.text("text", blank=False)
        yield prompt_document(id, name, prompt, completion)
