"""Documents by data set name: MBPP, the standard library, a local file, a Hub id."""

import array
import dataclasses
import hashlib
import itertools
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data import mbpp, stdlib
from data.hub import open_hub
from data.records import ORIGINS, Document, DocumentSet
from data.tabular import FILES, MANY, Row, Table, digest_files, find_data_files, open_table
from data.templates import chat_document, mbpp_document, prompt_document
from shared.errors import ConfigError, require, require_range
from shared.files import sha256_file, sha256_json
from shared.hub import find_commit

DEFAULT_CONFIGS = {mbpp.HUB_ID: mbpp.CONFIG}
WRITTEN = "written"  # the column in which `codedistill generate` says who wrote a document
FORMS = (("prompt", "completion"), ("messages",), ("text",))  # the first that a data set has the columns of


Reader = Callable[[], Iterator[Document]]  # starts at the first document at each call


@dataclasses.dataclass(frozen=True, slots=True)
class Documents:
    """Documents that are read from their source, one by one, whenever they are iterated over."""

    read: Reader

    def __iter__(self) -> Iterator[Document]:
        return self.read()


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """What names the documents of one split of a data set.

    Files and Hub data sets have MBPP's columns, or `prompt` and `completion`, or `messages` (a chat), or `text`; and
    `id` where wanted.
    """

    dataset: str  # `mbpp`, `stdlib`, data files (see `find_data_files`) or a Hub id `owner/name`
    split: str  # of that data set; a local file that is not MBPP is whatever split its user calls it
    limit_docs: int | None = None  # only the first so many documents; no row behind them is read
    columns: str | None = None  # what these columns are called here, such as `prompt=instruction,completion=output`
    revision: str | None = None  # branch, tag or commit of a Hub id
    config: str | None = None  # one of a Hub data set's configurations; `owner/name:config` names it too

    def __post_init__(self) -> None:
        if self.limit_docs is not None:
            require_range(self.limit_docs, "limit_docs", at_least=1)


def load_documents(dataset: str, split: str, **options: Any) -> DocumentSet:
    """Read one split of a data set into memory, where its `documents` are a tuple; the arguments are `Source`'s.

    Raises:
        ConfigError: as `open_documents`; also for a malformed row, by file, line and field.
    """
    found = open_documents(Source(dataset, split, **options))
    return dataclasses.replace(found, documents=tuple(found.documents))


def open_documents(source: Source) -> DocumentSet:
    """Open one split of a data set, whose documents are then read one by one at each iteration.

    Raises:
        ConfigError: an unknown data set, configuration or split, or no rows; iterating, a malformed row (by file, line
            and field) or an id that occurs twice.
    """
    kind, place, files, config = _resolve(source)
    commit: str | None = None
    license: str | None = None
    attribution: str | None = None
    num_documents: int | None = None
    if kind == "hub":
        # All of MBPP is read, whatever the limit: its rows are checked, and they are few.
        limit = None if place == mbpp.HUB_ID else source.limit_docs
        found = open_hub(place, source.split, source.revision, config, limit)
        commit, config, license = found.commit, found.config, found.license
        attribution = f"{place}, https://huggingface.co/datasets/{place}"
    mark = fingerprint(dataclasses.replace(source, revision=commit))
    assert mark is not None  # the commit is known by now
    if kind == "stdlib":
        name, commit = "stdlib", platform.python_version()
        license, attribution = stdlib.LICENSE, stdlib.ATTRIBUTION
        stdlib.require_split(source.split)
        read = _first(source.limit_docs, lambda: stdlib.read_split(source.split))
    else:
        table = found.table if kind == "hub" else open_table(files, place)
        if _is_mbpp(source, table):
            name, license, attribution = mbpp.NAME, mbpp.LICENSE, mbpp.ATTRIBUTION
            read = _first(
                source.limit_docs, lambda: mbpp.read_split(table.read(mbpp.COLUMNS), source.split, mbpp_document)
            )
        else:
            name, read = table.name, _read_plain(table, parse_columns(source.columns), source.limit_docs)
            num_documents = table.count(source.limit_docs)
            if kind == "files" and WRITTEN in table.columns:  # the prompts' license passes on
                first = next(iter(table.read([WRITTEN])), None)
                license = _written(first).get("license") if first else None
    return DocumentSet(
        name=name,
        split=source.split,
        revision=commit,
        config=config,
        license=license,
        attribution=attribution,
        fingerprint=mark,
        documents=Documents(read),
        num_documents=num_documents,
    )


