"""Rows from JSONL and parquet files; a malformed row is refused by file, line and field."""

import contextlib
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import ConfigError, require
from shared.files import json_fault, sha256_file

if TYPE_CHECKING:
    from pyarrow import Array
    from pyarrow.parquet import ParquetFile

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")  # of data files
FILES = "FILE.jsonl[.gz|.zst] or FILE.parquet"  # the same for a reader
MANY = "a folder, a glob or a comma-separated list of these"
MAX_LINE_BYTES = 1 << 28  # of JSONL: tokenising takes some 100 times a text's size
ROWS_AT_ONCE = 256  # of a Parquet file, so that long texts take little memory beside the documents


@dataclass(frozen=True, slots=True)
class Row:
    """One row; `where` names its file and line. The accessors refuse values of another type."""

    where: str
    fields: dict[str, Any]

    def text(self, field: str, *, blank: bool = True) -> str:
        """A string that UTF-8 can hold; with `blank=False` it must have something but white space in it."""
        value = _checked_text(self._get(field), f"{self.where}, field {field!r}")
        if not blank and not value.strip():
            raise self.error(field, expected="some text", got=repr(value))
        return value

    def texts(self, field: str) -> list[str]:
        """A list of strings."""
        value = self._get(field)
        if not isinstance(value, list):
            raise self.error(field, expected="a list of strings", got=_describe(value))
        return [_checked_text(item, f"{self.where}, field '{field}[{i}]'") for i, item in enumerate(value)]

    def integer(self, field: str) -> int:
        """An integer (booleans and floats are none)."""
        value = self._get(field)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(field, expected="an integer", got=_describe(value))
        return value

    def id(self, field: str) -> str:
        """A document's name: a string, or an integer in digits (booleans and floats are none)."""
        value = self._get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return _checked_text(value, f"{self.where}, field {field!r}", expected="a string or an integer")

    def messages(self, field: str) -> tuple[dict[str, str], ...]:
        """A chat: a list of objects with `role` and `content`, both strings."""
        value = self._get(field)
        if not isinstance(value, list):
            raise self.error(field, expected="a list of messages", got=_describe(value))
        return tuple(self._message(item, f"{field}[{i}]") for i, item in enumerate(value))

    def _message(self, value: Any, field: str) -> dict[str, str]:
        if not isinstance(value, dict):
            raise self.error(field, expected="an object with role and content", got=_describe(value))
        for key in value.keys() - {"role", "content"}:
            if value[key] is not None:  # parquet gives every message every key
                raise self.error(field, expected="only role and content", got=repr(key))
        where = f"{self.where}, field"
        return {key: _checked_text(value.get(key), f"{where} '{field}.{key}'") for key in ("role", "content")}

    def require_once(self, field: str, id: str | int, seen: dict[Any, str]) -> None:
        """Refuse an id that an earlier row has; `seen` has their rows by id, and gets this one."""
        if id in seen:
            raise self.error(field, expected="each id once", got=f"{id!r}, as {seen[id]}")
        seen[id] = self.where

    def error(self, field: str, *, expected: object, got: object) -> ConfigError:
        """The error that names this row and one of its fields."""
        return ConfigError("a malformed row", where=f"{self.where}, field {field!r}", expected=expected, got=got)

    def _get(self, field: str) -> Any:
        if field not in self.fields:
            got = f"fields {', '.join(map(repr, self.fields))}"
            raise self.error(field, expected="the field in every row", got=got)
        return self.fields[field]


@dataclass(frozen=True, slots=True)
class Table:
    """A data set that is read when its rows are asked for."""

    name: str  # for errors
    columns: tuple[str, ...]  # of JSONL the fields of its first row
    read: Callable[[Collection[str]], Iterator[Row]]  # of a Parquet file only with these columns, where it has them
    count: Callable[[int | None], int | None]  # rows, or of the first so many; None where only reading all tells


