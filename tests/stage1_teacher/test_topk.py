import math

import numpy as np
import pytest
import torch

from shared.logits import largest_by_sorting
from stage1_teacher import topk
from stage1_teacher.topk import CapturedRows, HostRows, capture_rows

GRID = (0.5, 1.0, 1.5, 2.0)


@pytest.fixture(params=["a CPU's way", "a GPU's way"], autouse=True)
def way(request, monkeypatch):
    """A GPU's way that a CPU has, too."""
    if request.param == "a GPU's way":
        monkeypatch.setattr(topk, "split_by_blocks", topk.split_at_once)
        monkeypatch.setattr(topk, "largest", largest_by_sorting)


def label(logits, gold=None, *, top_k=4, temperatures=GRID, tokenizer_size=None):
    logits = torch.as_tensor(logits, dtype=torch.float32)
    gold = torch.zeros(len(logits), dtype=torch.int64) if gold is None else torch.as_tensor(gold)
    size = logits.shape[1] if tokenizer_size is None else tokenizer_size
    return capture_rows(logits.clone(), gold, top_k=top_k, temperatures=temperatures, tokenizer_size=size)


def reference(logits, gold, top_k, temperatures):
    """The same figures, row by row in float64 by sorting."""
    z = np.asarray(logits, dtype=np.float64)
    order = np.lexsort((np.broadcast_to(np.arange(z.shape[1]), z.shape), -z), axis=1)
    s = np.take_along_axis(z, order, 1)
    tail = s[:, top_k:]
    with np.errstate(divide="ignore"):
        logs = [
            np.log(np.exp((tail - tail.max(1, keepdims=True)) / t).sum(1)) + (tail.max(1) - s[:, 0]) / t
            if tail.shape[1]
            else np.full(len(z), -np.inf)
            for t in temperatures
        ]
    logp = s - s[:, :1] - np.log(np.exp(s - s[:, :1]).sum(1, keepdims=True))
    p = np.exp(logp)
    return {
        "ids": order[:, :top_k],
        "margins": s[:, :1] - s[:, :top_k],
        "tail_log": np.stack(logs, 1),
        "entropy": -(np.where(p > 0, p * logp, 0.0)).sum(1),
        "gold": np.take_along_axis(logp, np.argsort(order, 1)[np.arange(len(z)), gold][:, None], 1)[:, 0],
        "rank": np.minimum(np.argsort(order, 1)[np.arange(len(z)), gold], top_k),
    }


