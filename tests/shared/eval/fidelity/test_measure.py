"""The figures of `eval fidelity` against float64 references."""

import json
import math

import numpy as np
import pytest
import torch

from shared.eval.bootstrap import percentile_interval, resample_sums
from shared.eval.fidelity.measure import Sums, figures_of, seen_in_training
from shared.eval.fidelity.rows import agreement, dense_rows, partition_rows, text_rows
from tests.support.student_cache import make_cache


def softmax(z):
    q = np.exp(z - z.max())
    return q / q.sum()


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def reference(z, k, ids, p, tail):
    """Both KLs of one row by the definition, in float64, over the explicit K+1 cells."""
    q, head = softmax(z), ids[:k]
    p, q = [*p[:k], tail], [*q[head], np.delete(q, head).sum()]
    return kl(p, q), kl(q, p)


def rows(seed, N=40, V=50, K=8):
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 6, (N, V))
    k = rng.integers(1, K + 1, N)
    ids = np.zeros((N, K), np.int64)
    logp = np.full((N, K), -np.inf)
    log_tail = np.full(N, -np.inf)
    for row in range(N):
        p = np.sort(rng.dirichlet(np.ones(k[row] + 1)))[::-1]
        ids[row, : k[row]] = rng.permutation(np.arange(1, V))[: k[row]]  # never 0, which pads
        logp[row, : k[row]], log_tail[row] = np.log(p[: k[row]]), np.log(p[-1])
    return z, rng.integers(0, V, N), k, ids, logp, log_tail


def as_tensors(z, k, ids, logp, log_tail):
    floats = [torch.tensor(a, dtype=torch.float32) for a in (z, logp, log_tail)]
    return floats[0], torch.tensor(k), torch.tensor(ids), floats[1], floats[2]


def test_partition_rows_equal_the_float64_reference():
    z, _, k, ids, logp, log_tail = rows(0)
    forward, reverse = partition_rows(*as_tensors(z, k, ids, logp, log_tail))
    expected = [reference(*row) for row in zip(z, k, ids, np.exp(logp), np.exp(log_tail), strict=True)]
    np.testing.assert_allclose(forward, [a for a, _ in expected], rtol=2e-6, atol=4e-6)
    np.testing.assert_allclose(reverse, [b for _, b in expected], rtol=2e-6, atol=4e-6)


