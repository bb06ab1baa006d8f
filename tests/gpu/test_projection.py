"""On a GPU the head's kernel writes float32 out of half-precision weights."""

import pytest
import torch
from torch import nn

from shared.logits import Projection

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_give_float32_logits(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    head = nn.Linear(576, 49_152, bias=False, dtype=dtype, device="cuda").requires_grad_(False)
    head.weight.copy_(torch.randn(49_152, 576, generator=generator, device="cuda"))
    hidden = torch.randn(40, 576, generator=generator, device="cuda").to(dtype)
    exact = hidden.double() @ head.weight.double().T
    ours = Projection(head, 64)(hidden)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() / exact.std() < 1e-5
