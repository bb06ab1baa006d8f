"""`cache import` through the root command: vLLM's and DistillKit's shapes, and what is refused."""

import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data.imports import import_cache
from shared.cache.reader import Cache
from shared.cache.verify import verify_cache
from shared.errors import ConfigError, ResumeError
from tests.support import warm
from tests.support.student_cache import VOCABULARY, save_tokenizer

K = 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return directory


def documents():
    """Tokens and exact log-probabilities of three documents."""
    rng = np.random.default_rng(0)
    for length in (6, 1, 9):
        logits = rng.normal(0, 3, (length - 1, VOCABULARY))
        yield rng.integers(0, VOCABULARY, length), logits - np.log(np.exp(logits).sum(1, keepdims=True))


def vllm_row(tokens, logp, **more):
    positions = [None]
    for row, gold in zip(logp, tokens[1:], strict=True):
        order = np.argsort(-row, kind="stable")
        rank = {int(id): at + 1 for at, id in enumerate(order)}
        ids = list(dict.fromkeys([int(gold), *map(int, order[:K])]))
        entry = {str(i): {"logprob": float(row[i]), "rank": rank[i], "decoded_token": "x"} for i in ids}
        positions.append(entry)
    return {"prompt_token_ids": tokens.tolist(), "prompt_logprobs": positions, **more}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(file, tokenizer, out, *options):
    arguments = [file, "--tokenizer", tokenizer, "--teacher-name", "far/teacher", "--out", out, *options]
    return warm.run("cache", "import", *arguments, env=os.environ, timeout=120)


def assert_labels(cache, masks):
    assert verify_cache(cache.path) == []
    for number, (tokens, logp) in enumerate(documents()):
        assert np.array_equal(cache.tokens(number), tokens)
        assert cache.loss_mask(number).tolist() == masks[number]
        targets = cache.targets(number, 1.0)
        assert targets.k.tolist() == [K] * len(logp) + [0]
        for row, exact in enumerate(logp):
            order = np.argsort(-exact, kind="stable")
            assert targets.ids[row].tolist() == order[:K].tolist()
            np.testing.assert_allclose(targets.logp[row], exact[order[:K]], atol=0.15)
            np.testing.assert_allclose(targets.log_tail[row], np.log(np.exp(exact[order[K:]]).sum()), atol=0.15)


def test_vllms_rows(tokenizer, tmp_path):
    more = [{"id": "a", "prompt_tokens": 2}, {"id": "b"}, {"id": "c", "loss_mask": [0, 1] * 4 + [1]}]
    rows = [vllm_row(tokens, logp, **extra) for (tokens, logp), extra in zip(documents(), more, strict=True)]
    file = write(tmp_path / "rows.jsonl", rows)
    done = run(file, tokenizer, tmp_path / "c")
    assert done.returncode == 0, done.stderr
    assert "3 in 1 shards" in done.stdout
    cache = Cache(tmp_path / "c")
    masks = [[False, True, True, True, True, False], [False], [True, False] * 3 + [True, True, False]]
    assert_labels(cache, masks)
    assert [cache.meta(i)["id"] for i in range(3)] == ["a", "b", "c"]
    identity = cache.manifest.identity
    assert identity["declared"] is True and identity["teacher"]["name"] == "far/teacher"
    assert cache.temperatures == (1.0,) and cache.manifest.codec == "q"
    nll = [-logp[np.arange(len(logp)), tokens[1:]] for tokens, logp in documents()]  # known by the extra entry
    assert cache.statistics["teacher_nll_all_nats"] == pytest.approx(np.mean(np.concatenate(nll)), rel=1e-6)
    import_cache(file, cache.path, tokenizer=str(tokenizer), teacher_name="far/teacher")
    assert Cache(cache.path).manifest == cache.manifest
    write(file, rows[:2])
    with pytest.raises(ResumeError, match="begun with other sources"):
        import_cache(file, cache.path, tokenizer=str(tokenizer), teacher_name="far/teacher")


