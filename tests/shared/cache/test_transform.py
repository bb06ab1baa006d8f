"""`cache merge` and `cache slice`: documents, bytes, statistics and identities of what comes out."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.cache.attach import add_files
from shared.cache.cli import cache as command
from shared.cache.identity import label_identity
from shared.cache.reader import Cache
from shared.cache.repair import repair_cache
from shared.cache.transform import merge_caches, slice_cache
from shared.cache.verify import verify_cache
from shared.cache.writer import CacheWriter
from shared.errors import CacheCorruptError, CacheFormatError, CacheMismatchError, ConfigError
from tests.support.cache_faults import contents, fast_folder, killed_at
from tests.support.cache_rows import GRID, IDENTITY, build_options, shard_of_logits

V, K = 40, 6


class Killed(BaseException):
    """Stands for SIGKILL."""


def rows_of(seed):
    """A document as its rows; equal seeds are equal documents."""
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, 9))
    return rng.normal(0, 3, (length, V)).astype(np.float32), rng.integers(0, V, length)


def make(path, shards, *, name="made", identity=IDENTITY, **changes):
    """A cache of documents by seed, one list per shard."""
    with CacheWriter(
        path, build_options(top_k=K, head_width=V, tokenizer_size=V, num_shards=len(shards), **changes)
    ) as w:
        for number, seeds in enumerate(shards):
            parts = [rows_of(seed) for seed in seeds]
            lengths = [len(tokens) for _, tokens in parts]
            logits, tokens = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
            arrays = shard_of_logits(logits, lengths, np.full(len(tokens), K), tokens)
            metas = [{"id": f"{name}/{s}", "source": name, "digest": f"{s:064x}", "target_bytes": 1} for s in seeds]
            w.write_shard(number, replace(arrays, doc_meta=metas))
        (path / "tokenizer").mkdir(exist_ok=True)
        (path / "tokenizer" / "tokenizer.json").write_text("{}")
        total = sum(map(len, shards))
        w.finish(identity, [{"name": name, "split": "train", "digest": name, "num_documents": total}])
    return path


def seeds_of(path):
    cache = Cache(path)
    return [int(cache.meta(i)["digest"], 16) for i in range(cache.num_documents)]


def assert_rows_equal(ours, our_doc, theirs, their_doc):
    assert np.array_equal(ours.tokens(our_doc), theirs.tokens(their_doc))
    assert np.array_equal(ours.loss_mask(our_doc), theirs.loss_mask(their_doc))
    for T in GRID:
        a, b = ours.targets(our_doc, T), theirs.targets(their_doc, T)
        for field in ("k", "ids", "logp", "log_tail"):
            assert np.array_equal(getattr(a, field), getattr(b, field)), field


@pytest.mark.parametrize("codec", ["f16", "q"])
def test_shards_are_copied_and_duplicates_kept_once(tmp_path, codec):
    a = make(tmp_path / "a", [[1, 2], [3, 3]], name="a", codec=codec)
    b = make(tmp_path / "b", [[2, 3], [4, 1, 5], [6]], name="b", codec=codec)
    add_files(b, {"teacher_eval/score.json": b"{}"})
    assert merge_caches([a, b], tmp_path / "c") == 3
    assert verify_cache(tmp_path / "c") == []
    c = Cache(tmp_path / "c")
    assert seeds_of(tmp_path / "c") == [1, 2, 3, 3, 4, 5, 6]  # twice in one cache is no matter of merging
    out = contents(tmp_path / "c")
    assert out["shard-00000.h5"] == contents(a)["shard-00000.h5"]
    assert out["shard-00003.h5"] == contents(b)["shard-00002.h5"]
    assert out["teacher_eval/score.json"] == b"{}" and out["tokenizer/tokenizer.json"] == b"{}"
    ours, theirs = Cache(a), Cache(b)
    for doc, (cache, number) in enumerate(
        [(ours, 0), (ours, 1), (ours, 2), (ours, 3), (theirs, 2), (theirs, 4), (theirs, 5)]
    ):
        assert_rows_equal(c, doc, cache, number)
        assert c.meta(doc) == cache.meta(number)
    assert c.label_identity == ours.label_identity
    assert [source["name"] for source in c.manifest.sources] == ["a", "b"]
    assert c.manifest.derived_from["num_duplicates"] == 3
    records = [json.loads(out[f"shard-0000{i}.json"]) for i in range(4)]
    assert c.manifest.documents_per_shard == [len(record["documents"]) for record in records] == [2, 2, 2, 1]
    assert records[2]["documents"] == ["b/4", "b/5"]
    assert (
        records[2]["statistics"]["codec_kl_nats"]
        == json.loads(contents(b)["shard-00001.json"])["statistics"]["codec_kl_nats"]
    )
    assert c.statistics["teacher_nll_nats"] is None  # the rows of one shard do not tell


def test_statistics_without_duplicates_are_those_of_one_build(tmp_path):
    a, b = make(tmp_path / "a", [[1, 2], [3]]), make(tmp_path / "b", [[4], [5, 6]])
    merge_caches([a, b], tmp_path / "c")
    whole = make(tmp_path / "whole", [[1, 2], [3], [4], [5, 6]])
    assert Cache(tmp_path / "c").statistics == Cache(whole).statistics
    for shard in range(4):
        assert contents(tmp_path / "c")[f"shard-0000{shard}.h5"] == contents(whole)[f"shard-0000{shard}.h5"]
        assert contents(tmp_path / "c")[f"shard-0000{shard}.json"] == contents(whole)[f"shard-0000{shard}.json"]


def test_other_labels_are_refused_by_name(tmp_path):
    a = make(tmp_path / "a", [[1]])
    other = IDENTITY | {"teacher": IDENTITY["teacher"] | {"weights_digest": "zz"}, "labels": {"top_k": 9}}
    b = make(tmp_path / "b", [[2]], identity=other)
    with pytest.raises(CacheMismatchError) as caught:
        merge_caches([a, b], tmp_path / "c")
    message = str(caught.value)
    assert f"the labels of {a} and {b} differ in labels.top_k, teacher.weights_digest" in message
    assert (
        "expected: labels.top_k 4, teacher.weights_digest aa; got: labels.top_k 9, teacher.weights_digest zz" in message
    )
    with pytest.raises(CacheFormatError, match="no such folder"):
        merge_caches([a, tmp_path / "nowhere"], tmp_path / "c")
    with pytest.raises(ConfigError, match="two caches or more"):
        merge_caches([a], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_damaged_input_is_named(tmp_path):
    a, b = make(tmp_path / "a", [[1]]), make(tmp_path / "b", [[2]])
    data = bytearray((b / "shard-00000.h5").read_bytes())
    data[-1] ^= 1
    (b / "shard-00000.h5").write_bytes(data)
    with pytest.raises(CacheCorruptError, match=r"bytes have changed; where: .*b/shard-00000\.h5"):
        merge_caches([a, b], tmp_path / "c")


@pytest.fixture
def folder():
    with fast_folder() as folder:
        yield folder


@pytest.mark.parametrize("work", ["merge", "slice"])
def test_killed_at_any_boundary_the_same_command_ends_equal(folder, work):
    a, b = make(folder / "a", [[1, 2]]), make(folder / "b", [[2, 3]])

    def run(out):
        if work == "merge":
            merge_caches([a, b], out)
        else:
            slice_cache(a, out, top_k=3)

    run(folder / "whole")
    expected = contents(folder / "whole")
    for boundary in itertools.count(0, 3):
        path = folder / f"killed-{boundary}"
        killed = killed_at(boundary, run, path)
        run(path)
        assert contents(path) == expected, boundary
        if not killed:
            break
    assert boundary > 15


@pytest.mark.parametrize("codec", ["f16", "q"])
def test_a_slice_merges_what_it_drops_into_the_tail(tmp_path, codec):
    a = make(tmp_path / "a", [[1, 2], [3]], codec=codec)
    slice_cache(a, tmp_path / "s", top_k=2)
    assert verify_cache(tmp_path / "s") == []
    whole, cut = Cache(a), Cache(tmp_path / "s")
    assert cut.manifest.top_k == 2 and cut.width == 2
    for doc in range(3):
        for T in GRID:
            many, few = whole.targets(doc, T), cut.targets(doc, T)
            rows = many.k > 0
            assert np.array_equal(few.k[rows], np.full(rows.sum(), 2))
            assert np.array_equal(few.ids[rows], many.ids[rows, :2])
            tail = np.logaddexp(np.logaddexp.reduce(many.logp[rows, 2:], axis=1), many.log_tail[rows])
            # The margins are kept exactly, the tail to its step of 1/16 nat beside the head.
            head = many.logp[rows, :1] - many.logp[rows, :2]
            np.testing.assert_allclose(few.logp[rows, :1] - few.logp[rows], head, atol=1e-5)
            relative = few.log_tail[rows] - few.logp[rows, 0], tail - many.logp[rows, 0]
            np.testing.assert_allclose(*relative, atol=1 / 32 + 1e-5)
    labels = cut.manifest.identity["labels"]
    assert labels == {"top_k": 2, "derived_from": whole.label_identity}
    assert cut.label_identity == label_identity(cut.manifest.identity) != whole.label_identity
    assert cut.statistics["teacher_nll_nats"] == whole.statistics["teacher_nll_nats"]
    assert cut.manifest.derived_from["codec_kl_nats"] == whole.statistics["codec_kl_nats"]
    assert cut.statistics["gold_in_topk"] < whole.statistics["gold_in_topk"]


def test_fewer_documents_keep_the_label_identity(tmp_path):
    a, b = make(tmp_path / "a", [[1, 2], [3]], name="a"), make(tmp_path / "b", [[4, 5]], name="b")
    merge_caches([a, b], tmp_path / "c")
    slice_cache(tmp_path / "c", tmp_path / "first", documents=3)
    slice_cache(tmp_path / "c", tmp_path / "one", documents=1, source="b")
    assert seeds_of(tmp_path / "first") == [1, 2, 3] and seeds_of(tmp_path / "one") == [4]
    for name in ("first", "one"):
        assert Cache(tmp_path / name).label_identity == Cache(a).label_identity
        assert verify_cache(tmp_path / name) == []
    assert contents(tmp_path / "first")["shard-00000.h5"] == contents(a)["shard-00000.h5"]
    assert [s["name"] for s in Cache(tmp_path / "one").manifest.sources] == ["b"]
    merge_caches([tmp_path / "first", b], tmp_path / "again")
    for name in ("shard-00000.h5", "shard-00001.h5", "shard-00002.h5"):
        assert contents(tmp_path / "again")[name] == contents(tmp_path / "c")[name]


def test_what_a_cache_was_made_from_survives_merging_and_slicing(tmp_path):
    """`info` says what its encoding KL is measured against, whatever was done since the rows were cut."""
    a, b = make(tmp_path / "a", [[1, 2]]), make(tmp_path / "b", [[3]])
    for path in (a, b):
        slice_cache(path, path.with_name(f"{path.name}2"), top_k=2)
    merge_caches([tmp_path / "a2", tmp_path / "b2"], tmp_path / "merged")
    slice_cache(tmp_path / "merged", tmp_path / "first", documents=2)
    told = Cache(tmp_path / "first").manifest.derived_from
    assert "codec_kl_nats" not in told  # these rows are as they were
    for path, cut in zip((a, b), told["inputs"][0]["derived_from"]["inputs"], strict=True):
        assert cut["derived_from"]["codec_kl_nats"] == Cache(path).statistics["codec_kl_nats"]
    for name, derived in (("a", False), ("a2", True), ("merged", True), ("first", True)):
        text = CliRunner().invoke(command, ["info", str(tmp_path / name)]).stdout
        assert ("KL is measured against the rows it was cut from" in text) == derived


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=3), min_size=1, max_size=3),
    st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(1, 18),
)
def test_merging_and_slicing_agree_with_lists(tmp_path_factory, first, second, count):
    path = tmp_path_factory.mktemp("c")
    make(path / "a", first, name="a")
    make(path / "b", second, name="b")
    num_duplicates = merge_caches([path / "a", path / "b"], path / "c")
    held = [seed for shard in first for seed in shard]
    new = [seed for shard in second for seed in shard]
    assert seeds_of(path / "c") == held + [seed for seed in new if seed not in held]
    assert num_duplicates == sum(seed in held for seed in new)
    slice_cache(path / "c", path / "s", documents=count)
    assert seeds_of(path / "s") == seeds_of(path / "c")[:count]
    ours, whole = Cache(path / "s"), Cache(path / "c")
    for doc in range(ours.num_documents):
        assert_rows_equal(ours, doc, whole, doc)


def test_slices_that_keep_nothing_are_refused(tmp_path):
    a = make(tmp_path / "a", [[1]])
    for options, message in [
        ({"top_k": 0}, "1 to the cache's 6"),
        ({"top_k": 7}, "1 to the cache's 6; got: 7"),
        ({"top_p": 1.5}, "top-p"),
        ({"documents": 0}, "nothing would be kept"),
        ({"source": "x"}, "no such source.*expected: made; got: x"),
    ]:
        with pytest.raises(ConfigError, match=message):
            slice_cache(a, tmp_path / "s", **options)
    with pytest.raises(CacheFormatError, match="unknown codec"):
        slice_cache(a, tmp_path / "s", codec="zip")
    assert not (tmp_path / "s").exists()


def test_the_commands(tmp_path):
    a, b = make(tmp_path / "a", [[1, 2]]), make(tmp_path / "b", [[2, 3]])
    run = CliRunner().invoke
    done = run(command, ["merge", str(a), str(b), "--out", str(tmp_path / "c")])
    assert done.exit_code == 0 and "1 documents were in an earlier cache and are kept once" in done.stdout
    done = run(command, ["slice", str(tmp_path / "c"), "--top-p", "0.5", "--codec", "q", "--out", str(tmp_path / "s")])
    assert done.exit_code == 0 and "3 in 2 shards" in done.stdout
    assert Cache(tmp_path / "s").manifest.identity["labels"] == {
        "top_k": 4, "top_p": 0.5, "codec": "q", "derived_from": Cache(a).label_identity
    }  # fmt: skip


def test_a_damaged_merge_is_made_again_by_the_same_merge(tmp_path):
    a, b = make(tmp_path / "a", [[1, 2]]), make(tmp_path / "b", [[2, 3]])
    merge_caches([a, b], tmp_path / "c")
    before = contents(tmp_path / "c")
    (tmp_path / "c" / "shard-00001.h5").write_bytes(b"")
    (tmp_path / "c" / "tokenizer" / "tokenizer.json").unlink()
    lines = repair_cache(tmp_path / "c")
    assert lines == [
        "tokenizer/tokenizer.json: missing; removed: the same `codedistill cache merge` writes it again",
        'shard-00001: damaged; removed, with documents ["made/3"]: the same `codedistill cache merge` makes it again',
    ]
    merge_caches([a, b], tmp_path / "c")
    assert contents(tmp_path / "c") == before
