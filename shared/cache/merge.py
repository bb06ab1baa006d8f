"""Joining caches of equal labels into one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.cache.derive import Input, Part, head_options, write_derived
from shared.cache.format import TEACHER_EVAL
from shared.cache.identity import require_same_labels
from shared.errors import CacheMismatchError, ConfigError


def merge_caches(paths: Sequence[Path | str], out: Path | str) -> int:
    """Write the documents of several caches, in order, as one cache; run again after a kill it continues.

    Shards are copied byte for byte. A document whose digest an earlier cache holds is left out, which encodes its shard
    again. `teacher_eval/` comes from the first cache that has one.

    Returns:
        The number of documents left out.

    Raises:
        CacheMismatchError: the caches' labels or encodings differ; both are named, and in what.
        CacheFormatError, CacheCorruptError: one of them is no finished cache, or damaged.
    """
    if len(paths) < 2:
        raise ConfigError("nothing to merge", expected="two caches or more", got=len(paths))
    inputs = [Input.open(path) for path in paths]
    first = inputs[0]
    for other in inputs[1:]:
        require_same_labels(
            first.manifest["identity"], other.manifest["identity"], ours_name=first.path, theirs_name=other.path
        )
        for key, value in head_options(first).items():
            if other.manifest[key] != value:
                raise CacheMismatchError(
                    f"the {key} of {first.path} and {other.path} differ",
                    expected=value,
                    got=other.manifest[key],
                    fix=f"codedistill cache slice --{key} makes a copy of either" if key == "filter" else None,
                )
    parts, num_duplicates = _plan(inputs)
    sources: list[dict[str, Any]] = []
    for source in (source for cache in inputs for source in cache.manifest["sources"]):
        if source not in sources:
            sources.append(source)
    provenance = {
        "derived_from": {
            "command": "cache merge",
            "inputs": [cache.record() | {"sources": len(cache.manifest["sources"])} for cache in inputs],
            "num_duplicates": num_duplicates,
        }
    }
    write_derived(
        Path(out),
        parts,
        build={"command": "cache merge", "inputs": [cache.digest() for cache in inputs], **head_options(first)},
        identity=first.manifest["identity"],
        sources=sources,
        provenance=provenance,
        files=first,
        teacher_eval=next((cache for cache in inputs if _has_results(cache)), None),
    )
    return num_duplicates


def _plan(inputs: Sequence[Input]) -> tuple[list[Part], int]:
    """The shards to write, and how many documents are in an earlier cache already."""
    parts, num_duplicates = [], 0
    seen: set[str] = set()
    for cache in inputs:
        here: set[str] = set()
        for shard in range(cache.manifest["num_shards"]):
            digests = [meta.get("digest") for meta in cache.documents(shard)]
            keep = np.array([digest is None or digest not in seen for digest in digests])
            here.update(digest for digest in digests if isinstance(digest, str))
            num_duplicates += int((~keep).sum())
            if keep.any():
                parts.append(Part(source=cache, shard=shard, keep=keep))
        seen |= here
    return parts, num_duplicates


def _has_results(cache: Input) -> bool:
    return any(name.startswith(f"{TEACHER_EVAL}/") for name in cache.manifest["files"])
