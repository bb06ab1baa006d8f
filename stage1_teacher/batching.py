"""Shard → batches: pure functions of document lengths, so that any resume and any world size makes the same shard."""

from collections.abc import Sequence


def plan_shards(lengths: Sequence[int], shard_tokens: int) -> list[range]:
    """Cut documents, in order, into shards of at most `shard_tokens` tokens (a longer document is a shard alone).

    Args:
        lengths: tokens of each document.
        shard_tokens: most tokens of a shard.

    Returns:
        The document indices of each shard.
    """
    shards: list[range] = []
    start = tokens = 0
    for index, length in enumerate(lengths):
        if index > start and tokens + length > shard_tokens:
            shards.append(range(start, index))
            start, tokens = index, 0
        tokens += length
    return [*shards, range(start, len(lengths))] if lengths else []


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Group a shard's documents by length, so that little of a batch is padding.

    Args:
        lengths: tokens of each document of the shard.
        token_budget: most tokens of a batch, padding included (a longer document is a batch alone).

    Returns:
        Document indices of each batch, longest first (running out of memory shows at the start), ties in shard order.
    """
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if room == 0:
            batches.append([])
            room = max(token_budget // lengths[index], 1)  # the first document is the longest: it sets the width
        batches[-1].append(index)
        room -= 1
    return batches
