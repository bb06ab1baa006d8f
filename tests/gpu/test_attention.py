"""Attention inside packed documents on CUDA: the kernel and the mask against the loop, which runs on a processor."""

import pytest
import torch

from shared.model.gpt import Documents, varlen

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LENGTHS = [[7, 1, 120], [128], [64, 64], [1] * 128]


def attend(way, dtype, device):
    """Output and gradients of one attention over four packed rows, in float32 on the processor."""
    torch.manual_seed(0)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS]).to(device)
    inputs = [torch.randn(4, 6, 128, 32).to(dtype) for _ in range(3)]
    leaves = [tensor.to(device).detach().requires_grad_() for tensor in inputs]
    y = getattr(Documents(positions), way)(*leaves)
    y.float().square().sum().backward()
    return [tensor.float().cpu() for tensor in (y, *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize(
    ("way", "dtype", "tolerance"),
    [
        ("attend_masked", torch.float32, 1e-4),
        pytest.param(
            "attend_varlen", torch.bfloat16, 3e-2, marks=pytest.mark.skipif(varlen is None, reason="no such kernel")
        ),
    ],
)
def test_every_way_attends_alike(way, dtype, tolerance):
    expected = attend("attend_in_turn", dtype, "cpu")
    for ours, theirs in zip(attend(way, dtype, "cuda"), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