def fingerprint(source: Source) -> str | None:
    """SHA-256 of all that decides what `open_documents` gives; parses no more than a row, so it takes a moment.

    That is: the bytes of the files or of the library, or the Hub's commit; the arguments; and the code of this package.
    With `limit_docs` it is only the bytes that hold those rows. Equal fingerprints mean equal documents. Different ones
    mean nothing: the same documents may lie in another file.

    Returns:
        None where only reading tells the commit (a Hub data set offline).

    Raises:
        ConfigError: an unknown data set, a file that cannot be read, or the Hub cannot be reached.
    """
    kind, place, files, config = _resolve(source)
    limit, revision = source.limit_docs, source.revision
    origin: list[Any]
    if kind == "hub":
        pinned = revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision)
        commit = revision if pinned else find_commit(place, "dataset", revision)
        if commit is None:
            return None
        origin = [place, commit, config]
    elif kind == "stdlib":
        origin = [platform.python_version(), stdlib.files_digest()]
    else:
        is_limited = limit is not None and not _is_mbpp(source, open_table(files, place))
        origin = [place, digest_files(files, limit if is_limited else None)]
    code = [sha256_file(file) for file in sorted(Path(__file__).parent.glob("*.py"))]
    return sha256_json([kind, origin, source.split, limit, source.columns, code])


def _resolve(source: Source) -> tuple[str, str, list[Path], str | None]:
    """What a data set's name stands for: `stdlib`, `files` or `hub`; name or Hub id; files; configuration."""
    dataset, config = source.dataset, source.config
    kind, place, files = "", dataset, list[Path]()
    if dataset == "stdlib":
        require(source.columns is None, "stdlib has no columns", where="columns", got=source.columns)
        kind = "stdlib"
    elif dataset and (found := find_data_files(dataset)):
        kind, files = "files", found
        names = [Path(part.strip()).name or Path(part).resolve().name for part in dataset.split(",")]
        place = ",".join(names) if len(found) > 1 else found[0].name
    elif not Path(dataset).exists() and (named := re.fullmatch(r"(mbpp|[\w.-]+/[\w.-]+)(?::(.+))?", dataset)):
        kind, place = "hub", mbpp.HUB_ID if named[1] == mbpp.NAME else named[1]
        is_one = None in (config, named[2]) or config == named[2]
        require(is_one, "two configurations are named", where=dataset, got=config, fix="name one")
        config = config or named[2] or DEFAULT_CONFIGS.get(place)
    expected = f"mbpp, stdlib, a Hub id owner/name[:config], {FILES}, {MANY}"
    require(kind, "unknown data set", where="dataset", expected=expected, got=repr(dataset))
    for option, value in (("revisions", source.revision), ("configurations", config)):
        require(kind == "hub" or value is None, f"only a Hub data set has {option}", where=dataset, got=value)
    return kind, place, files, config


def _is_mbpp(source: Source, table: Table) -> bool:
    """Whether rows are MBPP's, of which every one is read, whatever the limit: their `task_id` tells the split."""
    return source.columns is None and mbpp.is_mbpp(table.columns)


def parse_columns(columns: str | None) -> dict[str, str]:
    """Read `prompt=instruction,completion=output`: the data set's column for each of ours.

    Raises:
        ConfigError: it is not of that form, or names no whole form of document.
    """
    pairs = [part.partition("=") for part in columns.split(",")] if columns else []
    names = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    is_form = any(set(form) == names.keys() - {"id"} for form in FORMS)
    if columns is not None and not (is_form and len(names) == len(pairs) and all(names.values())):
        expected = "prompt=NAME,completion=NAME or messages=NAME or text=NAME, and id=NAME where wanted"
        raise ConfigError("cannot read the columns", where="columns", expected=expected, got=repr(columns))
    return names


