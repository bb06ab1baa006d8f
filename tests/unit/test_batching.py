import random

from stage1_teacher.batching import plan_batches, plan_shards


def test_shards_hold_whole_documents_in_order():
    assert plan_shards([4, 4, 3, 9, 1], 8) == [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    assert plan_shards([4, 4], 8) == [range(0, 2)]
    assert plan_shards([], 8) == []


def test_batches_are_longest_first_with_ties_in_shard_order():
    assert plan_batches([3, 5, 3, 9, 5], 10) == [[3], [1, 4], [0, 2]]


def test_a_document_above_the_budget_is_a_batch_alone():
    assert plan_batches([100, 2, 2], 10) == [[0], [1, 2]]


def test_every_document_once_within_budget_and_little_padding():
    lengths = [random.Random(7).randint(60, 700) for _ in range(180)]
    batches = plan_batches(lengths, 2048)
    assert sorted(i for batch in batches for i in batch) == list(range(180))
    padded = [len(batch) * lengths[batch[0]] for batch in batches]
    assert max(padded) <= 2048
    assert sum(padded) < 1.04 * sum(lengths)
    assert plan_batches(lengths, 2048) == batches
