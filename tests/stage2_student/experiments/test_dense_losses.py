"""Label smoothing and the divergence over all ids, against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F

from shared.model.gpt import IGNORE
from stage2_student.losses import cross_entropy_, dense_distill_

C, V = 7, 23


def chunk():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(C, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (C,), generator=generator)
    labels[2] = IGNORE
    teacher = (2 * torch.randn(C, V, generator=generator, dtype=torch.float64)).log_softmax(1)
    return logits.requires_grad_(), labels, teacher


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_equals_torch(smoothing):
    logits, labels, _ = chunk()
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
    expected.backward()
    work = logits.detach().clone()
    loss = cross_entropy_(work, labels, smoothing)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss.ce.item() == pytest.approx(F.cross_entropy(logits, labels, reduction="sum").item(), rel=1e-12)
    assert loss.kd.item() == 0
    torch.testing.assert_close(work, logits.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_dense_distillation_equals_torch(alpha):
    logits, labels, teacher = chunk()
    valid = (labels != IGNORE)[:, None]
    ce = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    kd = F.kl_div(logits.log_softmax(1) * valid, teacher * valid, log_target=True, reduction="none")[valid[:, 0]].sum()
    (alpha * kd + (1 - alpha) * ce).backward()
    work = logits.detach().clone()
    loss = dense_distill_(work, labels, teacher, alpha)
    assert loss.total.item() == pytest.approx((alpha * kd + (1 - alpha) * ce).item(), rel=1e-12)
    assert (loss.kd.item(), loss.ce.item()) == pytest.approx((kd.item(), ce.item()), rel=1e-12)
    torch.testing.assert_close(work, logits.grad, rtol=1e-12, atol=1e-14)
