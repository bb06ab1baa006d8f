import pytest
import torch
from torch import nn

from shared import logits
from shared.logits import Projection


def head_of(width, vocabulary, dtype):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False, dtype=dtype).requires_grad_(False)
    head.weight.copy_(torch.randn(vocabulary, width, generator=generator))
    return head, torch.randn(40, width, generator=generator).to(dtype)


def distance(head, hidden, **options):
    """Largest difference from the float64 product, beside the standard deviation of the logits."""
    exact = hidden.double() @ head.weight.double().T
    return float((Projection(head, 64, **options)(hidden) - exact).abs().max() / exact.std())


@pytest.mark.parametrize("width", [32, 576])
@pytest.mark.parametrize("vocabulary", [97, 4096])
def test_bfloat16_weights_give_logits_of_sixteen_bits(width, vocabulary):
    head, hidden = head_of(width, vocabulary, torch.bfloat16)
    assert distance(head, hidden) < 2**-14  # logits of up to five deviations, rounded at 16 bits
    rounded = (head(hidden).double() - hidden.double() @ head.weight.double().T).abs().max()
    assert rounded > 2**-8  # what the head itself returns


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_weights_are_multiplied_in_float32(dtype):
    assert distance(*head_of(576, 4096, dtype)) < 1e-5


def test_kernels_that_round_before_they_subtract_get_a_float32_copy(monkeypatch):
    head, hidden = head_of(576, 4096, torch.bfloat16)
    lean = Projection(head, 64).num_bytes
    assert lean == 64 * 4096 * (4 + 2)

    def rounding_addmm(self, x, w, *, beta):
        return self.mul_(beta).add_(x @ w)

    monkeypatch.setattr(torch.Tensor, "addmm_", rounding_addmm)
    assert distance(head, hidden) < 1e-5
    assert Projection(head, 64).num_bytes == 64 * 4096 * 4 + 576 * 4096 * 4


def test_a_head_of_zeros_is_refused():
    head, _ = head_of(32, 97, torch.bfloat16)
    head.weight.zero_()
    with pytest.raises(logits.DistillError, match="all weights of the model's head are zero"):
        Projection(head, 4)
