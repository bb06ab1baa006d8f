"""The head's loss and its gradients on every device, against the same in float64 on a processor."""

import dataclasses
import functools

import pytest
import torch

from shared.model.gpt import IGNORE
from stage2_student import fused
from stage2_student.config import StudentConfig
from tests.stage2_student.test_fused import LEGAL
from tests.support.devices import EVERY_DEVICE, ON_A_CARD
from tests.support.given_labels import GivenLabels

N, H, V, K = 200, 64, 1003, 8


def batch(dtype, device):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, H, generator=generator).bfloat16().to(dtype) for rows in (N, V))
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::5] = IGNORE
    logp, ids = (torch.randn(N, V, generator=generator, dtype=torch.float64) * 2).log_softmax(1).topk(K + 2)
    soft = {
        "soft_ids": ids[None, :, :K],
        "soft_logp": logp[None, :, :K].to(dtype),
        "soft_log_tail": torch.log1p(-logp[:, :K].exp().sum(1))[None].to(dtype),
        "soft_k": torch.full((1, N), K),
        "soft_sample_ids": ids[None, :, K:],
        "soft_sample_weights": torch.rand(1, N, 2, generator=generator).to(dtype),
    }
    leaves = [tensor.to(device).requires_grad_() for tensor in (hidden / 4, weight / 4)]
    return (*leaves, labels.to(device), {name: field.to(device) for name, field in soft.items()})


def loss_and_gradients(config, dtype, device, *, autocast=None, compiles=False, scale=1.0):
    hidden, weight, labels, soft = batch(dtype, device)
    head_loss = GivenLabels(config, compiles=compiles)
    head_loss.scaled = lambda loss: scale * loss
    with torch.autocast(device, autocast, enabled=autocast is not None):
        loss = head_loss(hidden, weight, labels, **soft)["loss"]
    gradients = torch.autograd.grad(scale * loss, (hidden, weight))
    return [tensor.double().cpu() for tensor in (loss, *(gradient / scale for gradient in gradients))]


@functools.cache
def exact(settings):
    return loss_and_gradients(StudentConfig(**dict(settings)), torch.float64, "cpu")


def check(config, tolerance, *arguments, **options):
    changed = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    settings = tuple((name, changed[name]) for name in ("loss", "divergence", "alpha", "temperature"))
    for ours, theirs in zip(loss_and_gradients(config, *arguments, **options), exact(settings), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


@EVERY_DEVICE
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("loss", "divergence"), LEGAL)
def test_float32_equals_float64(monkeypatch, loss, divergence, temperature, device):
    monkeypatch.setattr(fused, "chunk_rows", lambda device: 64)  # the last chunk is shorter
    config = StudentConfig(loss=loss, divergence=divergence, temperature=temperature)
    check(config, 1e-4, torch.float32, device)


@EVERY_DEVICE
@pytest.mark.parametrize(("autocast", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 256.0)])
def test_half_precision_is_near(autocast, scale, device):
    check(StudentConfig(), 2e-2, torch.float32, device, autocast=autocast, scale=scale)


@ON_A_CARD
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("loss", "divergence"), LEGAL)
def test_compiled_kernels_give_the_same(monkeypatch, loss, divergence, temperature, autocast):
    monkeypatch.setattr(fused, "chunk_rows", lambda device: 64)
    torch.compiler.reset()
    config = StudentConfig(loss=loss, divergence=divergence, temperature=temperature)
    check(config, 1e-4 if autocast is None else 2e-2, torch.float32, "cuda", autocast=autocast, compiles=True)
