import random
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from shared.batching import plan_batches
from stage1_teacher.documents import plan_shards

REAL_MBPP = Path(__file__).parents[3] / "shared/data/mbpp.jsonl"


def test_shards_hold_whole_documents_in_order():
    assert plan_shards([4, 4, 3, 9, 1], 8) == [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    assert plan_shards([4, 4], 8) == [range(0, 2)]
    assert plan_shards([], 8) == []


def test_batches_are_longest_first_with_ties_in_shard_order():
    assert plan_batches([3, 5, 3, 9, 5], 10) == [[3], [1, 4], [0, 2]]


def test_a_document_above_the_budget_is_a_batch_alone():
    assert plan_batches([100, 2, 2], 10) == [[0], [1, 2]]
    assert plan_batches([], 10) == []


def test_a_long_document_is_not_joined_by_short_ones():
    """Nine of 20 beside one of 400 would be padded by 3,420 tokens; another batch costs 64."""
    assert plan_batches([400] + [20] * 9, 4096) == [[0], [1, 2, 3, 4, 5, 6, 7, 8, 9]]


@pytest.mark.parametrize("budget", [20, 300, 5000])
def test_no_other_cut_of_the_sorted_documents_costs_less(budget):
    lengths = random.Random(budget).choices(range(1, 200), k=11)
    ordered = sorted(lengths, reverse=True)

    def cost(borders):
        batches = [ordered[a:b] for a, b in pairwise((0, *borders, len(ordered)))]
        if any(len(batch) > 1 and len(batch) * batch[0] > budget for batch in batches):
            return float("inf")
        return sum(len(batch) * batch[0] + 64 for batch in batches)

    cheapest = min(cost(borders) for n in range(11) for borders in combinations(range(1, 11), n))
    batches = plan_batches(lengths, budget)
    assert sum(len(batch) * lengths[batch[0]] + 64 for batch in batches) == cheapest


def test_every_document_once_within_budget_and_little_padding():
    lengths = [random.Random(7).randint(60, 700) for _ in range(180)]
    for budget in (1024, 2048, 4096):
        batches = plan_batches(lengths, budget)
        assert sorted(i for batch in batches for i in batch) == list(range(180))
        assert max(len(batch) * lengths[batch[0]] for batch in batches) <= budget


@pytest.mark.skipif(not REAL_MBPP.exists(), reason="the real MBPP file does not lie beside")
@pytest.mark.parametrize(("shard_tokens", "batch_tokens"), [(32_768, 1_024), (32_768, 4_096), (131_072, 4_096)])
def test_padding_on_mbpp_is_below_three_percent(shard_tokens, batch_tokens):
    from data.load import load_documents

    # About 2.5 bytes are a token: lengths in proportion are what matters.
    lengths = [
        round(len(f"{d.prompt}{d.completion}".encode()) / 2.4)
        for d in load_documents(str(REAL_MBPP), "train").documents
    ]
    padded = real = 0
    for shard in plan_shards(lengths, shard_tokens):
        shard_lengths = [lengths[i] for i in shard]
        for batch in plan_batches(shard_lengths, batch_tokens):
            padded += len(batch) * shard_lengths[batch[0]]
            real += sum(shard_lengths[i] for i in batch)
    assert real == sum(lengths)
    assert 1 - real / padded < 0.03
