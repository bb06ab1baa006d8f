"""The fused head and loss equal plain autograd through a full logits tensor, for every chunk size."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from shared.model.gpt import IGNORE
from stage2_student import fused
from stage2_student.config import StudentConfig
from tests.support.given_labels import GivenLabels

N, H, V, K = 13, 8, 30, 4
LEGAL = [
    *itertools.product(("ghost", "truncated"), ("forward", "reverse", "jsd", "skewed-forward", "skewed-reverse")),
    ("sampled", "forward"),
    ("hybrid", "forward"),
]
SETTINGS = [(0.0, 1.0), (0.7, 1.0), (0.7, 1.5), (1.0, 2.0)]


def inputs(dtype=torch.float32, *, num_rows=N, num_ids=V, hidden_size=H):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, hidden_size, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(num_ids, hidden_size, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, num_ids, (num_rows,), generator=generator)
    labels[::5] = IGNORE
    teacher = (torch.randn(num_rows, num_ids, generator=generator, dtype=dtype) * 2).log_softmax(1)
    logp, ids = teacher.topk(K + 2)
    soft = {
        "soft_ids": ids[None, :, :K],  # as in a batch: [B, T, K]
        "soft_logp": logp[None, :, :K],
        "soft_log_tail": torch.log1p(-logp[:, :K].exp().sum(1))[None],
        "soft_k": torch.full((1, num_rows), K),
        "soft_sample_ids": ids[None, :, K:],
        "soft_sample_weights": torch.rand(1, num_rows, 2, generator=generator, dtype=dtype),
    }
    return hidden, weight, labels, soft


def unfused(hidden, weight, labels, soft, *, alpha, temperature):
    """The same loss by autograd over dense logits."""
    z = F.linear(hidden, weight)
    valid = labels != IGNORE
    ce = F.cross_entropy(z, labels, ignore_index=IGNORE, reduction="sum")
    log_q = (z / temperature).log_softmax(1)
    ids, logp, log_tail = soft["soft_ids"][0], soft["soft_logp"][0], soft["soft_log_tail"][0]
    tail = log_q.scatter(1, ids, -torch.inf).logsumexp(1)
    kd = (logp.exp() * (logp - log_q.gather(1, ids))).sum(1) + log_tail.exp() * (log_tail - tail)
    kd = (kd * valid).sum()
    return (alpha * temperature**2 * kd + (1 - alpha) * ce) / valid.sum(), kd, ce


@pytest.mark.parametrize(("alpha", "temperature"), SETTINGS)
@pytest.mark.parametrize("chunk", [1, 4, N - 1, N, N + 1, 256])
def test_fused_equals_unfused_for_every_chunk_size(monkeypatch, chunk, alpha, temperature):
    monkeypatch.setattr(fused, "chunk_rows", lambda device: chunk)
    hidden, weight, labels, soft = inputs()
    loss, kd, ce = unfused(hidden, weight, labels, soft, alpha=alpha, temperature=temperature)
    expected = torch.autograd.grad(loss, (hidden, weight))
    out = GivenLabels(StudentConfig(alpha=alpha, temperature=temperature))(hidden, weight, labels, **soft)
    torch.testing.assert_close(out["loss"], loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(out["ce"], ce.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out["kd"], kd.detach(), rtol=1e-6, atol=0)
    assert not out["kd"].requires_grad
    gradients = torch.autograd.grad(out["loss"], (hidden, weight))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_tied_weight_gets_the_gradient_of_both_its_uses():
    _, weight, labels, soft = inputs()
    ids = torch.arange(N)
    loss = GivenLabels(StudentConfig(alpha=0.7, temperature=1.5))(F.embedding(ids, weight) * 2, weight, labels, **soft)[
        "loss"
    ]
    expected = unfused(F.embedding(ids, weight) * 2, weight, labels, soft, alpha=0.7, temperature=1.5)[0]
    ours, theirs = (torch.autograd.grad(x, weight)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class Repeatable(torch.autograd.Function):
    """A loss whose backward pass may run more than once, as gradcheck asks: the gradients are taken at once."""

    @staticmethod
    def forward(ctx, function, *inputs):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs]
            loss = function(*leaves)
        ctx.save_for_backward(*torch.autograd.grad(loss, leaves))
        return loss.detach()

    @staticmethod
    def backward(ctx, gradient):
        return None, *(gradient * x for x in ctx.saved_tensors)


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize(("loss", "divergence"), LEGAL)
def test_gradcheck_in_float64(monkeypatch, loss, divergence, temperature):
    monkeypatch.setattr(fused, "chunk_rows", lambda device: 3)
    hidden, weight, labels, soft = inputs(torch.float64, num_rows=5, num_ids=9, hidden_size=3)
    head_loss = GivenLabels(StudentConfig(loss=loss, divergence=divergence, alpha=0.7, temperature=temperature))
    assert torch.autograd.gradcheck(
        lambda h, w: Repeatable.apply(lambda h, w: head_loss(h, w, labels, **soft)["loss"], h, w), (hidden, weight)
    )


def test_a_second_backward_pass_fails_loudly():
    hidden, weight, labels, soft = inputs()
    loss = GivenLabels(StudentConfig(alpha=0.7))(hidden, weight, labels, **soft)["loss"]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_matrix_gradient_is_handed_over_not_copied():
    hidden, weight, labels, soft = inputs()
    loss = GivenLabels(StudentConfig(alpha=0.7))(hidden, weight, labels, **soft)["loss"]
    _, saved = (tensor.data_ptr() for tensor in loss.grad_fn.next_functions[0][0].saved_tensors)
    loss.backward()
    assert weight.grad.data_ptr() == saved


@pytest.mark.parametrize(("alpha", "temperature"), SETTINGS)
def test_under_bf16_autocast_the_softmax_stays_in_float32(alpha, temperature):
    hidden, weight, labels, soft = inputs()
    expected, _, _ = unfused(hidden, weight, labels, soft, alpha=alpha, temperature=temperature)
    with torch.autocast("cpu", torch.bfloat16):
        loss = GivenLabels(StudentConfig(alpha=alpha, temperature=temperature))(hidden, weight, labels, **soft)["loss"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    ours = torch.autograd.grad(loss, (hidden, weight))
    theirs = torch.autograd.grad(expected, (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0.03 * b.abs().max().item())


@pytest.mark.parametrize("number", [100, torch.tensor(100)])
def test_the_sum_is_divided_by_the_number_of_items_in_the_window(number):
    hidden, weight, labels, soft = inputs()
    head_loss = GivenLabels(StudentConfig(alpha=0.7, temperature=1.0))
    here = head_loss(hidden, weight, labels, **soft)["loss"]
    window = head_loss(hidden, weight, labels, num_items_in_batch=number, **soft)["loss"]
    torch.testing.assert_close(window * 100, here * (labels != IGNORE).sum())


@pytest.mark.parametrize("number", [None, 0, 5, torch.tensor(0)])
def test_blocks_without_targets_add_exactly_nothing(number):
    hidden, weight, labels, soft = inputs()
    labels = torch.full_like(labels, IGNORE)
    loss = GivenLabels(StudentConfig(alpha=0.7, temperature=1.0))(
        hidden, weight, labels, num_items_in_batch=number, **soft
    )["loss"]
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, (hidden, weight)))


def test_alpha_0_needs_no_soft_labels_and_only_measures_those_it_gets():
    hidden, weight, labels, soft = inputs()
    head_loss = GivenLabels(StudentConfig(alpha=0, temperature=1.0))
    expected = F.cross_entropy(F.linear(hidden, weight), labels, ignore_index=IGNORE)
    kd = unfused(hidden, weight, labels, soft, alpha=1.0, temperature=1.0)[1]
    theirs = torch.autograd.grad(expected, (hidden, weight))
    for given, measured in (({}, torch.tensor(0.0)), (soft, kd.detach())):
        out = head_loss(hidden, weight, labels, **given)
        torch.testing.assert_close(out["loss"], expected)
        torch.testing.assert_close(out["kd"], measured)
        torch.testing.assert_close(torch.autograd.grad(out["loss"], (hidden, weight)), theirs)


def test_without_gradients_the_figures_are_the_same():
    hidden, weight, labels, soft = inputs()
    head_loss = GivenLabels(StudentConfig(alpha=0.7, temperature=1.5))
    expected = head_loss(hidden, weight, labels, **soft)
    with torch.no_grad():
        out = head_loss(hidden, weight, labels, **soft)
    assert {name: value.item() for name, value in out.items()} == {n: v.item() for n, v in expected.items()}
    assert not out["loss"].requires_grad


def test_alpha_above_0_needs_soft_labels():
    hidden, weight, labels, _ = inputs()
    with pytest.raises(KeyError, match="soft_ids"):
        GivenLabels(StudentConfig(alpha=0.1, temperature=1.0))(hidden, weight, labels)


@pytest.mark.parametrize(("alpha", "temperature"), SETTINGS)
def test_a_traced_chunk_gives_the_same_loss_and_gradients(monkeypatch, alpha, temperature):
    monkeypatch.setattr(fused, "chunk_rows", lambda device: 8)  # and a shorter one
    compiler = torch.compile  # inductor takes minutes: `make soak` and `tests/gpu` run it
    monkeypatch.setattr(torch, "compile", lambda chunk, options: compiler(chunk, backend="aot_eager", fullgraph=True))
    hidden, weight, labels, soft = inputs()
    config, results = StudentConfig(alpha=alpha, temperature=temperature), []
    for compiles in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            # As the model calls it: where nothing else is compiled.
            head_loss = torch.compiler.disable(GivenLabels(config, compiles=compiles).__call__)
            loss = head_loss(hidden, weight, labels, **soft)["loss"]
        results.append([loss, *torch.autograd.grad(loss, (hidden, weight))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_float16_rounds_the_scaled_gradients(scale):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 16, generator=generator).half().float().requires_grad_()
    weight = (2 * torch.randn(512, 16, generator=generator)).half().float().requires_grad_()
    labels = torch.arange(64)  # ids above are never right: their rows of the matrix have small gradients only
    exact = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="mean")
    expected = torch.autograd.grad(exact, (hidden, weight))
    head_loss = GivenLabels(StudentConfig(alpha=0.0))
    head_loss.scaled = lambda loss: scale * loss
    with torch.autocast("cpu", torch.float16):
        loss = head_loss(hidden, weight, labels)["loss"]
    ours = torch.autograd.grad(scale * loss, (hidden, weight))
    small = expected[1].norm(dim=1) < 1e-7
    assert small.sum() > 3
    errors = ((ours[1] / scale - expected[1]).norm(dim=1) / expected[1].norm(dim=1))[small]
    assert (errors > 0.3).any() if scale == 1 else (errors < 0.01).all()
    torch.testing.assert_close(ours[0] / scale, expected[0], rtol=0, atol=5e-3 * expected[0].abs().max().item())
