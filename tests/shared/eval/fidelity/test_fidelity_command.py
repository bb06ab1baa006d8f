"""`codedistill eval fidelity` on tiny models, against figures made one row at a time in float64."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from shared.cache.reader import Cache
from shared.checkpoints import load_model
from shared.cli import codedistill
from shared.errors import CacheMismatchError
from shared.eval.fidelity.measure import evaluate_fidelity
from tests.support.eval_models import save_model

PROMPTS = ["def add(a, b):", "for", "x = 1\nwhile x < 100:\n    x = x + add(x, x)", "print(name)", "a", "return b + a"]


@pytest.fixture(scope="module", autouse=True)
def no_tracking():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("student"), seed=1)


@pytest.fixture(scope="module")
def build(teacher, tmp_path_factory):
    """Build the teacher's cache by stage 1, in float32."""
    from stage1_teacher.cli import teacher as stage1

    def make(*options):
        folder = tmp_path_factory.mktemp("cache")
        rows = [{"prompt": prompt, "completion": f" {prompt}[{i}]\n" * (i + 1)} for i, prompt in enumerate(PROMPTS)]
        (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ["build", "--teacher", str(teacher), "--dataset", str(folder / "docs.jsonl"), "--split", "train"]
        command += ["--out", str(folder / "cache"), "--shard-tokens", "60", "--dtype", "float32", *options]
        done = CliRunner().invoke(stage1, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return folder / "cache"

    return make


@pytest.fixture(scope="module")
def cache(build):
    return build("--top-k", "8")


def expected_figures(student, cache_dir, teacher=None):
    """Every figure by its definition, row by row, from the models' float64 logits over whole documents."""
    models = [load_model(path, "float32")[0].double() for path in (student, teacher) if path]
    cache = Cache(cache_dir)
    nll, teacher_nll, forward, reverse, top1, top5, hits = [], [], [], [], [], [], []
    for doc in range(cache.num_documents):
        ids, targets = cache.tokens(doc), cache.targets(doc, 1.0)
        with torch.inference_mode():
            logq, *other = [
                m(torch.tensor(ids[None]), use_cache=False).logits[0].log_softmax(1).numpy() for m in models
            ]
        for row in np.flatnonzero(cache.loss_mask(doc)[:-1]):
            gold, q = ids[row + 1], np.exp(logq[row])
            order = np.lexsort((np.arange(len(q)), -logq[row]))
            nll.append(-logq[row, gold])
            hits.append((q.max(), order[0] == gold))
            k, head = targets.k[row], targets.ids[row, : targets.k[row]]
            if teacher:
                p = np.exp(other[0][row])
                head = np.lexsort((np.arange(len(p)), -p))
                k = len(head)
                teacher_nll.append(-other[0][row, gold])
            else:
                p = np.exp([*targets.logp[row, :k].astype(np.float64), targets.log_tail[row].astype(np.float64)])
                q = np.array([*q[head], np.delete(q, head).sum()])
            cells = (p > 0) & (q > 0)
            p, q = p[cells], q[cells]
            forward.append((p * np.log(p / q)).sum())
            reverse.append((q * np.log(q / p)).sum())
            m = min(5, k)
            top1.append(head[0] == order[0])
            top5.append(len({*head[:m]} & {*order[:m]}) / m)
    ece = 0.0
    for index in range(15):
        inside = [(c, hit) for c, hit in hits if index / 15 <= c < (index + 1) / 15]
        ece += abs(sum(hit - c for c, hit in inside)) / len(hits)
    return {
        "nll_nats": np.mean(nll),
        "bits_per_byte": np.sum(nll) / math.log(2) / cache.statistics["target_bytes"],
        "perplexity": math.exp(np.mean(nll)),
        "kl_to_teacher_nats": np.mean(forward),
        "reverse_kl_nats": np.mean(reverse),
        "top1_agreement": np.mean(top1),
        "top5_agreement": np.mean(top5),
        "ece": ece,
        "teacher_nll_nats": np.mean(teacher_nll) if teacher else cache.statistics["teacher_nll_nats"],
    }


def figures(result):
    return {name: getattr(result, name) for name in result.ci95}


@pytest.mark.parametrize("options", [("--top-k", "8"), ("--top-k", "16", "--top-p", "0.7"), ("--top-k", "3")],
                         ids=["k=8", "ragged", "k=3"])  # fmt: skip
def test_every_figure_equals_its_definition(build, student, options):
    cache = build(*options)
    result = evaluate_fidelity(student, cache, dtype="float32", batch_tokens=64)
    assert figures(result) == pytest.approx(expected_figures(student, cache), rel=2e-5)
    assert result.kl_kind == f"partition K={options[1]}"
    assert result.reasons == {}
    for name, interval in result.ci95.items():
        if name == "teacher_nll_nats":  # a figure of the manifest
            assert interval is None
        else:
            assert interval[0] < getattr(result, name) < interval[1] or name == "ece"


def test_the_teacher_beside_the_model_gives_the_dense_divergence(teacher, student, cache):
    result = evaluate_fidelity(student, cache, dtype="float32", batch_tokens=64, teacher_dir=teacher)
    assert figures(result) == pytest.approx(expected_figures(student, cache, teacher), rel=2e-5)
    assert result.kl_kind == "dense"
    assert result.teacher.path == str(teacher)
    assert result.teacher_nll_nats == pytest.approx(result.cache.teacher_nll_nats, rel=1e-5)
    partition = evaluate_fidelity(student, cache, dtype="float32", batch_tokens=64)
    assert partition.kl_to_teacher_nats < result.kl_to_teacher_nats
    assert partition.nll_nats == result.nll_nats
    assert partition.ece == result.ece


def test_a_cache_of_the_whole_vocabulary_is_dense(build, teacher, student):
    cache = build("--top-k", "287", "--codec", "f16")
    part, dense = (evaluate_fidelity(student, cache, dtype="float32", batch_tokens=64, teacher_dir=path)
                   for path in (None, teacher))  # fmt: skip
    for name in ("kl_to_teacher_nats", "reverse_kl_nats", "top1_agreement", "top5_agreement"):
        assert getattr(part, name) == pytest.approx(getattr(dense, name), rel=2e-3)


def test_the_sums_of_documents_make_the_figures(student, cache):
    result = evaluate_fidelity(student, cache, dtype="float32", batch_tokens=64)
    rows = result.per_document
    assert [row["id"] for row in rows] == [Cache(cache).meta(doc)["id"] for doc in range(len(PROMPTS))]
    total = {name: sum(row[name] for row in rows) for name in rows[0] if name != "id"}
    assert total["targets"] == result.num_targets == sum(b.count for b in result.ece_bins)
    assert total["target_bytes"] == result.target_bytes
    for figure, name in {
        "nll_nats": "nll_nats",
        "kl_to_teacher_nats": "kl_nats",
        "reverse_kl_nats": "reverse_kl_nats",
        "top1_agreement": "top1_agreed",
        "top5_agreement": "top5_overlap",
    }.items():
        assert total[name] / total["targets"] == pytest.approx(getattr(result, figure), rel=1e-12)
    ece = sum(b.count / total["targets"] * abs(b.accuracy - b.confidence)
              for b in result.ece_bins if b.count)  # fmt: skip
    assert ece == pytest.approx(result.ece, rel=1e-12)
    assert evaluate_fidelity(student, cache, dtype="float32", batch_tokens=64).ci95 == result.ci95


@pytest.mark.parametrize("run_teacher", [False, True])
def test_a_teacher_against_its_own_cache(teacher, cache, tmp_path, run_teacher):
    out = tmp_path / "new" / "fidelity.json"
    command = ["eval", "fidelity", "--model", str(teacher), "--cache", str(cache), "--out", str(out)]
    command += ["--batch-tokens", "64"] + (["--teacher", str(teacher)] if run_teacher else [])
    done = CliRunner().invoke(codedistill, command)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert result["top1_agreement"] == result["top5_agreement"] == 1.0
    assert abs(result["kl_to_teacher_nats"]) < 1e-4
    assert abs(result["reverse_kl_nats"]) < 1e-4
    assert result["nll_nats"] == pytest.approx(result["teacher_nll_nats"], abs=1e-5)
    assert result["reasons"] == {}


def test_another_teacher_than_the_cache_s_is_said(student, cache, capsys):
    evaluate_fidelity(student, cache, dtype="float32", batch_tokens=64, teacher_dir=student)
    assert "is it the same?" in capsys.readouterr().err


def test_another_tokenizer_is_refused(teacher, student, cache, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(teacher, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"add_prefix_space": false', '"add_prefix_space": true'))
    for model, beside in ((other, None), (student, other)):
        with pytest.raises(CacheMismatchError, match="tokenizer"):
            evaluate_fidelity(model, cache, dtype="auto", batch_tokens=64, teacher_dir=beside)


def test_a_model_of_few_positions_is_scored_piece_by_piece_and_its_teacher_sees_the_same(teacher, cache, tmp_path):
    short = save_model(tmp_path, positions=16)  # the teacher's weights: positions are rotary
    result = evaluate_fidelity(short, cache, dtype="float32", batch_tokens=64, teacher_dir=teacher)
    assert result.num_cut_documents > 0
    assert result.kl_to_teacher_nats == pytest.approx(0, abs=1e-6)
    assert result.top5_agreement == 1.0
