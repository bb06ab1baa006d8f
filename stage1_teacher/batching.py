"""Documents → shards: a pure function of their lengths, so that any resume and any world size makes the same shards."""

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