def sglang_row(tokens, logp, **more):
    def entry(row, id):
        return [float(row[id]), int(id), None]

    tops = [[entry(row, id) for id in np.argsort(-row, kind="stable")[:K]] for row in logp]
    given = [entry(row, id) for row, id in zip(logp, tokens[1:], strict=True)]
    meta = {"prompt_tokens": len(tokens), "input_top_logprobs": [None, *tops]}
    return {"text": "x", "meta_info": meta | {"input_token_logprobs": [[None, int(tokens[0]), None], *given]}, **more}


@pytest.mark.parametrize("nested", [True, False])
def test_sglangs_rows(tokenizer, tmp_path, nested):
    rows = [sglang_row(tokens, logp, id=str(number)) for number, (tokens, logp) in enumerate(documents())]
    if not nested:
        names = ("input_token_logprobs", "input_top_logprobs")
        rows = [{"id": row["id"], **{name: row["meta_info"][name] for name in names}} for row in rows]
    import_cache(write(tmp_path / "rows.jsonl", rows), tmp_path / "c", tokenizer=str(tokenizer), teacher_name="t")
    cache = Cache(tmp_path / "c")
    assert_labels(cache, [[True] * (len(tokens) - 1) + [False] for tokens, _ in documents()])
    nll = [-logp[np.arange(len(logp)), tokens[1:]] for tokens, logp in documents()]
    assert cache.statistics["teacher_nll_all_nats"] == pytest.approx(np.mean(np.concatenate(nll)), rel=1e-6)


def test_sglangs_rows_are_whole_also_where_each_ends_in_the_next_token(tokenizer, tmp_path):
    logp = np.full((2, VOCABULARY), -20.0)
    logp[:, [7, 8, 9]] = np.log([0.5, 0.25, 0.125])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "K", 3)
        row = sglang_row(np.array([5, 9, 9]), logp)
    import_cache(write(tmp_path / "rows.jsonl", [row]), tmp_path / "c", tokenizer=str(tokenizer), teacher_name="t")
    assert Cache(tmp_path / "c").targets(0, 1.0).k.tolist() == [3, 3, 0]


@pytest.mark.parametrize("cut", [0, 1])
def test_distillkits_rows(tokenizer, tmp_path, cut):
    columns = {"input_ids": [], "token_ids": [], "top_values": []}
    for tokens, logp in documents():
        padded = np.concatenate([logp, logp[:1] if len(logp) else np.log(np.full((1, VOCABULARY), 1 / VOCABULARY))])
        ids = np.argsort(-padded, axis=1, kind="stable")[: len(tokens) - cut, :K]
        columns["input_ids"].append(tokens.tolist())
        columns["token_ids"].append(ids.tolist())
        columns["top_values"].append(np.take_along_axis(padded[: len(ids)], ids, 1).tolist())
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    import_cache(tmp_path / "rows.parquet", tmp_path / "c", tokenizer=str(tokenizer), teacher_name="t")
    cache = Cache(tmp_path / "c")
    assert_labels(cache, [[True] * (len(tokens) - 1) + [False] for tokens, _ in documents()])
    assert cache.statistics["teacher_nll_nats"] is None
    with pytest.raises(ResumeError, match="another teacher"):
        import_cache(tmp_path / "rows.parquet", tmp_path / "c", tokenizer=str(tokenizer), teacher_name="u")


def test_rows_of_unequal_lengths_and_any_id(tokenizer, tmp_path):
    ids, values = [[5, 6, 7], [6, 7]], [[-0.5, -2.0, -3.0], [-0.3, -3.0]]
    document = {"input_ids": [1, 5, 6], "token_ids": ids, "top_values": values}
    file = write(tmp_path / "rows.jsonl", [document | {"id": "a\ud800"}, document | {"id": None}, document])
    import_cache(file, tmp_path / "c", tokenizer=str(tokenizer), teacher_name="t")
    cache = Cache(tmp_path / "c")
    assert [cache.meta(number)["id"] for number in range(3)] == ["a\ud800", "2", "3"]
    assert cache.manifest.top_k == 3  # the third entry is no extra one: only vLLM has such
    assert cache.targets(0, 1.0).k.tolist() == [3, 2, 0]
    assert verify_cache(cache.path) == []


