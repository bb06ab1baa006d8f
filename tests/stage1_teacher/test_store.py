"""The token store: what it holds, when it is used again, and what kills and damage leave of it."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.load import Source, open_documents
from data.records import Document
from shared import progress
from shared.errors import ConfigError, ResumeError
from shared.tokenizer import load_tokenizer, record_ends
from stage1_teacher import store as module
from stage1_teacher.documents import Limits, cut_documents
from stage1_teacher.store import find_store, make_store
from tests.stage1_teacher.test_build import build
from tests.support import warm

LIMITS = Limits(max_length=64, on_long="split", head_width=304)
REQUEST = {"fingerprint": "f"}


@pytest.fixture
def made(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    record_ends(loaded)
    return loaded


@pytest.fixture
def corpus(tmp_path):
    """Short and long documents, one in many letters, and one that a cache holds already."""
    texts = [f"x = {i}\n" + "y = x + 1\n" * (i % 30) for i in range(90)] + ["é = 'ü\u2028ñ'\n"]
    path = tmp_path / "corpus.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"# {i}", "completion": f"\n{t}"}) + "\n" for i, t in enumerate(texts))
    )
    return open_documents(Source(str(path), "train"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_segments_are_those_of_the_documents_wherever_batches_end(corpus, made, tmp_path, monkeypatch):
    whole = make_store(tmp_path / "whole", REQUEST, corpus, made, LIMITS)
    documents = [(document, document.digest) for document in corpus.documents]
    expected = [segment for document in cut_documents(documents, made, LIMITS) for segment in document.segments]
    assert len(whole) == len(expected) > len(documents)
    for first, stop in ((0, len(expected)), (17, 18), (30, 61)):
        for ours, theirs in zip(whole.segments(range(first, stop)), expected[first:stop], strict=True):
            np.testing.assert_array_equal(ours.ids, theirs.ids)
            np.testing.assert_array_equal(ours.is_target, theirs.is_target)
            assert list(ours.meta.items()) == list(theirs.meta.items())
    assert whole.lengths.tolist() == [len(segment.ids) for segment in expected]
    facts = whole.facts
    assert (facts.num_documents, facts.num_skipped, facts.digest) == (91, 0, corpus.digest)
    assert facts.num_tokens == sum(len(segment.ids) for segment in expected)
    assert facts.num_targets == sum(int(segment.is_target.sum()) for segment in expected)
    is_long = [document.is_long for document in cut_documents(documents, made, LIMITS)]
    assert facts.long.count == sum(is_long) > 5
    assert facts.long.ids == [d.id for (d, _), long in zip(documents, is_long, strict=True) if long][:5]
    for name, value in (("BATCH_DOCUMENTS", 4), ("BATCH_CHARACTERS", 50)):
        monkeypatch.setattr(module, name, value)
        make_store(tmp_path / name, REQUEST, corpus, made, LIMITS)
        assert contents(tmp_path / name) == contents(tmp_path / "whole")


def test_it_shows_how_far_and_how_fast_it_is(corpus, made, tmp_path, monkeypatch, capsys):
    """Of how many documents only where that is known: JSONL is not read for it, a limit or a Parquet file tells."""
    monkeypatch.setattr(progress, "FIRST_LINE_SECONDS", 0.0)
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 16)
    path = tmp_path / "corpus.jsonl"
    parquet = tmp_path / "corpus.parquet"
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in path.open()]), parquet)
    for source, total in ((Source(str(path), "train"), None), (Source(str(parquet), "train"), 91)):
        store = make_store(tmp_path / "store", REQUEST, open_documents(source), made, LIMITS)
        *lines, last = capsys.readouterr().err.splitlines()
        assert lines
        for line in lines:
            found = re.fullmatch(r"tokenising: (\d+)(/\d+)? documents( \(\d+%\))?, .* documents/s, "
                                 r"([\d,]+) tokens, [\d,]+ tokens/s(, \d+ s left)?", line)  # fmt: skip
            assert found and [group is not None for group in found.group(2, 3, 5)] == [total is not None] * 3, line
            assert found[2] in (None, f"/{total}")
        assert int(found[1]) <= 91
        assert re.match(rf"tokenising: 91 documents in .*, {store.facts.num_tokens:,} tokens, ", last)
    assert open_documents(Source(str(path), "train", limit_docs=7)).num_documents == 7


def test_the_sample_is_evenly_spaced_and_holds_no_chats(corpus, made, tmp_path):
    documents = list(corpus.documents)
    sampled = make_store(tmp_path / "many", REQUEST, corpus, made, LIMITS).facts.documents()
    assert sampled == documents[::8]
    few = dataclasses.replace(corpus, documents=documents[:16])
    assert make_store(tmp_path / "few", REQUEST, few, made, LIMITS).facts.documents() == documents[:16]


def test_skipped_documents_are_counted_and_left_out(corpus, made, tmp_path):
    documents = list(corpus.documents)
    known = {document.digest for document in documents[10:40]}
    store = make_store(tmp_path / "store", REQUEST, corpus, made, LIMITS, skipped=known)
    assert (store.facts.num_documents, store.facts.num_skipped, store.facts.num_new) == (91, 30, 61)
    assert store.facts.digest == corpus.digest
    ids = [segment.meta["id"] for segment in store.segments(range(len(store)))]
    assert list(dict.fromkeys(ids)) == [document.id for document in documents[:10] + documents[40:]]


def test_a_store_is_used_again_for_the_same_request_only(corpus, made, tmp_path):
    assert find_store(tmp_path / "store", REQUEST) is None
    first = make_store(tmp_path / "store", REQUEST, corpus, made, LIMITS)
    again = find_store(tmp_path / "store", REQUEST)
    assert (again.facts, again.data, len(again)) == (first.facts, dataclasses.replace(corpus, documents=()), len(first))
    assert find_store(tmp_path / "store", {"fingerprint": "g"}) is None


@pytest.mark.parametrize("name", ["tokens.u32", "targets.u8", "lengths.u32", "metas.jsonl", "metas.u32", "store.json"])
@pytest.mark.parametrize("damage", ["a bit", "the end", "all"])
def test_damage_is_noticed(corpus, made, tmp_path, capsys, name, damage):
    make_store(tmp_path / "store", REQUEST, corpus, made, LIMITS)
    file = tmp_path / "store" / name
    data = bytearray(file.read_bytes())
    if damage == "all":
        file.unlink()
    elif damage == "the end":
        file.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    assert find_store(tmp_path / "store", REQUEST) is None
    said = "is damaged; the documents are tokenised again" in capsys.readouterr().err
    assert said == ((name, damage) != ("store.json", "all"))


def test_files_stay_readable_once_they_are_removed(corpus, made, tmp_path):
    store = make_store(tmp_path / "store", REQUEST, corpus, made, LIMITS)
    before = [segment.ids.tolist() for segment in store.segments(range(5, 9))]
    store.remove()
    assert not (tmp_path / "store").exists()
    assert [segment.ids.tolist() for segment in store.segments(range(5, 9))] == before


KILLED = """
import dataclasses, itertools, sys, time
from pathlib import Path
from data.load import Source, open_documents
from shared.tokenizer import load_tokenizer, record_ends
from stage1_teacher import store as module
from stage1_teacher.documents import Limits
folder, corpus, tokenizer = sys.argv[1:]
made, data = load_tokenizer(tokenizer), open_documents(Source(corpus, "train"))
record_ends(made)
module.BATCH_DOCUMENTS = 4

