import math

import numpy as np
import pytest
import torch

from stage1_teacher.sampling import draw, to_samples, uniforms

META = {"id": "d", "digest": "5f" * 32}


def test_uniforms_follow_from_digest_part_and_position_alone():
    long, short = uniforms(META, 40, 8), uniforms(META | {"id": "other"}, 25, 8)
    assert np.array_equal(long[:25], short)
    assert not np.array_equal(long, uniforms(META | {"digest": "60" * 32}, 40, 8))
    assert not np.array_equal(long, uniforms(META | {"part": 1, "parts": 2}, 40, 8))
    assert np.array_equal(long, uniforms(META | {"part": 0, "parts": 2}, 40, 8))
    assert (long.min() >= 0, long.max() < 1) == (True, True)


def test_inversion_is_exact_at_the_borders_of_the_cells():
    z = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).log()  # id 1 has no mass
    u = torch.tensor([[0.0, 0.2499, 0.2501, 0.7499, 0.7501, math.nextafter(1, 0)]], dtype=torch.float64)
    ids, logits = draw(z, u, 1.0)
    assert ids.tolist() == [[0, 0, 2, 2, 3, 3]]
    assert torch.equal(logits, z.gather(1, ids))


def test_an_id_without_mass_at_the_end_is_never_drawn():
    z = torch.full((3, 1000), -torch.inf)
    z[0, 7], z[1, :500] = 2.0, torch.randn(500, generator=torch.Generator().manual_seed(1))
    ids, _ = draw(z, torch.tensor([[0.0, math.nextafter(1, 0)]], dtype=torch.float64).expand(3, 2), 1.0)
    assert ids.tolist() == [[7, 7], [0, 499], [-1, -1]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_distributions(temperature):
    """Pearson's χ² of 40,000 draws per row over 30 cells: with 29 degrees, above 58.3 once in a thousand."""
    z = torch.randn(4, 30, generator=torch.Generator().manual_seed(2)) * 1.5
    u = np.concatenate([uniforms(META | {"part": part}, 1, 40_000) for part in range(4)])
    ids, _ = draw(z, torch.from_numpy(u), temperature)
    expected = (z.double() / temperature).softmax(1).numpy() * 40_000
    for row in range(4):
        observed = np.bincount(ids[row].numpy(), minlength=30)
        assert ((observed - expected[row]) ** 2 / expected[row]).sum() < 58.3


def test_weighted_draws_estimate_another_temperature_without_bias():
    """E[count/S · p_T/p_Ts] = p_T: within five standard errors in every cell."""
    z = torch.randn(1, 12, generator=torch.Generator().manual_seed(3))
    p_s, p = (z[0].double() / 2).softmax(0).numpy(), z[0].double().softmax(0).numpy()
    ids, _ = draw(z, torch.from_numpy(uniforms(META, 1, 50_000)), 2.0)
    weights = np.bincount(ids[0].numpy(), minlength=12) / 50_000 * p / p_s
    errors = p / p_s * np.sqrt(p_s * (1 - p_s) / 50_000)
    assert np.abs((weights - p) / errors).max() < 5


def test_a_row_draws_the_same_in_any_chunk():
    z = torch.randn(21, 500, generator=torch.Generator().manual_seed(4)) * 3
    u = torch.from_numpy(uniforms(META, 21, 16))
    together, _ = draw(z, u, 1.0)
    alone = torch.cat([draw(z[i : i + 1], u[i : i + 1], 1.0)[0] for i in range(21)])
    assert torch.equal(together, alone)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(5))
    assert torch.equal(draw(z[order], u[order], 1.0)[0], together[order])


def test_equal_draws_are_counted():
    ids = np.array([[5, 2, 5, 5], [-1, -1, -1, -1], [5, 5, 5, 5], [5, 9, 1, 0]])
    margins = ids.astype(np.float32) / 2
    samples = to_samples(ids, margins, temperature=1.0, drawn_from="tail")
    assert samples.k.tolist() == [2, 0, 1, 4]
    assert samples.ids.tolist() == [2, 5, 5, 0, 1, 5, 9]
    assert samples.counts.tolist() == [1, 3, 4, 1, 1, 1, 1]
    assert samples.margins.tolist() == [1.0, 2.5, 2.5, 0.0, 0.5, 2.5, 4.5]
    assert (samples.num, samples.drawn_from, samples.temperature) == (4, "tail", 1.0)


def test_a_single_draw_per_row():
    samples = to_samples(np.array([[3], [-1], [3]]), np.zeros((3, 1), np.float32), temperature=1.0, drawn_from="full")
    assert (samples.k.tolist(), samples.ids.tolist(), samples.counts.tolist()) == ([1, 0, 1], [3, 3], [1, 1])