LOGPROBS = (-0.5, -1.5, -2.5, -3.5)
TOP = (10, 20, 30, 40)


def entries(ids=TOP, *, extra=None, ranks=(1, 2, 3, 4), extra_logprob=-6.0, extra_rank=9):
    """A position of vLLM's with k = len(ids), and one entry more where the next token is outside."""
    found = {str(i): {"logprob": lp, "rank": r} for i, lp, r in zip(ids, LOGPROBS, ranks, strict=False)}
    return found | ({str(extra): {"logprob": extra_logprob, "rank": extra_rank}} if extra else {})


INSIDE = {"id": "inside", "prompt_token_ids": [5, 10, 20], "prompt_logprobs": [None, entries(), entries()]}
TIED = entries(ranks=(1, 2, 3, 5))  # the 4th ties with an id that was cut: vLLM's rank counts both


@pytest.mark.parametrize(
    ("rows", "lengths", "printed"),
    [
        pytest.param(
            [{"prompt_token_ids": [5, 10, 40, 50], "prompt_logprobs": [None, entries(), TIED, entries(extra=50)]}],
            [[4, 4, 4, 0]],
            "1 of 3 rows",
            id="a tie beside a row with the extra entry",
        ),
        pytest.param(
            [INSIDE, {"prompt_token_ids": [5, 40], "prompt_logprobs": [None, TIED]}],
            [[4, 4, 0], [4, 0]],
            None,
            id="a tie in a document that leaves two k, which another document decides",
        ),
        pytest.param(
            [INSIDE, {"prompt_token_ids": [5, 50], "prompt_logprobs": [None, entries(extra=50)]}],
            [[4, 4, 0], [4, 0]],
            "1 of 3 rows",
            id="an extra entry in a document that leaves two k, which another document decides",
        ),
        pytest.param(
            [{"prompt_token_ids": [5, 50, 60], "prompt_logprobs": [None, entries(extra=50), entries(extra=60)]}],
            [[4, 4, 0]],
            "2 of 2 rows",
            id="a file in which every row has the extra entry",
        ),
        pytest.param(
            [{"prompt_token_ids": [5, 40, 40], "prompt_logprobs": [None, entries(), entries()]}],
            [[4, 4, 0]],
            None,
            id="a file in which every next token is the last of its row by rank",
        ),
        pytest.param(
            [
                INSIDE,
                {"prompt_token_ids": [5, 10, 50],
                 "prompt_logprobs": [None, entries((10, 20)), entries((10, 20), extra=50)]},
            ],
            [[4, 4, 0], [2, 2, 0]],
            "1 of 4 rows",
            id="two documents of unequal k",
        ),
        pytest.param(
            [
                {"prompt_token_ids": [5, 10, 7],
                 "prompt_logprobs": [None, entries(), entries(extra=7, extra_logprob=-3.5, extra_rank=6)]},
            ],
            [[4, 4, 0]],
            "1 of 2 rows",
            id="an extra entry that ties with the last of the k, and has the smaller id",
        ),
        pytest.param(
            [
                {"prompt_token_ids": [5, 10, 10, 30],
                 "prompt_logprobs": [None, entries((10,)), entries((10, 20, 30)), entries((10, 20, 30))]},
            ],
            [[1, 3, 3, 0]],
            None,
            id="rows that no one k explains",
        ),
    ],
)  # fmt: skip
def test_vllms_extra_entry_is_known_by_the_number_of_entries(tokenizer, tmp_path, capsys, rows, lengths, printed):
    import_cache(write(tmp_path / "rows.jsonl", rows), tmp_path / "c", tokenizer=str(tokenizer), teacher_name="t")
    cache = Cache(tmp_path / "c")
    assert cache.manifest.top_k == max(max(of_document) for of_document in lengths)
    for number, of_document in enumerate(lengths):
        targets = cache.targets(number, 1.0)
        assert targets.k.tolist() == of_document
        for row, length in enumerate(of_document):
            assert targets.ids[row][:length].tolist() == list(TOP[:length])
    lines = capsys.readouterr().err.splitlines()
    said = [line.partition(" held")[0] for line in lines if "on top of the most likely ids" in line]
    assert said == ([f"rows.jsonl: {printed}"] if printed else [])
    gold = [
        p[str(t)]["logprob"]
        for r in rows
        for t, p in zip(r["prompt_token_ids"][1:], r["prompt_logprobs"][1:], strict=True)
    ]
    assert cache.statistics["teacher_nll_all_nats"] == pytest.approx(-np.mean(gold), rel=1e-6)