def slowly():
    for number, document in enumerate(data.documents):
        if number == 60:
            print("tokenising", flush=True)
            time.sleep(60)
        yield document

limits = Limits(max_length=64, on_long="split", head_width=304)
slow = dataclasses.replace(data, documents=slowly())
module.make_store(Path(folder), {"fingerprint": "f"}, slow, made, limits)
"""


def test_a_kill_in_mid_tokenising_and_a_second_process_beside_it(corpus, made, tmp_path):
    folder = tmp_path / "store"
    whole = make_store(tmp_path / "whole", REQUEST, corpus, made, LIMITS).folder
    command = [sys.executable, "-c", KILLED, folder, tmp_path / "corpus.jsonl", tmp_path / "tokenizer"]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "tokenising\n"
        with pytest.raises(ResumeError, match=r"another process is tokenising the documents.*process"):
            make_store(folder, REQUEST, corpus, made, LIMITS)
        os.kill(process.pid, signal.SIGKILL)
    assert (folder / "lock.json").exists() and not (folder / "store.json").exists()
    assert find_store(folder, REQUEST) is None
    make_store(folder, REQUEST, corpus, made, LIMITS)
    assert contents(folder) == contents(whole)


def test_an_error_leaves_no_folder(corpus, made, tmp_path, monkeypatch):
    def broken():
        yield from itertools.islice(corpus.documents, 3)
        raise ConfigError("a malformed row")

    with pytest.raises(ConfigError, match="a malformed row"):
        make_store(tmp_path / "store", REQUEST, dataclasses.replace(corpus, documents=broken()), made, LIMITS)
    with pytest.raises(ConfigError, match=r"jsonl 5; expected: token ids below 70.*got: \d+"):
        narrow = dataclasses.replace(LIMITS, head_width=70)
        few = [Document(id="5", source="corpus.jsonl", completion="~~~")]
        make_store(tmp_path / "store", REQUEST, dataclasses.replace(corpus, documents=few), made, narrow)
    long = [Document(id=f"{i}", source="s", completion="x = 1\n" * 60) for i in range(4)]
    with pytest.raises(ConfigError, match=r"no document is left.*at most 64 tokens; got: \['0', '1', '2'\]"):
        drop = dataclasses.replace(LIMITS, on_long="drop")
        make_store(tmp_path / "store", REQUEST, dataclasses.replace(corpus, documents=long), made, drop)
    with (
        monkeypatch.context() as patch,
        pytest.raises(
            ConfigError, match=r"too large to be tokenised; where: s 0; expected: at most 300 characters; got: 360"
        ),
    ):
        patch.setattr(module, "MAX_CHARACTERS", 300)
        make_store(tmp_path / "store", REQUEST, dataclasses.replace(corpus, documents=long), made, LIMITS)
    digests = {document.digest for document in corpus.documents}
    with pytest.raises(ConfigError, match="every document is in a cache of --skip-in"):
        make_store(tmp_path / "store", REQUEST, corpus, made, LIMITS, skipped=digests)
    assert not (tmp_path / "store").exists()


def test_a_build_uses_its_tokens_again_or_makes_damaged_ones_again(teacher, rows, tmp_path, monkeypatch):
    """Stopped while it labels, a build leaves its tokens; they go once the cache is finished."""
    from stage1_teacher import capture

    whole, _ = build(teacher, rows, tmp_path / "whole")
    folder, out = tmp_path / ".cache.tokens", tmp_path / "cache"
    for damaged in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(capture, "capture_shard", interrupt)
            with pytest.raises(SystemExit):
                build(teacher, rows, out)
        with monkeypatch.context() as patch:
            if damaged:
                tokens = bytearray((folder / "tokens.u32").read_bytes())
                tokens[0] ^= 1
                (folder / "tokens.u32").write_bytes(tokens)
            else:
                patch.setattr(module, "cut_documents", None)  # nothing is tokenised again
            _, result = build(teacher, rows, out)
        said = "is damaged; the documents are tokenised again" if damaged else "20 documents are tokenised already"
        assert said in result.stderr
        assert not folder.exists()
        assert (out / "manifest.json").read_bytes() == (whole.path / "manifest.json").read_bytes()
        shutil.rmtree(out)


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_refused_build_leaves_no_tokens(teacher, rows, tmp_path):
    build(teacher, rows, tmp_path / "cache")
    rows.write_text(rows.read_text().replace("task 3", "task three"))
    with pytest.raises(ResumeError, match="other sources"):
        build(teacher, rows, tmp_path / "cache")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "rows.jsonl"]


def test_what_can_be_refused_without_the_tokens_is_refused_before_them(teacher, rows, tmp_path, monkeypatch):
    build(teacher, rows, tmp_path / "cache")
    monkeypatch.setattr(module, "cut_documents", None)
    with pytest.raises(ResumeError, match="begun with another top_k"):
        build(teacher, rows, tmp_path / "cache", "--top-k", "5")
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary/today.txt").write_text("mine")
    with pytest.raises(ResumeError, match="something that is no cache"):
        build(teacher, rows, tmp_path / "diary")


def test_a_build_beside_one_that_labels_leaves_its_tokens_alone(teacher, rows, tmp_path):
    from shared.lock import Lock

    (tmp_path / "cache").mkdir()
    lock = Lock(tmp_path / "cache")
    options = ["--teacher", teacher, "--dataset", rows, "--out", tmp_path / "cache"]
    process = warm.run("teacher", "build", *options, env=os.environ, timeout=120)
    lock.release()
    assert process.returncode == 1 and "another process is building this cache" in process.stderr
    assert not (tmp_path / ".cache.tokens").exists()