@pytest.mark.parametrize(("scale", "vocabulary", "top_k"), [(1, 300, 5), (4, 5000, 64), (0.01, 100, 99), (30, 700, 16)])
def test_equals_a_float64_reference(scale, vocabulary, top_k):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(37, vocabulary, generator=generator) * scale
    gold = torch.randint(vocabulary, (37,), generator=generator)
    rows = label(logits, gold, top_k=top_k)
    want = reference(logits, gold.numpy(), top_k, GRID)
    np.testing.assert_array_equal(rows.ids.numpy(), want["ids"])
    np.testing.assert_array_equal(rows.gold_rank.numpy(), want["rank"])
    np.testing.assert_array_equal(rows.k.numpy(), np.full(37, top_k))
    np.testing.assert_allclose(rows.margins.numpy(), want["margins"], rtol=1e-6)
    np.testing.assert_allclose(rows.tail_log.numpy(), want["tail_log"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(rows.entropy_nats.numpy(), want["entropy"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rows.gold_logprob.numpy(), want["gold"], rtol=1e-6, atol=1e-6)
    assert rows.excess_mass.tolist() == [0.0] * 37


@pytest.mark.parametrize("mass", [1e-2, 1e-6, 1e-12])
def test_a_small_tail_keeps_its_digits(mass):
    """A tail of 1,000 equal logits that together hold `mass` relative to the top: total − head would lose it."""
    level = math.log(mass / 1000)
    rows = label([[0.0, -1.0] + [level] * 1000], top_k=2)
    level = float(np.float32(level))
    want = [math.log(1000) + level / t for t in GRID]
    np.testing.assert_allclose(rows.tail_log[0].numpy(), want, rtol=1e-6)


def test_without_a_tail_it_is_minus_infinity_and_entropy_is_exact():
    for top_k in (4, 9):
        rows = label([[0.0, 0.0, 0.0, 0.0]], top_k=top_k)
        assert rows.k.tolist() == [4]
        assert rows.tail_log.tolist() == [[-math.inf] * 4]
        assert rows.entropy_nats.item() == pytest.approx(math.log(4), abs=1e-7)


def test_entries_of_minus_infinity_are_not_counted():
    rows = label([[1.0, -math.inf, 2.0, -math.inf, -math.inf, -math.inf]], [1], top_k=4)
    assert rows.k.tolist() == [2]
    assert rows.ids[0, :2].tolist() == [2, 0]
    assert rows.tail_log.tolist() == [[-math.inf] * 4]
    assert rows.gold_logprob.item() == -math.inf
    assert rows.gold_rank.tolist() == [4]
    p = 1 / (1 + math.exp(-1))
    assert rows.entropy_nats.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-7)


def test_minus_infinity_in_the_tail_adds_nothing():
    rows = label([[3.0, 2.0, 1.0, -math.inf]], top_k=2)
    assert rows.k.tolist() == [2]
    np.testing.assert_allclose(rows.tail_log[0].numpy(), [-2 / t for t in GRID], rtol=1e-6)


def test_ties_are_ordered_by_id_also_across_the_boundary():
    values = torch.tensor([[1.0, 5.0, 3.0, 3.0, 5.0, 3.0, 0.0, 3.0]])
    for top_k, want in [(1, [1]), (2, [1, 4]), (3, [1, 4, 2]), (4, [1, 4, 2, 3]), (6, [1, 4, 2, 3, 5, 7])]:
        assert label(values, top_k=top_k).ids[0].tolist() == want


def test_smaller_k_is_a_prefix_of_larger_on_coarse_logits():
    logits = torch.randn(50, 2000, generator=torch.Generator().manual_seed(1)).mul(2).round()
    want = reference(logits, np.zeros(50, int), 100, GRID)["ids"]
    for top_k in (1, 10, 100):
        np.testing.assert_array_equal(label(logits, top_k=top_k).ids.numpy(), want[:, :top_k])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_unusable_rows_show_in_the_top_logit_and_spare_their_neighbours(bad):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    clean = label(logits)
    logits[1, 20] = bad
    rows = label(logits)
    assert rows.top_logit.isfinite().tolist() == [True, False, True]
    assert torch.equal(rows.tail_log[[0, 2]], clean.tail_log[[0, 2]])
    assert not label([[-math.inf] * 6]).top_logit.isfinite().item()


def test_ids_beyond_the_tokenizer_are_masked_and_their_mass_recorded():
    inside = [[1.0, 0.0, -1.0, 0.5, 0.2]]
    rows = label([[*inside[0], 9.0, 2.0]], top_k=3, tokenizer_size=5)
    alone = label(inside, top_k=3)
    assert torch.equal(rows.tail_log, alone.tail_log)
    assert torch.equal(rows.gold_logprob, alone.gold_logprob)
    e = np.exp([*inside[0], 9.0, 2.0])
    assert rows.excess_mass.item() == pytest.approx(e[5:].sum() / e.sum(), rel=1e-6)


def test_a_grid_of_one_temperature():
    logits = torch.randn(5, 90, generator=torch.Generator().manual_seed(4))
    alone, of_four = label(logits, temperatures=(1.0,)).tail_log[:, 0], label(logits).tail_log[:, 1]
    torch.testing.assert_close(alone, of_four, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("vocabulary", "top_k", "step"), [(5000, 20, 0.5), (4099, 64, 0.05), (70_001, 300, 0.01)])
def test_ties_are_exact_in_a_vocabulary_searched_by_groups(vocabulary, top_k, step):
    """Coarse logits, so that groups' maxima tie with each other and the boundary; a vocabulary with a remainder."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (torch.randn(20, vocabulary, generator=generator) / step).round() * step
    logits[0] = 0.0
    logits[1, torch.randperm(vocabulary, generator=generator)[: vocabulary - top_k // 2]] = -math.inf
    gold = torch.randint(vocabulary, (20,), generator=generator)
    rows = label(logits, gold, top_k=top_k)
    want = reference(logits[2:], gold[2:].numpy(), top_k, GRID)
    np.testing.assert_array_equal(rows.ids[2:].numpy(), want["ids"])
    np.testing.assert_array_equal(rows.gold_rank[2:].numpy(), want["rank"])
    np.testing.assert_allclose(rows.tail_log[2:].numpy(), want["tail_log"], rtol=1e-6, atol=2e-6)
    assert rows.ids[0].tolist() == list(range(top_k))
    np.testing.assert_allclose(rows.tail_log[0].numpy(), [math.log(vocabulary - top_k)] * 4, rtol=1e-6)
    finite = logits[1].isfinite().nonzero().squeeze(1)
    assert rows.k[1] == len(finite) == top_k // 2
    assert sorted(rows.ids[1, : len(finite)].tolist()) == finite.tolist()
    assert rows.tail_log[1].tolist() == [-math.inf] * 4


@pytest.mark.parametrize(
    "grid", [(0.5, 1.0, 2.0, 4.0), (0.7, 1.0, 1.3), (1.0, 1.5, 3.0), (0.01, 1.0, 50.0), (1.0, math.pi)]
)
def test_any_grid_equals_a_float64_reference(grid):
    logits = torch.randn(19, 3000, generator=torch.Generator().manual_seed(8)) * 5
    rows = label(logits, top_k=10, temperatures=grid)
    want = reference(logits, np.zeros(19, int), 10, grid)
    np.testing.assert_allclose(rows.tail_log.numpy(), want["tail_log"], rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(rows.entropy_nats.numpy(), want["entropy"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_a_constant_added_to_all_logits_changes_nothing(shift):
    logits = torch.randn(9, 400, generator=torch.Generator().manual_seed(5)).mul(64).round() / 64
    assert torch.equal((logits + shift) - shift, logits)
    rows, moved = label(logits), label(logits + shift)
    for name in ("ids", "margins", "tail_log", "entropy_nats", "gold_logprob"):
        assert torch.equal(getattr(rows, name), getattr(moved, name))


def test_rows_reach_the_host_as_one_buffer():
    generator = torch.Generator().manual_seed(6)
    chunks = [label(torch.randn(n, 90, generator=generator), top_k=7) for n in (3, 5)]
    arrays = HostRows(chunks).arrays()
    assert arrays.keys() == {name for name in CapturedRows.__dataclass_fields__ if not name.startswith("sample")}
    for name, array in arrays.items():
        want = torch.cat([getattr(chunk, name) for chunk in chunks])
        np.testing.assert_array_equal(array, want.numpy())
        assert array.flags.aligned and array.dtype == ("int32" if want.dtype == torch.int64 else want.numpy().dtype)
