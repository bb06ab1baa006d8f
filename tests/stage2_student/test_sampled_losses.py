"""Sampled losses are unbiased: their mean gradient over many draws is that of the full distribution."""

import numpy as np
import pytest
import torch

from shared.cache.shard import SampledTargets, Targets
from stage2_student.config import StudentConfig
from stage2_student.losses import SoftLabels, distill_
from stage2_student.samples import sample_weights

V, K, S, DRAWS = 40, 6, 8, 10_000


def teacher(temperature):
    """A long-tailed teacher: its logits, descending, its probabilities at T, and its cached row, once per draw."""
    logits = np.random.default_rng(0).normal(0, 2, V)
    logits = -np.sort(-logits)
    p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    targets = Targets(
        k=np.full(DRAWS, K),
        ids=np.tile(np.arange(K), (DRAWS, 1)),
        logp=np.tile(np.log(p[:K]), (DRAWS, 1)).astype(np.float32),
        log_tail=np.full(DRAWS, np.log(p[K:].sum()), np.float32),
    )
    return logits, p, targets


def draw(drawn_from, temperature):
    """S draws per row at `temperature`, as a cache gives them."""
    logits, p, _ = teacher(temperature)
    p = np.where((np.arange(V) >= K) | (drawn_from == "full"), p, 0)
    counts_DV = np.random.default_rng(1).multinomial(S, p / p.sum(), size=DRAWS)
    k = (counts_DV > 0).sum(1)
    ids = np.argsort(counts_DV == 0, axis=1, kind="stable")[:, :S]  # the drawn ones first, ascending
    counts = np.take_along_axis(counts_DV, ids, 1)
    margins = np.where(counts > 0, logits[0] - logits[ids], 0).astype(np.float32)
    return SampledTargets(
        k=k, ids=ids, counts=counts, margins=margins, temperature=temperature, drawn_from=drawn_from, num=S
    )


def gradients(loss, temperature, drawn_at):
    """The gradient of each draw [DRAWS, V], and the gradient of forward KL over all ids [V], in float64."""
    _, p, soft = teacher(temperature)
    samples = draw("tail" if loss == "hybrid" else "full", drawn_at)
    weights = sample_weights(samples, soft, teacher(drawn_at)[2], temperature)
    student = torch.randn(V, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2
    labels = SoftLabels(
        *(torch.from_numpy(x) for x in (soft.ids, soft.logp, soft.log_tail, soft.k, samples.ids, weights))
    )
    work = student.repeat(DRAWS, 1)
    config = StudentConfig(loss=loss, alpha=1.0, temperature=temperature)
    distill_(work, torch.zeros(DRAWS, dtype=torch.int64), labels, config)
    return work, temperature * ((student / temperature).softmax(0) - torch.from_numpy(p))


@pytest.mark.parametrize(("temperature", "drawn_at"), [(1.0, 1.0), (2.0, 2.0), (1.0, 1.5), (0.5, 1.0)])
@pytest.mark.parametrize("loss", ["sampled", "hybrid"])
def test_the_mean_gradient_is_that_of_the_full_distribution(loss, temperature, drawn_at):
    each, dense = gradients(loss, temperature, drawn_at)
    error = (each.mean(0) - dense).abs()
    standard_error = each.std(0) / DRAWS**0.5
    assert (error <= 4 * standard_error + 1e-7).all(), (error / standard_error).max()
    assert standard_error.max() < 0.01  # else the bound would say little


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_truncated_gradient_is_biased_far_beyond_that_bound(temperature):
    each, dense = gradients("truncated", temperature, temperature)
    sampled, _ = gradients("sampled", temperature, temperature)
    standard_error = sampled.std(0) / DRAWS**0.5
    assert ((each.mean(0) - dense).abs() > 10 * standard_error + 1e-7).any()


def test_ghost_is_biased_in_the_tail_alone():
    each, dense = gradients("ghost", 1.0, 1.0)
    torch.testing.assert_close(each[0, :K], dense[:K], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(each[0, K:].sum(), dense[K:].sum(), rtol=1e-6, atol=1e-7)


def test_weights_by_hand():
    """Two entries of logits 0 and −1, a tail of the ids of logits −2 and −3; drawn at T = 1, used at 1 and 0.5."""
    z = np.array([0.0, -1, -2, -3])
    p, sharp = np.exp(z) / np.exp(z).sum(), np.exp(2 * z) / np.exp(2 * z).sum()
    targets = [
        Targets(
            k=np.array([2, 0]),
            ids=np.array([[0, 1], [0, 0]]),
            logp=np.array([np.log(q[:2]), [-np.inf] * 2], np.float32),
            log_tail=np.array([np.log(q[2:].sum()), -np.inf], np.float32),
        )
        for q in (p, sharp)
    ]
    common = {"k": np.array([2, 0]), "temperature": 1.0, "num": 4}
    full = SampledTargets(
        ids=np.array([[0, 3, 0, 0], [0] * 4]),
        counts=np.array([[3, 1, 0, 0], [0] * 4]),
        margins=np.array([[0, 3, 0, 0], [0] * 4], np.float32),
        drawn_from="full",
        **common,
    )
    tail = SampledTargets(
        ids=np.array([[2, 3, 0, 0], [0] * 4]),
        counts=np.array([[3, 1, 0, 0], [0] * 4]),
        margins=np.array([[2, 3, 0, 0], [0] * 4], np.float32),
        drawn_from="tail",
        **common,
    )
    assert sample_weights(full, targets[0], targets[0], 1.0).tolist() == [[0.75, 0.25, 0, 0], [0] * 4]
    expected = {
        "full at 0.5": (full, [0.75 * sharp[0] / p[0], 0.25 * sharp[3] / p[3]], 0.5),
        "tail at 1": (tail, [0.75 * p[2:].sum(), 0.25 * p[2:].sum()], 1.0),
        "tail at 0.5": (tail, [0.75 * sharp[2] * p[2:].sum() / p[2], 0.25 * sharp[3] * p[2:].sum() / p[3]], 0.5),
    }
    for samples, weights, temperature in expected.values():
        got = sample_weights(samples, targets[temperature == 0.5], targets[0], temperature)
        np.testing.assert_allclose(got, [[*weights, 0, 0], [0] * 4], rtol=1e-6)