def _first(limit: int | None, read: Callable[[], list[Document]]) -> Reader:
    """The first documents of a data set that is small enough to be read whole."""
    return lambda: iter(read()[:limit])


def _read_plain(table: Table, names: Mapping[str, str], limit: int | None) -> Reader:
    """The documents of a table whose columns are ours, or `names` where the user gives them; reads no other column."""
    form = next((form for form in FORMS if set(form) <= (names.keys() or set(table.columns))), None)
    if form is None:
        expected = "prompt and completion, or messages, or text, or MBPP's (task_id, text or prompt, code, test_list)"
        got = ", ".join(sorted(table.columns))
        fix = "name your columns: --columns text=NAME, or prompt=NAME,completion=NAME"
        raise ConfigError("unknown columns", where=table.name, expected=expected, got=got, fix=fix)
    columns = [names.get(column, column) for column in form]
    id_column = names.get("id", "id" if "id" in table.columns else None)
    wanted = [*columns, id_column] if id_column else columns
    missing = ", ".join(column for column in wanted if column not in table.columns)
    require(not missing, "a column is missing", where=table.name, expected=missing, got=", ".join(table.columns))

    def rows() -> Iterator[Row]:
        return itertools.islice(table.read([*wanted, WRITTEN]), limit)

    return lambda: _plain_documents(rows, table.name, form, columns, id_column)


def _plain_documents(
    rows: Callable[[], Iterator[Row]], name: str, form: tuple[str, ...], columns: list[str], id_column: str | None
) -> Iterator[Document]:
    """Documents of one form, from the columns that hold its parts.

    Of each id eight bytes are kept. They are compared whenever the number of documents has doubled, and at the end.
    """
    hashes, number = array.array("Q"), 0
    for number, row in enumerate(rows(), start=1):
        id = row.id(id_column) if id_column else str(number)
        if id_column:
            hashes.append(_hash(id))
            if number & (number - 1) == 0:
                _refuse_repeated_ids(hashes, rows, id_column)
        if form == ("messages",):
            document = chat_document(id, name, row.messages(columns[0]))
            if not any(m["role"] == "assistant" and m["content"].strip() for m in document.messages or ()):
                raise row.error(columns[0], expected="an assistant's turn with some text", got="none")
            yield document
        else:
            prompt = row.text(columns[0]) if len(form) == 2 else ""
            written = _written(row)
            written.pop("license", None)
            yield prompt_document(id, name, prompt, row.text(columns[-1], blank=False), **written)
    require(number, "an empty data set", where=name, expected="at least one row")
    if id_column:
        _refuse_repeated_ids(hashes, rows, id_column)


def _written(row: Row) -> dict[str, Any]:
    """Who wrote a completion, its verdict, whether it was cut off, and its prompt's license, where `codedistill
    generate` made the row."""
    record = row.fields.get(WRITTEN)
    if not isinstance(record, dict) or record.get("origin") not in ORIGINS:
        return {}
    license = record.get("license")
    if license is not None and not (isinstance(license, str) and re.fullmatch(r"[\w .+()-]{1,200}", license, re.ASCII)):
        raise row.error(f"{WRITTEN}.license", expected="an SPDX expression, or null", got=f"{license!r:.60}")
    written = {key: record[key] for key in ("origin", "verdict", "license") if isinstance(record.get(key), str)}
    return written | {"is_cut": record.get("finish_reason") == "length"}


def _hash(id: str) -> int:
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little")


def _refuse_repeated_ids(hashes: "array.array[int]", rows: Callable[[], Iterator[Row]], id_column: str) -> None:
    """Refuse an id that occurs twice; where hashes are equal, the rows are read again to tell."""
    values, counts = np.unique(np.frombuffer(hashes, np.uint64), return_counts=True)
    repeated = set(values[counts > 1].tolist())
    if not repeated:
        return
    seen: dict[str, str] = {}
    for row in itertools.islice(rows(), len(hashes)):
        id = row.id(id_column)
        if _hash(id) in repeated:
            row.require_once(id_column, id, seen)
