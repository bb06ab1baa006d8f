"""Attention inside packed documents on every device, against the loop over documents in float64."""

import pytest
import torch

from shared.model import gpt
from shared.model.gpt import Documents, varlen
from tests.support.devices import EVERY_DEVICE, ON_A_CARD

PACKED = [[7, 1, 120], [128], [64, 64], [1] * 128]
ONE_EACH = [[128]] * 4
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def attend(way, lengths, dtype, device, *, groups=6, head_dim=32):
    """Output and gradients of one attention over four packed rows, in float64 on the processor."""
    torch.manual_seed(0)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]).to(device)
    inputs = [torch.randn(4, heads, 128, head_dim).bfloat16().to(dtype) for heads in (6, groups, groups)]
    leaves = [tensor.to(device).detach().requires_grad_() for tensor in inputs]
    repeated = leaves if way == "attend" else [leaf.repeat_interleave(6 // leaf.shape[1], dim=1) for leaf in leaves]
    y = getattr(Documents(positions), way)(*repeated)
    y.float().square().sum().backward()
    return [tensor.double().cpu() for tensor in (y, *(leaf.grad for leaf in leaves))]


def check(way, lengths, dtype, device, **sizes):
    expected = attend("attend_in_turn", lengths, torch.float64, "cpu", **sizes)
    for ours, theirs in zip(attend(way, lengths, dtype, device, **sizes), expected, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * theirs.abs().max().item()
        )


@EVERY_DEVICE
def test_a_mask_attends_as_the_loop(device):
    check("attend_masked", PACKED, torch.float32, device)


@ON_A_CARD
@pytest.mark.skipif(varlen is None, reason="no such kernel")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_for_any_length_attends_as_the_loop(dtype):
    check("attend_varlen", PACKED, dtype, "cuda")


@EVERY_DEVICE
@pytest.mark.parametrize("lengths", [PACKED, ONE_EACH], ids=["packed", "one each"])
@pytest.mark.parametrize("head_dim", [32, 42, 64])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_chosen_attends_as_the_loop(dtype, groups, head_dim, lengths, device):
    check("attend", lengths, dtype, device, groups=groups, head_dim=head_dim)


@ON_A_CARD
@pytest.mark.parametrize("lengths", [PACKED, ONE_EACH], ids=["packed", "one each"])
def test_cards_before_ampere_attend_as_the_loop(monkeypatch, lengths):
    monkeypatch.setattr(gpt, "_is_ampere", lambda: False)
    check("attend", lengths, torch.float16, "cuda", groups=2)
