"""JSONL and parquet traps: each reads right or is refused by file, line and field."""

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import tabular
from data.tabular import find_data_files, open_table, read_rows
from shared.errors import ConfigError


def fields(path):
    return [row.fields for row in read_rows(path)]


def write(tmp_path, data: bytes):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"a": 1}\n{"a": 2}\n', [1, 2]),
        (b'{"a": 1}\n{"a": 2}', [1, 2]),
        (b'\xef\xbb\xbf{"a": 1}\n', [1]),
        (b'{"a": 1}\r\n\r\n{"a": 2}\r\n', [1, 2]),
        (b'\n  \n{"a": 1}\n\t\n\n{"a": 2}\n\n', [1, 2]),
        ('{"a": "x\u2028y\u2029z\u0085w\u000c"}\n'.replace("\f", "\\f").encode(), ["x\u2028y\u2029z\u0085w\f"]),
        (b'{"a": "nul \\u0000 end"}\n', ["nul \0 end"]),
        (b'{"a": "\\ud83d\\ude00"}\n', ["\U0001f600"]),
        (b'{"a": null}\n', [None]),
        (b"", []),
        (b'{"a": "' + b"x" * 5_000_000 + b'"}\n', ["x" * 5_000_000]),
    ],
)
def test_reads(tmp_path, data, expected):
    assert [row["a"] for row in fields(write(tmp_path, data))] == expected


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b'{"a": 1', ["line 3", "not JSON"]),
        (b'{"a": 1}{"a": 2}', ["line 3", "Extra data"]),
        (b'{"a": 1}\r{"a": 2}', ["line 3", "Extra data"]),
        (b"[1]", ["line 3", "one JSON object", "list [1]"]),
        (b"null", ["line 3", "got: null"]),
        (b'{"a": "\xff"}', ["line 3", "not UTF-8"]),
        ('{"a": "é"}'.encode("latin-1"), ["line 3", "not UTF-8"]),
        (b'{"a": 1, "a": 2}', ["line 3", "field 'a'", "each field once"]),
        (b'{"b": {"a": 1, "a": 1}}', ["line 3", "field 'a'", "each field once"]),
        (b'{"a": NaN}', ["line 3", "field 'a'", "NaN"]),
        (b'{"a": [1, [-Infinity]]}', ["line 3", "field 'a'", "Infinity"]),
        (b'{"a": 1e999}', ["line 3", "field 'a'", "Infinity"]),
        (b'\xef\xbb\xbf{"a": 1}', ["line 3", "BOM"]),
        (b"[" * 200_000, ["line 3", "not JSON"]),
        (b"9" * 5_000, ["line 3", "not JSON"]),
    ],
)
def test_refuses_a_line_by_file_line_and_field(tmp_path, line, parts):
    path = write(tmp_path, b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(ConfigError) as caught:
        fields(path)
    for part in ["rows.jsonl", *parts]:
        assert part in str(caught.value)
    assert "line 1" not in str(caught.value)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".zst": zstd}
LINES = b"".join(b'{"a": %d, "text": "%s"}\n' % (i, hashlib.sha256(b"%d" % i).hexdigest().encode()) for i in range(999))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_lines_read_like_plain_ones(tmp_path, suffix):
    plain, packed = write(tmp_path, LINES), tmp_path / f"rows.jsonl{suffix}"
    compress = COMPRESS[suffix]
    packed.write_bytes(compress(LINES))
    assert fields(packed) == fields(plain)
    assert [row.where for row in read_rows(packed)][::998] == [f"rows.jsonl{suffix}, line {n}" for n in (1, 999)]
    assert open_table([packed], "name").columns == ("a", "text")
    packed.write_bytes(compress(LINES[:12_345]) + compress(LINES[12_345:]))  # as two files put together
    assert fields(packed) == fields(plain)
    packed.write_bytes(compress(b"\xef\xbb\xbf" + LINES[:-1].replace(b"\n", b"\r\n")))
    assert fields(packed) == fields(plain)
    packed.write_bytes(compress(b""))
    assert fields(packed) == []
    packed.write_bytes(compress(LINES + b"{"))
    with pytest.raises(ConfigError, match=rf"a line is not JSON; where: rows.jsonl{suffix}, line 1000"):
        fields(packed)


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("length", [3, 9, 20, 5_000, -20, -8, -1])
def test_compressed_lines_that_are_cut_off_are_refused(tmp_path, suffix, length):
    packed = tmp_path / f"rows.jsonl{suffix}"
    packed.write_bytes(COMPRESS[suffix](LINES)[:length])
    with pytest.raises(
        ConfigError, match=f"a compressed file is damaged; where: {packed}; got: .*; fix: fetch or write"
    ):
        fields(packed)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_damaged_compressed_lines_are_refused(tmp_path, suffix):
    packed, data = tmp_path / f"rows.jsonl{suffix}", COMPRESS[suffix](LINES)
    flipped = data[:5_000] + bytes([data[5_000] ^ 255]) + data[5_001:]
    for damaged in (LINES, b"\0" + data, data + b"more", *([flipped] if suffix == ".gz" else [])):  # has a checksum
        packed.write_bytes(damaged)
        with pytest.raises(ConfigError, match=f"a compressed file is damaged; where: {packed}"):
            fields(packed)


