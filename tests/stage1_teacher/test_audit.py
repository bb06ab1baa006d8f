"""`cache audit`: a true cache passes, and whatever is not the named teacher's is found, by document and position."""

import hashlib
import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from shared.cache.directory import list_files
from shared.cache.encode import encode_shard
from shared.cache.format import shard_name
from shared.cache.identity import label_identity
from shared.cache.manifest import FileEntry, read_manifest, write_manifest, write_record
from shared.cache.reader import Cache
from shared.cache.rows import exact, gold_in_rows
from shared.cache.verify import verify_cache
from stage1_teacher.cli import audit as command
from tests.stage1_teacher.test_build import build
from tests.support import warm
from tests.support.small_teacher import save_teacher


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture
def cache(teacher, rows, tmp_path):
    return build(teacher, rows, tmp_path / "cache", "--dtype", "bfloat16", "--top-k", "20", "--batch-tokens", "128")[0]


def audit(path, teacher, *options):
    """Exit code and JSON of an audit of all documents."""
    result = CliRunner().invoke(
        command, [str(path), "--teacher", str(teacher), "--documents", "99", "--json", *options]
    )
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, json.loads(result.stdout, parse_constant=pytest.fail)


def altered(cache, change, identity=None):
    """A copy of a cache, sealed again after `change(arrays)` of its first shard's rows."""
    path = cache.path.with_name("altered")
    shutil.copytree(cache.path, path)
    arrays = exact(cache.load_shard(0), cache.temperatures)
    arrays = change(arrays)
    arrays = replace(arrays, gold_in_topk=gold_in_rows(arrays.tokens, arrays.k, arrays.topk_ids))
    image, statistics = encode_shard(arrays, **cache.manifest.head_options)
    (path / f"{shard_name(0)}.h5").write_bytes(image)
    entry = FileEntry(bytes=len(image), sha256=hashlib.sha256(image).hexdigest())
    write_record(path, replace(cache.record(0), statistics=statistics, bytes=entry.bytes, sha256=entry.sha256))
    manifest = read_manifest(path)
    if identity is not None:
        manifest = replace(manifest, identity=identity, label_identity=label_identity(identity))
    write_manifest(path, replace(manifest, files=list_files(path)))
    assert verify_cache(path) == []
    return path


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "options",
    [["--samples", "3"], ["--codec", "f16", "--samples", "3", "--samples-from", "tail"], ["--top-p", "0.9"]],
    ids=" ".join,
)
def test_a_true_cache_passes(teacher, rows, tmp_path, options, dtype):
    cache, _ = build(teacher, rows, tmp_path / "cache", "--dtype", dtype, "--top-k", "20", *options)
    code, found = audit(cache.path, teacher)
    assert (code, found["passed"], found["digests_that_differ"], found["declared"]) == (0, True, [], False)
    assert (found["documents"], found["rows"], found["dtype"]) == (20, cache.num_tokens - 20, dtype)
    assert found["worst"]["deviation_logits"] < 1e-4  # the very batches of the build
    assert found["kl_nats"]["max"] <= 2.6e-3


def test_the_verdict_is_one_line(cache, teacher, tmp_path, tokenizer):
    result = CliRunner().invoke(command, [str(cache.path), "--teacher", str(teacher), "--documents", "3"])
    assert result.exit_code == 0
    assert re.match(rf"{cache.path}: its rows are those of {teacher}: 3 documents, \d+ rows; .*\n$", result.stdout)

    def other_seed(model):
        torch.manual_seed(1)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=float(parameter.std()))

    other = save_teacher(tmp_path / "other", tokenizer, width=len(tokenizer), change=other_seed)
    line = ["cache", "audit", cache.path, "--documents", 3, "--teacher", other]
    done = warm.run(*line, env=os.environ, timeout=200)
    assert done.returncode == 1
    assert "the digest of its weights differs, and" in done.stdout
    assert re.search(r"rows deviate, most at document '\d+', position \d+;", done.stdout)
    assert done.stdout.count("\n") == 1


def test_a_digest_that_differs_is_enough(cache, teacher, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved)
    config = moved / "config.json"
    config.write_text(config.read_text() + "\n")
    code, found = audit(cache.path, moved)
    assert (code, found["rows_pass"], found["digests_that_differ"]) == (1, True, ["config"])


def test_batches_that_are_not_known_stay_within_the_tolerance(cache, teacher):
    for shard in range(cache.num_shards):
        write_record(cache.path, replace(cache.record(shard), capture={}))
    write_manifest(cache.path, replace(cache.manifest, files=list_files(cache.path)))
    code, found = audit(cache.path, teacher)
    assert code == 0
    assert 0 <= found["worst"]["deviation_logits"] < found["worst"]["allowed_logits"]


def test_one_altered_row_is_named(cache, teacher):
    document, position = 2, 5

    def soften(arrays):
        margins = arrays.topk_margins.copy()
        row = int(arrays.doc_indptr[document]) + position
        first = int(arrays.row_indptr()[row])
        margins[first + 10 : first + 20] += 20.0
        tail_log = arrays.tail_log.copy()
        tail_log[row] = -np.inf  # a heavier one would be refused
        return replace(arrays, topk_margins=margins, tail_log=tail_log)

    code, found = audit(altered(cache, soften), teacher)
    assert (code, found["rows_that_deviate"], found["digests_that_differ"]) == (1, 1, [])
    assert (found["worst"]["document"], found["worst"]["position"]) == (cache.meta(document)["id"], position)
    assert found["worst"]["deviation_logits"] > 19


def test_shifted_rows_are_found(cache, teacher):
    def shift(arrays):
        """Each document's first row moves behind its second."""
        order = np.arange(len(arrays.tokens))
        for start in arrays.doc_indptr[:-1]:
            order[[start, start + 1]] = order[[start + 1, start]]
        begins = arrays.row_indptr()
        entries = np.concatenate([np.arange(begins[row], begins[row + 1]) for row in order])
        return replace(
            arrays,
            k=arrays.k[order],
            topk_ids=arrays.topk_ids[entries],
            topk_margins=arrays.topk_margins[entries],
            tail_log=arrays.tail_log[order],
        )

    code, found = audit(altered(cache, shift), teacher)
    assert code == 1
    documents = len(np.flatnonzero(np.arange(cache.num_documents) < cache.shard_indptr[1]))
    assert 0 < found["rows_that_deviate"] <= 2 * documents


def test_a_declared_teacher_is_called_so_and_its_rows_decide(cache, teacher):
    identity = cache.manifest.identity
    teacher_told = {
        "name": "someone's",
        "weights_digest": "declared: someone's",
        "config_digest": "declared: someone's",
    }
    declared = identity | {"declared": True, "teacher": teacher_told}
    code, found = audit(altered(cache, lambda arrays: arrays, declared), teacher)
    assert (code, found["declared"], found["digests_that_differ"]) == (0, True, [])


def test_a_sample_is_chosen_by_its_seed(cache, teacher):
    one, two, again = (audit(cache.path, teacher, "--documents", "2", "--seed", seed)[1] for seed in ("1", "2", "1"))
    assert one == again
    assert one["documents"] == 2
    assert one["rows"] != two["rows"] or one["kl_nats"] != two["kl_nats"]


def test_what_cannot_be_audited_is_refused(cache, tmp_path, tokenizer):
    narrow = save_teacher(tmp_path / "narrow", tokenizer, width=len(tokenizer) - 8)
    result = CliRunner().invoke(command, [str(cache.path), "--teacher", str(narrow)])
    assert "the model's head is narrower than the cache's tokenizer" in str(result.exception)
    assert Cache(cache.path).num_documents == 20
