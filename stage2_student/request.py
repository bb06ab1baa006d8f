"""What a training command asks for, as a digest: a finished run is found up to date without loading torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.cache.reader import Cache
from shared.checkpoints import WEIGHTS
from shared.errors import ConfigError
from shared.files import read_json, sha256_file, sha256_json
from shared.process import log, world_size


def request_digest(
    settings: Mapping[str, Any],
    caches: Sequence[Path],
    weights: Sequence[float] | None,
    validation: Path | None,
    others: Mapping[str, Any],
) -> str | None:
    """SHA-256 of a request; equal for equal settings and equal shards, wherever the caches lie.

    Args:
        settings: as they were given, before defaults.
        caches: to train on.
        weights: one per cache, or None.
        validation: the cache of held-out documents.
        others: further options; a request that has any of them gets no digest.

    Raises:
        CacheFormatError, CacheCorruptError: a cache cannot be opened.
    """
    if any(value is not None for value in others.values()):
        return None
    held_out = Cache(validation).manifest.shard_digests if validation else None
    shards = [Cache(path).manifest.shard_digests for path in caches]
    try:
        return sha256_json([dict(settings), shards, weights, held_out])
    except ValueError:  # a value that is not finite, which the config refuses by name
        return None


def is_up_to_date(out: Path, request: str | None) -> bool:
    """Whether the folder holds the finished student of this request; says so where it does.

    False is no answer: `train` compares everything.
    """
    if request is None or world_size() > 1:
        return False
    try:
        record = read_json(out / "run.json")
        done = record.get("request") == request and is_finished(out, record)
    except (ConfigError, OSError, KeyError, AttributeError):
        return False
    if done:
        log(f"{out} is up to date")
    return done


def is_finished(out: Path, record: Mapping[str, Any]) -> bool:
    """Whether a run is finished by its `run.json`, and its weights are those that training ended with."""
    weights = out / WEIGHTS
    finished = record["state"] == "finished" and weights.is_file()
    return finished and sha256_file(weights) == record["weights_sha256"]