def find_data_files(name: str) -> list[Path] | None:
    """The files that a data set's name stands for, in order; None where it stands for no files.

    A folder stands for all data files in it and below, by path, but for hidden ones; a glob for those that it matches
    (`**` is any depth); names that a comma separates for those of each.

    Raises:
        ConfigError: a folder or glob without any data file, or a file twice.
    """
    path = Path(name)
    if path.is_dir():
        found = {file: file.relative_to(path).parts for file in path.rglob("*")}
    elif not path.exists() and "," in name and name.rpartition(",")[2].endswith(SUFFIXES):
        parts = [find_data_files(part.strip()) for part in name.split(",")]
        if None in parts:
            return None
        files = [file for part in parts for file in part or ()]
        require(len(set(files)) == len(files), "a data file is named twice", where=name)
        return files
    elif not path.exists() and glob.has_magic(name):
        matches = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
        found = {file: tuple(set(file.parts) - set(path.parts)) for file in matches}
    else:
        return [path] if name.endswith(SUFFIXES) else None
    visible = [file for file, parts in found.items() if not any(part.startswith(".") for part in parts)]
    files = sorted(file for file in visible if file.name.endswith(SUFFIXES) and file.is_file())
    require(files, "no data file", where=name, expected=FILES)
    return files


def open_table(paths: Sequence[Path], name: str) -> Table:
    """Files of `SUFFIXES` as one table, read one behind the other; `name` is that of the whole.

    Raises:
        ConfigError: a file cannot be read, or none has a row.
    """
    columns = next((columns for path in paths if (columns := _columns(path))), None)
    if columns is None:
        raise ConfigError("an empty data set", where=name, expected="at least one row")

    def read(columns: Collection[str]) -> Iterator[Row]:
        return itertools.chain.from_iterable(read_rows(path, columns) for path in paths)

    def count(limit: int | None) -> int | None:
        if limit is None and not all(path.suffix == ".parquet" for path in paths):
            return None
        num_rows = 0
        for path in paths:
            if limit is not None and num_rows >= limit:
                break
            num_rows += _num_rows(path, limit)
        return num_rows if limit is None else min(num_rows, limit)

    return Table(name, columns, read, count)


def _columns(path: Path) -> tuple[str, ...] | None:
    """The names of a file's columns, of JSONL the fields of its first row; None where it has no row."""
    if path.suffix == ".parquet":
        with _parquet(path) as file:
            return tuple(file.schema_arrow.names) if file.metadata.num_rows else None
    first = next(read_rows(path), None)
    return tuple(first.fields) if first else None


def _num_rows(path: Path, limit: int | None = None) -> int:
    """Rows of a Parquet file, from its footer; filled lines of JSONL, counted up to a limit."""
    if path.suffix != ".parquet":
        with _open_text(path) as lines:
            return sum(1 for _ in itertools.islice(_filled(lines), limit))
    with _parquet(path) as file:
        return int(file.metadata.num_rows)


def read_rows(path: Path, columns: Collection[str] | None = None) -> Iterator[Row]:
    """Read a file of one of `SUFFIXES` row by row; one of another name is read as JSONL.

    `columns` are those that are wanted, all by default. What others hold is not judged, and of a Parquet file not even
    read. Rows of JSONL have all their fields.

    Raises:
        ConfigError: the file cannot be read, is damaged, or a row is malformed.
    """
    if path.suffix == ".parquet":
        yield from _read_parquet(path, columns)
    else:
        with _open_text(path) as lines:
            yield from parse_jsonl(lines, path.name, columns)


@contextlib.contextmanager
def _open_text(path: Path) -> Iterator[Iterable[bytes]]:
    """The lines of a text file, decompressed where its name ends in `.gz` or `.zst`."""
    try:
        with path.open("rb") as raw:
            if path.suffix == ".gz":
                yield _lines(gzip.GzipFile(fileobj=raw))
            elif path.suffix == ".zst":
                from pyarrow import CompressedInputStream

                with CompressedInputStream(raw, "zstd") as stream:
                    yield _lines(io.BufferedReader(stream))
            else:
                yield _lines(raw)
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise _unreadable(path, error) from error
        fix = "fetch or write the file again"
        raise ConfigError("a compressed file is damaged", where=path, got=error, fix=fix) from error


def _lines(file: io.BufferedIOBase) -> Iterator[bytes]:
    """A file's lines; of one that is too long only as much as shows it."""
    return iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")


