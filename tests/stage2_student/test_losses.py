"""The sparse losses against a dense float64 reference that builds a row's cells and lets autograd differentiate."""

import itertools
import math

import pytest
import torch

from shared.model.gpt import IGNORE
from stage2_student.config import StudentConfig
from stage2_student.losses import SoftLabels, cross_entropy_, distill_

V = 40
GRID = (0.5, 1.0, 1.5, 2.0)
DIVERGENCES = ("forward", "reverse", "jsd", "skewed-forward", "skewed-reverse")
LEGAL = [*itertools.product(("ghost", "truncated"), DIVERGENCES), ("sampled", "forward"), ("hybrid", "forward")]


def divergence(log_p, log_q, config):
    """The definitions, over cells; cells of the teacher without mass are no part of reverse KL."""
    p, q = log_p.exp(), log_q.exp()
    if config.divergence == "forward":
        return torch.xlogy(p, p).sum() - (p * log_q)[p > 0].sum()
    if config.divergence == "reverse":
        there = log_p > -torch.inf
        return (q[there] * (log_q[there] - log_p[there])).sum()
    share = config.beta if config.divergence == "jsd" else config.skew
    m = share * p + (1 - share) * q
    p_to_m = torch.xlogy(p, p).sum() - torch.xlogy(p, m).sum()
    q_to_m = torch.xlogy(q, q).sum() - torch.xlogy(q, m).sum()
    mixes = {"jsd": share * p_to_m + (1 - share) * q_to_m, "skewed-forward": p_to_m, "skewed-reverse": q_to_m}
    return mixes[config.divergence]


def row_loss(z, row, config):
    """KD of one row of logits z [V] in float64, written from the definitions with dense softmax and autograd."""
    ids, logp, log_tail, sample_ids, weights = row
    log_q = (z / config.temperature).log_softmax(0)
    if config.loss == "sampled":
        return -(weights * log_q[sample_ids]).sum()
    if config.loss == "hybrid":
        return -(logp.exp() * log_q[ids]).sum() - (weights * log_q[sample_ids]).sum()
    if not len(ids):
        return z.new_zeros(())
    if config.loss == "truncated":
        return divergence(logp.log_softmax(0), log_q[ids].log_softmax(0), config)
    outside = torch.ones(V, dtype=torch.bool)
    outside[ids] = False
    if not outside.any():
        return divergence(logp, log_q[ids], config)
    return divergence(
        torch.cat((logp, log_tail[None])), torch.cat((log_q[ids], log_q[outside].logsumexp(0)[None])), config
    )


def reference(z, labels, rows, config):
    """Total, kd, ce and dTotal/dz in float64."""
    z = z.double().requires_grad_()
    targets = [i for i in range(len(rows)) if labels[i] != IGNORE]
    kd = sum((row_loss(z[i], rows[i], config) for i in targets), z.sum() * 0)
    ce = sum((-z[i].log_softmax(0)[labels[i]] for i in targets), z.sum() * 0)
    total = config.alpha * config.temperature**2 * kd + (1 - config.alpha) * ce
    return total.item(), kd.item(), ce.item(), torch.autograd.grad(total, z)[0]


def make_row(logits, k, *, tail=None, num_samples=5, generator=None):
    """The best k ids of teacher logits with their log-probabilities, the tail's, and samples of the tail and the head.

    Sampled ids are distinct from the entries, so that the same row suits `sampled` and `hybrid`.
    """
    order = logits.argsort(descending=True)
    ids, logp = order[:k], logits.log_softmax(0)[order[:k]]
    log_tail = logits.log_softmax(0)[order[k:]].logsumexp(0) if 0 < k < V else torch.tensor(-torch.inf).double()
    if tail is not None:
        log_tail = torch.tensor(tail).double().log()
        logp = logp - logp.logsumexp(0) + torch.log1p(-log_tail.exp())
    sample_ids = order[k : k + num_samples] if k else order[:0]
    weights = torch.rand(len(sample_ids), generator=generator, dtype=torch.float64) * 0.3
    return ids, logp, log_tail, sample_ids, weights


def pack(rows, *, garbage=None):
    """Rows as padded tensors; `garbage` is what padding ids hold."""
    width, samples = max(max(len(r[0]) for r in rows), 1), max(max(len(r[3]) for r in rows), 1)
    fill = 0 if garbage is None else garbage
    ids, sample_ids = torch.full((len(rows), width), fill), torch.full((len(rows), samples), fill)
    logp, weights = torch.full((len(rows), width), -torch.inf), torch.zeros(len(rows), samples)
    if garbage is not None:
        logp.fill_(torch.nan)
    for i, (row_ids, row_logp, _, row_samples, row_weights) in enumerate(rows):
        ids[i, : len(row_ids)], logp[i, : len(row_ids)] = row_ids, row_logp.float()
        sample_ids[i, : len(row_samples)], weights[i, : len(row_samples)] = row_samples, row_weights.float()
    log_tail = torch.stack([r[2] for r in rows]).float()
    k = torch.tensor([len(r[0]) for r in rows])
    if garbage is not None:
        log_tail[k == 0] = torch.nan
    return SoftLabels(ids, logp, log_tail, k, sample_ids, weights)