def test_entries_beyond_the_top_k_asked_for_are_counted(tokenizer, tmp_path):
    rows = [INSIDE, {"prompt_token_ids": [5, 10, 50], "prompt_logprobs": [None, entries(), entries(extra=50)]}]
    done = run(write(tmp_path / "rows.jsonl", rows), tokenizer, tmp_path / "c", "--top-k", "3")
    assert "rows.jsonl: 1 of 4 rows held the next token" in done.stderr
    assert "rows.jsonl: 4 entries beyond --top-k 3 are left out" in done.stderr
    assert Cache(tmp_path / "c").targets(1, 1.0).k.tolist() == [3, 3, 0]


ROW = {"prompt_token_ids": [5, 6], "prompt_logprobs": [None, {"6": {"logprob": -0.5, "rank": 1}}]}


SGLANG = {
    "input_token_logprobs": [[None, 5, None], [-0.5, 6, None]],
    "input_top_logprobs": [None, [[-0.5, 6, None]]],
}


def changed(**fields):
    return ROW | fields


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (changed(prompt_token_ids=[5, VOCABULARY]), r"prompt_token_ids\[1\]'.*from 0 to 256; got: 257"),
        (changed(prompt_token_ids=[5, "6"]), r"prompt_token_ids\[1\]'.*got: '6'"),
        (changed(prompt_token_ids=[5, True]), r"prompt_token_ids\[1\]'.*got: True"),
        (changed(prompt_token_ids=[]), "at least one token id"),
        (changed(prompt_token_ids=None), "a list of token ids; got: none"),
        (changed(prompt_token_ids=[5, 6, 7]), r"'prompt_logprobs'; expected: a list of 3 positions.*got: 2"),
        (changed(prompt_logprobs=[{}, None]), r"prompt_logprobs\[0\]'; expected: null"),
        (changed(prompt_logprobs=[None, None]), r"prompt_logprobs\[1\]'; expected: an object"),
        (changed(prompt_logprobs=[None, {}]), r"prompt_logprobs\[1\]'"),
        (changed(prompt_logprobs=[None, {"x": {"logprob": -1}}]), r"prompt_logprobs\[1\]'.*got: 'x'"),
        (changed(prompt_logprobs=[None, {"257": {"logprob": -1}}]), r"prompt_logprobs\[1\]'.*got: '257'"),
        (changed(prompt_logprobs=[None, {"9" * 5000: {"logprob": -1}}]), r"prompt_logprobs\[1\]'.*got: '999"),
        (changed(prompt_logprobs=[None, {"6": {"logprob": -1}, "06": {"logprob": -2}}]), "in two spellings"),
        (changed(prompt_logprobs=[None, {"6": -1}]), r"prompt_logprobs\[1\]\.6'; expected: an object"),
        (changed(prompt_logprobs=[None, {"6": {"logprob": "-1"}}]), r"\[1\]\.6\.logprob'.*got: '-1'"),
        (changed(prompt_logprobs=[None, {"6": {"logprob": -(10**400)}}]), r"\.logprob'.*at most 0; got: -1000"),
        (changed(prompt_logprobs=[None, {"6": {"logprob": None}}]), r"\.logprob'.*got: None"),
        (changed(prompt_logprobs=[None, {"6": {"logprob": 0.5}}]), r"at most 0; got: 0\.5"),
        (changed(prompt_logprobs=[None, {"6": {"logprob": -1, "rank": 0}}]), r"rank'.*got: 0"),
        (
            changed(prompt_logprobs=[None, {"6": {"logprob": -0.1}, "7": {"logprob": -0.1}}]),
            r"\[1\]'.*add up to 1.*got: 1\.8097",
        ),
        (
            changed(prompt_logprobs=[None, {"6": {"logprob": -3, "rank": 7}}]),
            r"own entry only.*line 2, field 'prompt_logprobs\[1\]'.*K of at least 1",
        ),
        ({"input_ids": [5, 6], "token_ids": [[]], "top_values": [[]]}, r"token_ids\[0\]'.*at least one id; got: none"),
        (changed(loss_mask=[1]), r"'loss_mask'; expected: 2 values"),
        (changed(prompt_tokens=3), r"'prompt_tokens'; expected: 0 to 2; got: 3"),
        ({"input_ids": [5, 6]}, "'token_ids'; expected: a list of 1 rows for 2 tokens"),
        ({"input_ids": [5, 6], "token_ids": [[1]], "top_values": [[-1, -2]]}, r"top_values\[0\]'.*1; got: 2"),
        ({"meta_info": 5}, r"input_token_logprobs'; expected: a list of at least one \[logprob, id, text\]; got: None"),
        (
            {"meta_info": SGLANG | {"input_top_logprobs": [None]}},
            r"input_top_logprobs'; expected: a list of 2 rows.*got: 1",
        ),
        ({"meta_info": SGLANG | {"prompt_tokens": 9}}, r"all 9 tokens of the prompt: .*logprob_start_len=0; got: 2"),
        (
            {"meta_info": SGLANG | {"input_top_logprobs": [[[-1, 5]], [[-1, 6]]]}},
            r"input_top_logprobs\[0\]'; expected: null",
        ),
        ({"meta_info": SGLANG | {"input_top_logprobs": [None, []]}}, r"input_top_logprobs\[1\]'; expected: a list"),
        ({"meta_info": SGLANG | {"input_top_logprobs": [None, [[-1, 257]]]}}, r"\[1\]\[0\]\[1\]'.*0 to 256; got: 257"),
        ({"meta_info": SGLANG | {"input_top_logprobs": [None, [["-1", 6]]]}}, r"\[1\]\[0\]\[0\]'.*got: '-1'"),
        ({"meta_info": SGLANG | {"input_top_logprobs": [None, [6]]}}, r"\[1\]\[0\]'; expected: \[logprob, id, text\]"),
        (
            {"meta_info": SGLANG | {"input_top_logprobs": [None, [[-0.1, 6, "x"], [-0.1, 7, "y"]]]}},
            r"input_top_logprobs\[1\]'.*add up to 1.*got: 1\.8097",
        ),
        ({"input_ids": [5, 6], "compressed_logprobs": [[1]], "bytepacked_indices": [[1]]}, "uncompressed rows"),
    ],
)
def test_malformed_rows_are_refused_by_line_and_field(tokenizer, tmp_path, row, message):
    file = write(tmp_path / "rows.jsonl", [ROW, row])
    with pytest.raises(ConfigError, match=message) as caught:
        import_cache(file, tmp_path / "c", tokenizer=str(tokenizer), teacher_name="t")
    assert "rows.jsonl, line 2" in str(caught.value)


def test_a_file_of_nothing(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="an empty data set"):
        import_cache(write(tmp_path / "rows.jsonl", []), tmp_path / "c", tokenizer=str(tokenizer), teacher_name="t")
    with pytest.raises(ConfigError, match="cannot read a data file"):
        import_cache(tmp_path / "none.jsonl", tmp_path / "c", tokenizer=str(tokenizer), teacher_name="t")
    assert not (tmp_path / "c").exists()