def digest_files(paths: Iterable[Path], limit: int | None = None) -> list[list[str]]:
    """Name and SHA-256 of each data file; with a limit only of what holds the first so many rows.

    That is whole Parquet files, and of JSONL the lines that hold them, decompressed.

    Raises:
        ConfigError: a file cannot be read.
    """
    digests, left = list[list[str]](), limit
    for path in paths:
        if left == 0:
            break
        if left is None or path.suffix == ".parquet":
            try:
                digests.append([path.name, sha256_file(path)])
            except OSError as error:
                raise _unreadable(path, error) from error
            left = None if left is None else max(left - _num_rows(path), 0)
        else:
            running = hashlib.sha256()
            with _open_text(path) as lines:
                for _, line in itertools.islice(_filled(lines), left):
                    running.update(line)
                    left -= 1
            digests.append([path.name, running.hexdigest()])
    return digests


def parse_jsonl(lines: Iterable[bytes], name: str, columns: Collection[str] | None = None) -> Iterator[Row]:
    """Parse the lines of a JSONL file: UTF-8, one object a line, ended by LF or CRLF; blank lines are skipped.

    A byte order mark at the start is dropped. Lines are cut at LF bytes only: U+2028 and U+0085 are text. NaN and
    Infinity are refused in the fields that `columns` names; in all by default.
    """
    for number, line in _filled(lines):
        where = f"{name}, line {number}"
        if len(line) > MAX_LINE_BYTES:
            expected, fix = f"at most {MAX_LINE_BYTES >> 20} MiB a row", "cut it into several"
            raise ConfigError("a row is too large", where=where, expected=expected, got="more", fix=fix)
        try:
            value = json.loads(line.decode("utf-8"), object_pairs_hook=functools.partial(_object, where=where))
        except ConfigError:
            raise
        except UnicodeDecodeError as error:
            raise ConfigError("a line is not UTF-8", where=where, got=error) from error
        except (ValueError, RecursionError) as error:
            fault = json_fault(error)
            raise ConfigError("a line is not JSON", where=where, expected="one JSON object", got=fault) from error
        if not isinstance(value, dict):
            raise ConfigError("a malformed row", where=where, expected="one JSON object", got=_describe(value))
        row = Row(where, value)
        for field in value:
            if (columns is None or field in columns) and not _is_finite(value[field]):
                raise row.error(field, expected="finite numbers", got="NaN or Infinity")
        yield row


def _filled(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers; the first without a byte order mark."""
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip(b" \t\r\n"):
            yield number, line


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError("cannot read a data file", where=path, got=error.strerror or error)


def _object(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ConfigError("a malformed row", where=f"{where}, field {key!r}", expected="each field once", got="two")
        fields[key] = value
    return fields


def _is_finite(value: Any) -> bool:
    """Whether no number in a JSON value is NaN or Infinity."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, list | dict):
            stack += value.values() if isinstance(value, dict) else value
        elif isinstance(value, float) and not math.isfinite(value):
            return False
    return True


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator["ParquetFile"]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except pyarrow.ArrowException as error:
        raise ConfigError("cannot read a parquet file", where=path, got=error) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_parquet(path: Path, columns: Collection[str] | None) -> Iterator[Row]:
    with _parquet(path) as file:
        names = [name for name in file.schema_arrow.names if columns is None or name in columns]
        if len(set(names)) != len(names):
            raise ConfigError("a column occurs twice", where=path.name, got=", ".join(names))
        number = 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=names):
            values = {name: _python_values(batch.column(name), f"{path.name}, column {name!r}") for name in names}
            for at in range(batch.num_rows):
                number += 1
                yield Row(f"{path.name}, row {number}", {name: column[at] for name, column in values.items()})


def _python_values(column: "Array", where: str) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError, KeyError) as error:  # no UTF-8, a date beyond Python's, an unknown time zone
        raise ConfigError("cannot read a parquet file", where=where, got=f"{column.type}: {error}") from error
    return values


def _checked_text(value: Any, where: str, expected: str = "a string") -> str:
    if not isinstance(value, str):
        raise ConfigError("a malformed row", where=where, expected=expected, got=_describe(value))
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        got = f"a lone surrogate at character {error.start}"
        raise ConfigError("a malformed row", where=where, expected="text that UTF-8 can hold", got=got) from error
    return value


def _describe(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r:.60}"
