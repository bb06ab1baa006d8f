"""The figures of `eval fidelity` against float64 references."""

import numpy as np
import pytest
import torch

from shared.eval.fidelity import compare_rows


def reference(z, gold, k, ids, p, tail):
    """NLL and KL of one row by the definition, in float64, over the explicit K+1 cells."""
    q = np.exp(z - z.max())
    q /= q.sum()
    head = ids[:k]
    cells = [(p[i], q[id]) for i, id in enumerate(head)] + [(tail, np.delete(q, head).sum())]
    return -np.log(q[gold]), sum(a * np.log(a / b) for a, b in cells if a > 0)


def rows(seed, N=40, V=50, K=8):
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 6, (N, V))
    k = rng.integers(1, K + 1, N)
    ids = np.zeros((N, K), np.int64)
    logp = np.full((N, K), -np.inf)
    log_tail = np.full(N, -np.inf)
    for row in range(N):
        p = np.sort(rng.dirichlet(np.ones(k[row] + 1)))[::-1]
        ids[row, : k[row]] = rng.permutation(np.arange(1, V))[: k[row]]  # never 0, which pads
        logp[row, : k[row]], log_tail[row] = np.log(p[: k[row]]), np.log(p[-1])
    return z, rng.integers(0, V, N), k, ids, logp, log_tail


def as_tensors(z, gold, k, ids, logp, log_tail):
    floats = [torch.tensor(a, dtype=torch.float32) for a in (z, logp, log_tail)]
    return floats[0], torch.tensor(gold), torch.tensor(k), torch.tensor(ids), floats[1], floats[2]


def test_rows_equal_the_float64_reference():
    z, gold, k, ids, logp, log_tail = rows(0)
    nll, kl, agreed = compare_rows(*as_tensors(z, gold, k, ids, logp, log_tail))
    expected = [reference(*row) for row in zip(z, gold, k, ids, np.exp(logp), np.exp(log_tail), strict=True)]
    np.testing.assert_allclose(nll, [a for a, _ in expected], rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(kl, [b for _, b in expected], rtol=2e-6, atol=4e-6)
    np.testing.assert_array_equal(agreed, z.argmax(1) == ids[:, 0])


def test_a_student_tail_of_1e_9_is_exact_where_one_minus_the_head_is_noise():
    z = torch.zeros(1, 1002)
    z[0, 2:] = -27.0
    target = [torch.tensor([[0.4, 0.4]]).log(), torch.tensor([0.2]).log()]
    _, kl, _ = compare_rows(z, torch.tensor([0]), torch.tensor([2]), torch.tensor([[0, 1]]), *target)
    q_tail = 1000 * np.exp(-27.0) / (2 + 1000 * np.exp(-27.0))
    expected = 0.8 * np.log(0.4 / ((1 - q_tail) / 2)) + 0.2 * np.log(0.2 / q_tail)
    assert kl.item() == pytest.approx(expected, rel=1e-6)


def test_a_full_row_has_no_tail():
    z = torch.tensor([[1.0, 0.0, -1.0]])
    logp = z.log_softmax(1)
    nll, kl, agreed = compare_rows(
        z, torch.tensor([2]), torch.tensor([3]), torch.tensor([[0, 1, 2]]), logp, torch.tensor([-torch.inf])
    )
    assert nll.item() == pytest.approx(-logp[0, 2].item(), rel=1e-6)
    assert kl.item() == pytest.approx(0, abs=1e-7)
    assert agreed.item()
