"""The head in float32 from weights of any dtype, with a bias and a soft cap."""

import pytest
import torch
from torch import nn

from shared.logits import Projection
from tests.support.devices import EVERY_DEVICE


@EVERY_DEVICE
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-5), (torch.bfloat16, 1e-4)])
def test_half_precision_weights_give_float32_logits(dtype, tolerance, bias, cap, device):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(576, 4096, bias=bias).requires_grad_(False)
    for parameter in head.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    head = head.to(device, dtype)
    hidden = torch.randn(40, 576, generator=generator).to(device, dtype)
    exact = hidden.double() @ head.weight.double().T
    if bias:
        exact += head.bias.double()
    if cap:
        exact = cap * torch.tanh(exact / cap)
    ours = Projection(head, 64, cap=cap)(hidden)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() / exact.std() < tolerance