@pytest.mark.parametrize("name", ["absent.jsonl.gz", "absent.jsonl.zst", "folder.jsonl.gz", "folder.jsonl"])
def test_what_is_no_compressed_file_is_not_called_damaged(tmp_path, name):
    (tmp_path / "folder.jsonl.gz").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ConfigError, match=f"cannot read a data file; where: .*{name}; got: (No such file|Is a dir)"):
        fields(tmp_path / name)


def test_numbers_that_are_not_finite_are_refused_where_they_are_asked_for(tmp_path):
    path = write(tmp_path, b'{"a": "x", "score": NaN, "more": {"b": [1e999]}}\n')
    (row,) = read_rows(path, ["a"])
    assert row.text("a") == "x"
    for field in ("score", "more"):
        with pytest.raises(ConfigError, match=f"line 1, field '{field}'; expected: finite numbers"):
            list(read_rows(path, ["a", field]))


def test_values_nested_deeply_are_refused_in_one_line(tmp_path):
    for depth in (900, 990, 5_000):
        path = write(tmp_path, b'{"a": ' + b"[" * depth + b"]" * depth + b"}")
        with pytest.raises(ConfigError, match=r"rows.jsonl, line 1"):
            next(read_rows(path)).text("a")


def test_utf16_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="line 1; got: 'utf-8' codec"):
        fields(write(tmp_path, '{"a": 1}\n'.encode("utf-16")))


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.parquet"])
def test_an_absent_file_is_named(tmp_path, name):
    with pytest.raises(ConfigError, match=name):
        fields(tmp_path / name)


@pytest.mark.parametrize(
    ("value", "accessor", "message"),
    [
        (None, "text", "field 'a'; expected: a string; got: null"),
        (3, "text", "field 'a'; expected: a string; got: int 3"),
        ("x\ud800y", "text", "field 'a'; expected: text that UTF-8 can hold; got: a lone surrogate at character 1"),
        (["x", 2], "texts", r"field 'a\[1\]'; expected: a string; got: int 2"),
        (["\udfff"], "texts", r"field 'a\[0\]'; .*surrogate"),
        ("x", "texts", "field 'a'; expected: a list of strings; got: str 'x'"),
        (None, "texts", "field 'a'; expected: a list of strings; got: null"),
        ("7", "integer", "field 'a'; expected: an integer; got: str '7'"),
        (True, "integer", "field 'a'; expected: an integer; got: bool True"),
        (7.0, "integer", "field 'a'; expected: an integer; got: float 7.0"),
    ],
)
def test_accessors_refuse_other_types(tmp_path, value, accessor, message):
    (row,) = read_rows(write(tmp_path, json.dumps({"a": value}).encode()))
    with pytest.raises(ConfigError, match=f"rows.jsonl, line 1, {message}"):
        getattr(row, accessor)("a")


def test_a_missing_field_is_named(tmp_path):
    (row,) = read_rows(write(tmp_path, b'{"b": 1}'))
    with pytest.raises(ConfigError, match=r"line 1, field 'a'; .* got: fields 'b'"):
        row.text("a")


def test_parquet_reads_like_jsonl(tmp_path):
    rows = [{"a": "x\r\n\u2028\0", "b": 1, "c": ["p", None]}, {"a": None, "b": 2, "c": []}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=1)
    read = list(read_rows(tmp_path / "rows.parquet"))
    assert [row.fields for row in read] == rows
    with pytest.raises(ConfigError, match=r"rows.parquet, row 2, field 'a'; expected: a string; got: null"):
        read[1].text("a")


