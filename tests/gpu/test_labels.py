"""Label rows and draws on every device."""

import numpy as np
import pytest
import torch

from stage1_teacher.sampling import draw
from stage1_teacher.topk import capture_rows
from tests.stage1_teacher.test_topk import GRID, reference
from tests.support.devices import EVERY_DEVICE


@EVERY_DEVICE
@pytest.mark.parametrize(("scale", "vocabulary", "top_k"), [(1, 300, 5), (4, 5000, 64), (30, 700, 16)])
def test_label_rows_equal_a_float64_reference(scale, vocabulary, top_k, device):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(37, vocabulary, generator=generator) * scale
    gold = torch.randint(vocabulary, (37,), generator=generator)
    rows = capture_rows(
        logits.to(device, copy=True), gold.to(device), top_k=top_k, temperatures=GRID, tokenizer_size=vocabulary
    )
    want = reference(logits, gold.numpy(), top_k, GRID)
    np.testing.assert_array_equal(rows.ids.cpu().numpy(), want["ids"])
    np.testing.assert_array_equal(rows.gold_rank.cpu().numpy(), want["rank"])
    np.testing.assert_allclose(rows.margins.cpu().numpy(), want["margins"], rtol=1e-6)
    np.testing.assert_allclose(rows.tail_log.cpu().numpy(), want["tail_log"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(rows.entropy_nats.cpu().numpy(), want["entropy"], rtol=1e-5, atol=1e-5)


@EVERY_DEVICE
def test_equal_logits_are_ordered_by_id(device):
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]] * 9)
    gold = torch.zeros(9, dtype=torch.int64)
    rows = capture_rows(logits.to(device), gold.to(device), top_k=4, temperatures=GRID, tokenizer_size=6)
    assert rows.ids.tolist() == [[1, 3, 2, 4]] * 9


@EVERY_DEVICE
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_invert_the_cumulative_distribution(temperature, device):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 3000, generator=generator) * 3
    uniforms = torch.rand(20, 16, generator=generator, dtype=torch.float64)
    mass = (logits.double() / temperature).softmax(1).cumsum(1)
    expected = torch.searchsorted(mass, uniforms, right=True)
    ids, drawn = draw(logits.to(device), uniforms.to(device), temperature)
    ids, drawn = ids.cpu(), drawn.cpu()
    # a draw within rounding of a border between two ids may fall to either
    near = (mass.gather(1, torch.minimum(ids, expected)) - uniforms).abs() < 1e-6
    assert ((ids == expected) | near).all() and (ids == expected).float().mean() > 0.99
    assert torch.equal(drawn, logits.gather(1, ids))
