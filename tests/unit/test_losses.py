"""The sparse losses against a dense float64 reference that builds the K+1 partition and lets autograd differentiate."""

import pytest
import torch

from shared.model.gpt import IGNORE
from stage2_student.losses import SoftLabels, cross_entropy_, ghost_

V = 40
GRID = (0.5, 1.0, 1.5, 2.0)


def reference(z, labels, rows, *, alpha, temperature):
    """Total, kd, ce and dTotal/dz; `rows` holds (ids, logp, log_tail) per row, all in float64."""
    z = z.double().requires_grad_()
    kd, ce = z.new_zeros(()), z.new_zeros(())
    for i, (ids, logp, log_tail) in enumerate(rows):
        if labels[i] == IGNORE:
            continue
        ce = ce - z[i].log_softmax(0)[labels[i]]
        if not len(ids):
            continue
        log_q = (z[i] / temperature).log_softmax(0)
        kd = kd + (logp.exp() * (logp - log_q[ids])).sum()
        outside = torch.ones(V, dtype=torch.bool)
        outside[ids] = False
        if log_tail > -torch.inf:
            kd = kd + log_tail.exp() * (log_tail - log_q[outside].logsumexp(0))
    total = alpha * temperature**2 * kd + (1 - alpha) * ce
    if total.requires_grad:
        total.backward()
    return total.item(), kd.item(), ce.item(), torch.zeros_like(z) if z.grad is None else z.grad


def partition(logits, k, generator, tail=None):
    """The best k ids of a row of teacher logits, their log-probabilities and the tail's, in float64."""
    ids = logits.argsort(descending=True)[:k]
    logp = logits.log_softmax(0)[ids]
    log_tail = torch.log1p(-logp.exp().sum()) if 0 < k < V else torch.tensor(-torch.inf)
    if tail is not None:
        log_tail = torch.tensor(tail).double().log()
        logp = logp - logp.logsumexp(0) + torch.log1p(-log_tail.exp())
    return ids, logp, log_tail.double()


def pack(rows, *, garbage=None):
    """Rows as padded tensors; `garbage` is what padding ids hold."""
    width = max(max(len(ids) for ids, _, _ in rows), 1)
    ids = torch.full((len(rows), width), garbage if garbage is not None else 0)
    logp = torch.full((len(rows), width), -torch.inf if garbage is None else torch.nan)
    for i, (row_ids, row_logp, _) in enumerate(rows):
        ids[i, : len(row_ids)], logp[i, : len(row_ids)] = row_ids, row_logp.float()
    log_tail = torch.stack([tail for _, _, tail in rows]).float()
    k = torch.tensor([len(row_ids) for row_ids, _, _ in rows])
    if garbage is not None:
        log_tail[k == 0] = torch.nan
    return SoftLabels(ids, logp, log_tail, k)