def test_rows_of_many_row_groups_are_read_in_order_with_the_columns_that_are_there(tmp_path):
    table = pa.table({"a": list(range(1_000)), "b": ["x"] * 1_000, "c": [None] * 1_000})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=300)
    rows = list(read_rows(tmp_path / "rows.parquet", ("c", "a", "absent")))
    assert [row.fields for row in rows] == [{"a": i, "c": None} for i in range(1_000)]
    assert [row.where for row in rows[298:302]] == [f"rows.parquet, row {i}" for i in range(299, 303)]
    assert open_table([tmp_path / "rows.parquet"], "name").columns == ("a", "b", "c")


def test_parquet_faults(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ConfigError, match="cannot read a parquet file"):
        fields(path)
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), path)
    with pytest.raises(ConfigError, match="column occurs twice"):
        fields(path)
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], names=["a", "a", "b"]), path)
    assert [row.fields for row in read_rows(path, ["b"])] == [{"b": 3}]
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.Table.from_arrays([bad], names=["a"]), path)
    with pytest.raises(ConfigError, match="cannot read a parquet file"):
        fields(path)


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
def test_a_row_that_is_too_large_is_refused_by_line(tmp_path, monkeypatch, suffix):
    packed = tmp_path / f"rows.jsonl{suffix}"
    packed.write_bytes(COMPRESS.get(suffix, bytes)(b'{"a": 1}\n{"a": "' + b"x" * 991 + b'"}\n'))
    assert [len(row.fields) for row in read_rows(packed)] == [1, 1]
    monkeypatch.setattr(tabular, "MAX_LINE_BYTES", 1_001)
    assert len(list(read_rows(packed))) == 2
    monkeypatch.setattr(tabular, "MAX_LINE_BYTES", 1_000)
    with pytest.raises(ConfigError, match=rf"a row is too large; where: rows.jsonl{suffix}, line 2"):
        list(read_rows(packed))


def test_the_files_that_a_name_stands_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "b/2.jsonl",
        "b/10.jsonl.gz",
        "a.parquet",
        "b/notes.txt",
        "b/.hidden.jsonl",
        ".git/c.jsonl",
        "x,y.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = {
        ".": ["a.parquet", "b/10.jsonl.gz", "b/2.jsonl", "x,y.jsonl"],
        "b": ["b/10.jsonl.gz", "b/2.jsonl"],
        "b/*": ["b/10.jsonl.gz", "b/2.jsonl"],
        "**/*.jsonl": ["b/2.jsonl", "x,y.jsonl"],
        "b/2.jsonl, a.parquet": ["b/2.jsonl", "a.parquet"],
        "b,a.parquet": ["b/10.jsonl.gz", "b/2.jsonl", "a.parquet"],
        "x,y.jsonl": ["x,y.jsonl"],
        "absent.jsonl": ["absent.jsonl"],
    }
    for name, found in names.items():
        assert find_data_files(name) == [Path(file) for file in found]
    assert find_data_files(str(tmp_path / "b/*.gz")) == [tmp_path / "b/10.jsonl.gz"]
    assert find_data_files(str(tmp_path / "b")) == [tmp_path / "b/10.jsonl.gz", tmp_path / "b/2.jsonl"]
    for name in ("mbpp", "owner/name", "absent/"):
        assert find_data_files(name) is None
    for name in ("absent/*.jsonl", "b/*.txt"):
        with pytest.raises(ConfigError, match="no data file"):
            find_data_files(name)
    with pytest.raises(ConfigError, match="named twice"):
        find_data_files("b,b/2.jsonl")


def test_a_table_counts_no_more_than_its_rows(tmp_path):
    lines = write(tmp_path, b'{"text": "a"}\n\n{"text": "b"}')
    parquet = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["c", "d", "e"]}), parquet)
    limits = (None, 1, 2, 3, 5, 9)
    assert [open_table([lines], "t").count(limit) for limit in limits] == [None, 1, 2, 2, 2, 2]
    assert [open_table([parquet], "t").count(limit) for limit in limits] == [3, 1, 2, 3, 3, 3]
    assert [open_table([lines, parquet], "t").count(limit) for limit in limits] == [None, 1, 2, 3, 5, 5]