def test_text_rows_equal_the_float64_reference():
    z, gold, *_ = rows(1)
    nll, confidence, correct = text_rows(torch.tensor(z, dtype=torch.float32), torch.tensor(gold))
    q = np.array([softmax(row) for row in z])
    np.testing.assert_allclose(nll, -np.log(q[np.arange(len(q)), gold]), rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(confidence, q.max(1), rtol=2e-6)
    np.testing.assert_array_equal(correct, z.argmax(1) == gold)


def test_dense_rows_equal_the_float64_reference_and_are_never_below_a_partition():
    z, _, k, ids, _, _ = rows(2)
    teacher = np.random.default_rng(3).normal(0, 4, z.shape)
    teacher[:, 7] = -np.inf  # an id that the teacher rules out
    forward, reverse = dense_rows(*(torch.tensor(a, dtype=torch.float32) for a in (z, teacher)))
    pairs = [(softmax(t), softmax(s)) for t, s in zip(teacher, z, strict=True)]
    np.testing.assert_allclose(forward, [kl(p, q) for p, q in pairs], rtol=2e-6, atol=4e-6)
    assert reverse.isposinf().all()
    teacher[:, 7] = -60
    pairs = [(softmax(t), softmax(s)) for t, s in zip(teacher, z, strict=True)]
    _, reverse = dense_rows(*(torch.tensor(a, dtype=torch.float32) for a in (z, teacher)))
    np.testing.assert_allclose(reverse, [kl(q, p) for p, q in pairs], rtol=2e-6, atol=4e-6)
    partition = [reference(s, n, i, p[i], 1 - p[i[:n]].sum())[0]
                 for s, n, i, (p, _) in zip(z, k, ids, pairs, strict=True)]  # fmt: skip
    assert (forward.numpy() > np.array(partition) - 1e-5).all()


def test_a_student_tail_of_1e_9_is_exact_where_one_minus_the_head_is_noise():
    z = torch.zeros(1, 1002)
    z[0, 2:] = -27.0
    target = [torch.tensor([[0.4, 0.4]]).log(), torch.tensor([0.2]).log()]
    forward, _ = partition_rows(z, torch.tensor([2]), torch.tensor([[0, 1]]), *target)
    q_tail = 1000 * np.exp(-27.0) / (2 + 1000 * np.exp(-27.0))
    expected = 0.8 * np.log(0.4 / ((1 - q_tail) / 2)) + 0.2 * np.log(0.2 / q_tail)
    assert forward.item() == pytest.approx(expected, rel=1e-6)


def test_rows_that_are_full_or_without_a_tail():
    z = torch.tensor([[1.0, 0.0, -1.0]] * 2)
    logp = z.log_softmax(1)
    logp[1, :2] = torch.tensor([0.6, 0.4]).log()
    ids, none = torch.tensor([[0, 1, 2]] * 2), torch.full((2,), -torch.inf)
    forward, reverse = partition_rows(z, torch.tensor([3, 2]), ids, logp, none)
    assert forward[0].item() == pytest.approx(0, abs=1e-7)
    assert reverse[0].item() == pytest.approx(0, abs=1e-7)
    q = softmax(np.array([1.0, 0.0, -1.0]))
    assert forward[1].item() == pytest.approx(kl([0.6, 0.4], q[:2]), rel=1e-5)
    assert reverse[1].item() == pytest.approx(kl(q[:2], [0.6, 0.4]), rel=1e-5)  # the bucket is left out


def test_agreement_of_full_and_short_rows():
    ours = torch.tensor([[1, 2, 3, 4, 5]] * 4)
    theirs = torch.tensor([[1, 9, 2, 8, 7], [2, 1, 4, 5, 3], [1, 3, 0, 0, 0], [2, 1, 0, 0, 0]])
    top1, top5 = agreement(ours, theirs, torch.tensor([64, 5, 2, 2]))
    assert top1.tolist() == [True, False, True, False]
    assert top5.tolist() == pytest.approx([0.4, 1.0, 0.5, 1.0])


def some_sums(num_documents=12):
    rng = np.random.default_rng(5)
    bins = np.zeros((num_documents, 15, 3))
    for doc in range(1, num_documents):  # the first has no targets
        for _ in range(doc):
            confidence = rng.random()
            bins[doc, int(confidence * 15)] += 1, confidence, rng.random() < 0.5
    targets = bins[..., 0].sum(1)
    columns = {name: rng.random(num_documents) * targets for name in (
        "nll_nats", "kl_nats", "reverse_kl_nats", "top1_agreed", "top5_overlap")}  # fmt: skip
    columns |= {"targets": targets, "target_bytes": 3 * targets}
    return Sums(columns=columns, bins=bins)


def by_hand(sums, drawn):
    total = {name: sum(column[doc] for doc in drawn) for name, column in sums.columns.items()}
    ece = 0.0
    for index in range(15):
        count, confidence, correct = (sum(sums.bins[doc, index, part] for doc in drawn) for part in range(3))
        if count:
            ece += count / total["targets"] * abs(correct / count - confidence / count)
    nll = total["nll_nats"] / total["targets"]
    return {
        "nll_nats": nll,
        "bits_per_byte": nll * total["targets"] / math.log(2) / total["target_bytes"],
        "perplexity": math.exp(nll),
        "kl_to_teacher_nats": total["kl_nats"] / total["targets"],
        "reverse_kl_nats": total["reverse_kl_nats"] / total["targets"],
        "top1_agreement": total["top1_agreed"] / total["targets"],
        "top5_agreement": total["top5_overlap"] / total["targets"],
        "ece": ece,
    }


def test_figures_and_intervals_equal_those_made_document_by_document():
    sums = some_sums()
    figures, intervals = figures_of(sums)
    assert figures == pytest.approx(by_hand(sums, range(12)), rel=1e-12)
    rng = np.random.default_rng(0)
    resampled = [by_hand(sums, 1 + rng.integers(11, size=11)) for _ in range(2000)]
    for name in figures:
        expected = np.quantile([figure[name] for figure in resampled], (0.025, 0.975))
        assert intervals[name] == pytest.approx(expected, rel=1e-9)
        assert intervals[name][0] < figures[name]


def test_unknown_bytes_and_a_single_document_leave_gaps_not_errors():
    sums = some_sums()
    sums.columns["target_bytes"][4] = math.nan
    figures, intervals = figures_of(sums)
    assert math.isnan(figures["bits_per_byte"])
    assert intervals["bits_per_byte"] is None
    assert all(intervals[name] for name in figures if name != "bits_per_byte")
    one = Sums(columns={name: column[4:5] for name, column in sums.columns.items()}, bins=sums.bins[4:5])
    assert figures_of(one)[1] == {}


def test_the_interval_of_a_mean_is_as_wide_as_theory_says():
    """n = 400 documents of equal size: half a width of 1.96 σ/√n."""
    values = np.random.default_rng(1).normal(3, 2, 400)
    drawn = resample_sums(np.column_stack([values, np.ones(400)]))
    low, high = percentile_interval(drawn[:, 0] / drawn[:, 1])
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.05)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.02)


@pytest.mark.parametrize("record", ["run.json", "lineage.json"])
def test_a_run_and_its_export_know_what_they_were_trained_on(tmp_path, record):
    cache = make_cache(tmp_path / "cache")
    assert seen_in_training(tmp_path, cache) is False
    shards = cache.manifest.shard_digests
    (tmp_path / record).write_text(json.dumps({"caches": [{"shards": shards, "sources": []}]}))
    assert seen_in_training(tmp_path, cache) is True
    (tmp_path / record).write_text(json.dumps({"caches": [{"shards": {"shard-00000.h5": "00"}, "sources": []}]}))
    assert seen_in_training(tmp_path, cache) is False
