"""Sampled losses are unbiased: their mean gradient over many draws is that of the full distribution."""

import numpy as np
import pytest
import torch

from shared.cache.format import Sampling
from stage2_student.config import StudentConfig
from stage2_student.losses import distill_
from stage2_student.soft_labels import Decoding, NarrowRows, decode

V, K, S, DRAWS = 40, 6, 8, 10_000


def logits():
    """A long-tailed teacher's, descending."""
    return -np.sort(-np.random.default_rng(0).normal(0, 2, V))


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


def narrow_rows(z, num_entries, temperature, samples=None, drawn_at=1.0):
    """One row as a cache has it, once per row of the samples: ids 0, 1, … with codes of their own."""
    counts, ids = samples or (np.zeros((DRAWS, 1)), np.zeros((DRAWS, 1)))
    number = len(ids)

    def log_tail(T):
        return torch.full((number,), float(np.log(np.exp((z[num_entries:] - z[0]) / T).sum())))

    return NarrowRows(
        ids=torch.arange(num_entries, dtype=torch.int32).repeat(number, 1),
        codes=torch.arange(num_entries, dtype=torch.uint8).repeat(number, 1),
        k=torch.full((number,), num_entries, dtype=torch.int32),
        log_tail=log_tail(temperature),
        codebook=torch.from_numpy(z[0] - z[:num_entries]).float()[None],
        sample_ids=torch.from_numpy(ids.astype(np.int32)),
        sample_counts=torch.from_numpy(counts.astype(np.int32)),
        sample_margins=torch.from_numpy(np.where(counts > 0, z[0] - z[ids.astype(int)], 0)).float(),
        sample_log_tail=log_tail(drawn_at),
    )


def draw(drawn_from, temperature):
    """S draws per row at `temperature`, as a cache gives them: counts and ids, the drawn ones first, ascending."""
    p = np.where((np.arange(V) >= K) | (drawn_from == "full"), softmax(logits() / temperature), 0)
    counts_DV = np.random.default_rng(1).multinomial(S, p / p.sum(), size=DRAWS)
    ids = np.argsort(counts_DV == 0, axis=1, kind="stable")[:, :S]
    return np.take_along_axis(counts_DV, ids, 1), ids


def gradients(loss, temperature, drawn_at):
    """The gradient of each draw [DRAWS, V], and the gradient of forward KL over all ids [V], in float64."""
    drawn_from = "tail" if loss == "hybrid" else "full"
    rows = narrow_rows(logits(), K, temperature, draw(drawn_from, drawn_at), drawn_at)
    sampling = Sampling(temperature=drawn_at, drawn_from=drawn_from, num=S)
    labels = decode(rows, torch.arange(DRAWS), Decoding(temperature=temperature, sampling=sampling))
    student = torch.randn(V, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2
    work = student.repeat(DRAWS, 1)
    config = StudentConfig(loss=loss, alpha=1.0, temperature=temperature)
    distill_(work, torch.zeros(DRAWS, dtype=torch.int64), labels, config)
    p = torch.from_numpy(softmax(logits() / temperature))
    return work, temperature * ((student / temperature).softmax(0) - p)


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
    p, sharp = softmax(z), softmax(2 * z)

    def weights(drawn_from, ids, temperature):
        counts, ids = np.array([[3, 1, 0, 0], [0] * 4]), np.array([[*ids, 0, 0], [0] * 4])
        rows = narrow_rows(z, 2, temperature, (counts, ids))
        rows = rows._replace(k=torch.tensor([2, 0]), log_tail=torch.tensor([rows.log_tail[0], -torch.inf]))
        sampling = Sampling(temperature=1.0, drawn_from=drawn_from, num=4)
        return decode(rows, torch.arange(2), Decoding(temperature=temperature, sampling=sampling)).sample_weights

    assert weights("full", [0, 3], 1.0).tolist() == [[0.75, 0.25, 0, 0], [0] * 4]
    for drawn_from, ids, temperature, expected in (
        ("full", [0, 3], 0.5, [0.75 * sharp[0] / p[0], 0.25 * sharp[3] / p[3]]),
        ("tail", [2, 3], 1.0, [0.75 * p[2:].sum(), 0.25 * p[2:].sum()]),
        ("tail", [2, 3], 0.5, [0.75 * sharp[2] * p[2:].sum() / p[2], 0.25 * sharp[3] * p[2:].sum() / p[3]]),
    ):
        got = weights(drawn_from, ids, temperature)
        np.testing.assert_allclose(got, [[*expected, 0, 0], [0] * 4], rtol=1e-6)