def configure(loss="ghost", divergence="forward", alpha=1.0, temperature=1.0, **options):
    return StudentConfig(loss=loss, divergence=divergence, alpha=alpha, temperature=temperature, **options)


def check(z, labels, rows, config, *, garbage=None, rtol=3e-6, gradient_atol=2e-6):
    total, kd, ce, gradient = reference(z, labels, rows, config)
    work = z.clone()
    loss = distill_(work, labels, pack(rows, garbage=garbage), config)
    # A divergence is a difference of logs, each of them rounded.
    atol = 2e-6 * len(rows) * max(z.abs().max().item() / config.temperature, 1)
    assert loss.kd.item() == pytest.approx(kd, rel=rtol, abs=atol)
    assert loss.ce.item() == pytest.approx(ce, rel=rtol)  # also where it has no weight: the log shows it
    assert loss.total.item() == pytest.approx(total, rel=rtol, abs=atol * config.temperature**2)
    torch.testing.assert_close(work.double(), gradient, rtol=2e-5, atol=gradient_atol)
    return work


@pytest.fixture
def case():
    """Labels, student logits and rows of every kind: k = V, tail 1e-12, no tail but k < V, one entry, ragged, empty."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(10, V, generator=generator, dtype=torch.float64) * 3
    z = torch.randn(10, V, generator=generator) * 3
    ks = [V, 5, 7, 1, 3, 12, 0, 4, 0, 6]
    tails = {1: 1e-12, 2: 0.0}
    rows = [make_row(teacher[i], k, tail=tails.get(i), generator=generator) for i, k in enumerate(ks)]
    labels = torch.randint(0, V, (10,), generator=generator)
    labels[4], labels[5] = rows[4][0][1], rows[5][0][-1]  # labels inside the row
    labels[3] = (rows[3][0][0] + 1) % V  # and outside
    labels[7] = labels[8] = IGNORE  # masked, with teacher entries and without
    return z, labels, rows


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("temperature", GRID)
@pytest.mark.parametrize(("loss", "divergence"), LEGAL)
def test_value_and_gradient_equal_the_dense_reference(case, loss, divergence, temperature, alpha):
    config = configure(loss, divergence, alpha, temperature)
    gradients = [check(*case, config, garbage=garbage) for garbage in (None, 3, 10**9, -7)]
    assert all(torch.equal(gradients[0], other) for other in gradients)
    assert not gradients[0][7:9].any()


@pytest.mark.parametrize("share", [1e-3, 0.3, 0.9])
@pytest.mark.parametrize("divergence", DIVERGENCES[2:])
def test_shares_of_the_mixture(case, divergence, share):
    check(*case, configure("ghost", divergence, beta=share, skew=share), gradient_atol=1e-5)


@pytest.mark.parametrize("temperature", GRID)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_student_tail_is_right_far_below_float32_resolution(divergence, temperature):
    z = torch.full((1, V), -40.0 * temperature)
    z[0, :3] = torch.tensor([2.0, 1.0, 0.0])
    none = torch.tensor([], dtype=torch.int64)
    row = (torch.arange(3), torch.tensor([0.5, 0.3, 0.1]).double().log(), torch.tensor(0.1).double().log(), none, none)
    check(z, torch.tensor([0]), [row], configure("ghost", divergence, 1.0, temperature), rtol=1e-6, gradient_atol=1e-7)


@pytest.mark.parametrize("shift", [1e4, -1e4])
@pytest.mark.parametrize("temperature", GRID)
@pytest.mark.parametrize(("loss", "divergence"), LEGAL)
def test_a_common_shift_of_the_logits_changes_nothing(case, loss, divergence, temperature, shift):
    """1e4 leaves float32 logits a resolution of 1e-3; the reference sees the same rounded logits."""
    z, labels, rows = case
    shifted, config = z + shift, configure(loss, divergence, 0.3, temperature)
    total, kd, ce, gradient = reference(shifted, labels, rows, config)
    tolerance = 4e-6 if temperature in (0.5, 1.0, 2.0) else 4e-3  # a division by 1.5 rounds at 1e4
    work = shifted.clone()
    out = distill_(work, labels, pack(rows), config)
    assert [x.item() for x in out] == pytest.approx([total, kd, ce], rel=tolerance)
    torch.testing.assert_close(work.double(), gradient, rtol=0, atol=10 * tolerance)
    work = shifted.clone()
    assert cross_entropy_(work, labels).ce.item() == pytest.approx(ce, rel=2e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss", ["ghost", "truncated"])
def test_teacher_probabilities_that_underflow(loss, divergence):
    """e^-200 is 0 in float32, where its logarithm is not."""
    z = torch.randn(2, V, generator=torch.Generator().manual_seed(3))
    teacher = torch.full((2, V), -200.0).double()
    teacher[:, 7] = 0
    rows = [make_row(teacher[0], 4), make_row(teacher[1], 1)]
    check(z, torch.tensor([7, 8]), rows, configure(loss, divergence, 0.6))


@pytest.mark.parametrize("stored", [-math.inf, -2048.0, -1365.3])
def test_reverse_kl_leaves_a_zero_tail_out_and_jsd_keeps_its_finite_value(stored):
    """A student of uniform q over 40 ids, a teacher of two entries of one half each; by hand."""
    labels = SoftLabels(
        torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]).log(), torch.tensor([stored]), torch.tensor([2])
    )
    q, tail = 1 / V, 1 - 2 / V
    work = torch.zeros(1, V)
    assert distill_(work, torch.tensor([0]), labels, configure("ghost", "reverse")).kd.item() == pytest.approx(
        2 * q * math.log(2 * q), rel=1e-6
    )
    c = math.log(2 * q) + 1
    expected = torch.full((V,), q * (0 - 2 * q * c))
    expected[:2] = q * (c - 2 * q * c)
    torch.testing.assert_close(work[0], expected)
    m = 0.25 * 0.5 + 0.75 * q
    jsd = 0.25 * math.log(0.5 / m) + 0.75 * (2 * q * math.log(q / m) - tail * math.log(0.75))
    assert distill_(
        torch.zeros(1, V), torch.tensor([0]), labels, configure("ghost", "jsd", beta=0.25)
    ).kd.item() == pytest.approx(jsd, rel=1e-6)


def test_cross_entropy_equals_the_reference(case):
    z, labels, rows = case
    total, _, ce, gradient = reference(z, labels, rows, configure(alpha=0.0))
    work = z.clone()
    loss = cross_entropy_(work, labels)
    assert (loss.total.item(), loss.ce.item()) == (pytest.approx(total, rel=1e-6), pytest.approx(ce, rel=1e-6))
    assert loss.kd.item() == 0
    torch.testing.assert_close(work.double(), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize(("loss", "divergence"), LEGAL)
def test_masked_rows_add_exactly_nothing(case, loss, divergence, temperature):
    z, labels, rows = case
    for alpha in (0.3, 1.0):
        work = z.clone()
        config = configure(loss, divergence, alpha, temperature)
        out = distill_(work, torch.full_like(labels, IGNORE), pack(rows), config)
        assert [x.item() for x in out] == [0, 0, 0]
        assert not work.any()
    assert cross_entropy_(z, torch.full_like(labels, IGNORE)).total.item() == 0
    assert not z.any()


@pytest.mark.parametrize("temperature", GRID)
@pytest.mark.parametrize(("loss", "divergence"), LEGAL[:-2])
def test_equal_distributions_have_no_divergence_and_no_gradient(loss, divergence, temperature):
    z = torch.randn(1, V, generator=torch.Generator().manual_seed(1)) * 3
    row = make_row((z[0] / temperature).double(), 6)
    loss = distill_(z, torch.tensor([0]), pack([row]), configure(loss, divergence, 1.0, temperature))
    assert abs(loss.kd.item()) < 1e-6
    assert z.abs().max() < 1e-6 * temperature


@pytest.mark.parametrize("loss", ["ghost", "truncated"])
def test_fewer_entries_are_the_best_ones_and_the_others_join_the_tail(case, loss):
    z, labels, rows = case
    cut = []
    for ids, logp, log_tail, *samples in rows:
        joined = torch.logaddexp(log_tail, logp[4:].logsumexp(0)) if len(ids) > 4 else log_tail
        cut.append((ids[:4], logp[:4], joined, *samples))
    soft = pack(rows, garbage=10**9).first(4)
    expected = pack(cut)
    assert soft.ids.shape == (10, 4)
    assert torch.equal(soft.k, expected.k)
    full = expected.k > 0
    torch.testing.assert_close(soft.log_tail[full], expected.log_tail[full])
    work, theirs = z.clone(), z.clone()
    config = configure(loss, alpha=0.7)
    ours = distill_(work, labels, soft, config)
    torch.testing.assert_close(torch.stack(ours), torch.stack(distill_(theirs, labels, expected, config)))
    torch.testing.assert_close(work, theirs)
