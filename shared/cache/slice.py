"""A smaller cache from a larger one: fewer entries per row, fewer documents, another codec or filter."""

from pathlib import Path
from typing import Any

import numpy as np

from shared.cache.derive import Input, Part, head_options, write_derived
from shared.cache.format import ShardArrays
from shared.cache.rows import truncate
from shared.errors import ConfigError


def slice_cache(
    path: Path | str,
    out: Path | str,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    documents: int | None = None,
    source: str | None = None,
    codec: str | None = None,
    compression: str | None = None,
) -> None:
    """Write part of a cache as a cache of its own; run again after a kill it continues.

    Entries that are dropped join their row's tail. Fewer entries or another codec are another label identity, whose
    label options record them and the identity they come from; fewer documents or another filter are not.

    Args:
        path: a finished cache.
        out: the new one's directory.
        top_k: most entries of a row.
        top_p: rows keep their shortest prefix of this probability at T = 1.
        documents: keep the first so many, parts of a split document counted one by one; after `source`.
        source: keep the documents of this data set alone.
        codec: `q` or `f16`; compression: `gzip` or `zstd`.

    Raises:
        ConfigError: options that keep nothing or ask for more than there is.
        CacheFormatError, CacheCorruptError: no finished cache, or a damaged one.
    """
    whole = Input.open(path)
    manifest = whole.manifest
    if top_k is not None and not 1 <= top_k <= manifest["top_k"]:
        raise ConfigError(
            "top-k is out of range", where=path, expected=f"1 to the cache's {manifest['top_k']}", got=top_k
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError("top-p is out of range", expected="above 0, at most 1", got=top_p)
    if documents is not None and documents < 1:
        raise ConfigError("nothing would be kept", where="documents", expected="at least 1", got=documents)
    head = head_options(whole)
    changes: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "codec": codec}
    changes = {key: value for key, value in changes.items() if value is not None and value != head.get(key)}
    head |= {key: value for key, value in changes.items() if key in head}
    head |= {} if compression is None else {"filter": compression}
    identity, sources = manifest["identity"], manifest["sources"]
    if changes:
        labels = identity["labels"] | changes | {"derived_from": manifest["label_identity"]}
        identity = identity | {"labels": labels}
    if source is not None:
        names = sorted({str(known.get("name")) for known in sources})
        sources = [known for known in sources if known.get("name") == source]
        if not sources:
            raise ConfigError("the cache has no such source", where=path, expected=" or ".join(names), got=source)
    options = {"source": source, "documents": documents, **changes}

    def cut(arrays: ShardArrays) -> ShardArrays:
        return truncate(arrays, head["temperatures"], top_k=changes.get("top_k"), top_p=changes.get("top_p"))

    write_derived(
        Path(out),
        _kept(whole, documents, source),
        build={"command": "cache slice", "inputs": [whole.digest()], "slice": options, **head},
        identity=identity,
        sources=sources,
        provenance={
            "derived_from": {
                "command": "cache slice",
                "inputs": [whole.record() | {"label_identity": manifest["label_identity"]}],
                "options": options,
                **({"codec_kl_nats": manifest["statistics"]["codec_kl_nats"]} if changes else {}),
            }
        },
        cut=cut if changes else None,
        files=whole,
        teacher_eval=whole,
    )


def _kept(whole: Input, documents: int | None, source: str | None) -> list[Part]:
    parts, left = [], documents
    for shard in range(whole.manifest["num_shards"]):
        metas = whole.documents(shard)
        keep = np.array([source is None or meta.get("source") == source for meta in metas])
        if left is not None:
            keep &= np.cumsum(keep) <= left
            left -= int(keep.sum())
        if keep.any():
            parts.append(Part(source=whole, shard=shard, keep=keep))
        if left == 0:
            break
    if not parts:
        raise ConfigError("nothing would be kept", where=whole.path, got=f"no document of {source}")
    return parts