@pytest.fixture
def case():
    """Labels, student logits and rows of every kind: k = V, tail 1e-12, no tail but k < V, one entry, ragged, empty."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(10, V, generator=generator, dtype=torch.float64) * 3
    z = torch.randn(10, V, generator=generator) * 3
    ks = [V, 5, 7, 1, 3, 12, 0, 4, 0, 6]
    tails = {1: 1e-12, 2: 0.0}
    rows = [partition(teacher[i], k, generator, tails.get(i)) for i, k in enumerate(ks)]
    labels = torch.randint(0, V, (10,), generator=generator)
    labels[4], labels[5] = rows[4][0][1], rows[5][0][-1]  # labels inside the row
    labels[3] = (rows[3][0][0] + 1) % V  # and outside
    labels[7] = labels[8] = IGNORE  # masked, with teacher entries and without
    return z, labels, rows


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("temperature", GRID)
@pytest.mark.parametrize("garbage", [None, 3, 10**9, -7])
def test_ghost_equals_the_dense_reference(case, temperature, alpha, garbage):
    z, labels, rows = case
    total, kd, ce, gradient = reference(z, labels, rows, alpha=alpha, temperature=temperature)
    work = z.clone()
    loss = ghost_(work, labels, pack(rows, garbage=garbage), alpha=alpha, temperature=temperature)
    assert loss.kd.item() == pytest.approx(kd, rel=2e-6)
    assert loss.ce.item() == pytest.approx(ce, rel=2e-6)  # also where it has no weight: the log shows it
    assert loss.total.item() == pytest.approx(total, rel=2e-6)
    torch.testing.assert_close(work.double(), gradient, rtol=2e-5, atol=2e-6)
    assert not work[7:9].any()


@pytest.mark.parametrize("temperature", GRID)
def test_the_student_tail_is_right_far_below_float32_resolution(temperature):
    z = torch.full((1, V), -40.0 * temperature)
    z[0, :3] = torch.tensor([2.0, 1.0, 0.0])
    rows = [(torch.arange(3), torch.tensor([0.5, 0.3, 0.1]).double().log(), torch.tensor(0.1).double().log())]
    _, kd, _, gradient = reference(z, [0], rows, alpha=1.0, temperature=temperature)
    work = z.clone()
    loss = ghost_(work, torch.tensor([0]), pack(rows), alpha=1.0, temperature=temperature)
    assert loss.kd.item() == pytest.approx(kd, rel=1e-6)
    torch.testing.assert_close(work.double(), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", GRID)
def test_a_common_shift_of_the_logits_changes_nothing(case, temperature):
    """1e4 leaves float32 logits a resolution of 1e-3; the reference sees the same rounded logits."""
    z, labels, rows = case
    shifted = z + 1e4
    total, kd, ce, gradient = reference(shifted, labels, rows, alpha=0.3, temperature=temperature)
    tolerance = 2e-6 if temperature in (0.5, 1.0, 2.0) else 2e-3  # a division by 1.5 rounds at 1e4
    work = shifted.clone()
    loss = ghost_(work, labels, pack(rows), alpha=0.3, temperature=temperature)
    assert [x.item() for x in loss] == pytest.approx([total, kd, ce], rel=tolerance)
    torch.testing.assert_close(work.double(), gradient, rtol=0, atol=10 * tolerance)
    work = shifted.clone()
    assert cross_entropy_(work, labels).ce.item() == pytest.approx(ce, rel=2e-6)


def test_cross_entropy_equals_the_reference(case):
    z, labels, rows = case
    total, _, ce, gradient = reference(z, labels, rows, alpha=0.0, temperature=1.0)
    work = z.clone()
    loss = cross_entropy_(work, labels)
    assert (loss.total.item(), loss.ce.item()) == (pytest.approx(total, rel=1e-6), pytest.approx(ce, rel=1e-6))
    assert loss.kd.item() == 0
    torch.testing.assert_close(work.double(), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", GRID)
def test_masked_rows_add_exactly_nothing(case, temperature):
    z, labels, rows = case
    for alpha in (0.3, 1.0):
        work = z.clone()
        loss = ghost_(work, torch.full_like(labels, IGNORE), pack(rows), alpha=alpha, temperature=temperature)
        assert [x.item() for x in loss] == [0, 0, 0]
        assert not work.any()
    assert cross_entropy_(z, torch.full_like(labels, IGNORE)).total.item() == 0
    assert not z.any()


@pytest.mark.parametrize("temperature", GRID)
def test_equal_distributions_have_no_divergence_and_no_gradient(temperature):
    z = torch.randn(1, V, generator=torch.Generator().manual_seed(1)) * 3
    row = partition((z[0] / temperature).double(), 6, None)
    loss = ghost_(z, torch.tensor([0]), pack([row]), alpha=1.0, temperature=temperature)
    assert abs(loss.kd.item()) < 1e-6
    assert z.abs().max() < 1e-6 * temperature
