"""What fewer entries and other codecs would cost and lose, measured on a sample of a cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.cache.derive import Input, select
from shared.cache.documents import join_rows
from shared.cache.encode import encode_shard
from shared.cache.format import CODECS, Array, ShardArrays, temperature_key
from shared.cache.rows import exact, truncate
from shared.cache.shard import Shard, decode_shard
from shared.errors import ConfigError
from shared.progress import progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """The sample encoded in one way.

    Args:
        top_k, codec: how.
        bytes_per_token: of the shard's file.
        kl_nats: by temperature, mean KL(cached ‖ decoded), the mass outside a row spread evenly over its ids.
        coding_kl_nats: by temperature, the same over the K+1 cells that are kept: what quantising alone loses.
        shard: the sample as a reader decodes it.
    """

    top_k: int
    codec: str
    bytes_per_token: float
    kl_nats: dict[str, float]
    coding_kl_nats: dict[str, float]
    shard: Shard

    def figures(self) -> dict[str, Any]:
        """All but the shard, as JSON values."""
        names = ("top_k", "codec", "bytes_per_token", "kl_nats", "coding_kl_nats")
        return {name: getattr(self, name) for name in names}


def sample_rows(path: Path | str, documents: int) -> tuple[Input, ShardArrays]:
    """The first so many documents of a cache as rows.

    Raises:
        ConfigError: no document asked for, or none with two tokens among them.
        CacheFormatError, CacheCorruptError: no finished cache, or a damaged one.
    """
    if documents < 1:
        raise ConfigError("an empty sample", where="documents", expected="at least 1", got=documents)
    source, parts = Input.open(path), list[ShardArrays]()
    left = documents
    for shard in range(source.manifest["num_shards"]):
        part = exact(decode_shard(source.shard(shard)[0], source.path), source.manifest["temperatures"])
        parts.append(select(part, np.arange(len(part.doc_meta)) < left))
        left -= len(part.doc_meta)
        if left <= 0:
            break
    rows = join_rows(parts)
    if not rows.k.any():
        raise ConfigError("the sample has no rows", where=path, got=f"{len(rows.doc_meta)} documents of one token")
    return source, rows


def top_ks(largest: int) -> list[int]:
    """Powers of two below the cache's own k, and that."""
    return [*(1 << power for power in range(largest.bit_length()) if 1 << power < largest), largest]


def simulate(source: Input, rows: ShardArrays, ks: Sequence[int]) -> list[Variant]:
    """Encode a sample at each K with each codec, and measure what comes back against the cached rows.

    Args:
        source: the cache.
        rows: its sample.
        ks: numbers of entries, at most the cache's.
    """
    manifest, found = source.manifest, []
    T = manifest["temperatures"]
    with progress("simulating", len(ks) * len(CODECS), "encodings") as bar:
        for top_k in ks:
            cut = truncate(rows, T, top_k=top_k)
            for codec in CODECS:
                image, statistics = encode_shard(
                    cut,
                    codec=codec,
                    temperatures=T,
                    head_width=manifest["head_width"],
                    tokenizer_size=manifest["tokenizer_size"],
                    top_k=top_k,
                    compression=manifest["filter"],
                )
                shard = decode_shard(image, source.path)
                kl = {temperature_key(t): _spread_kl(rows, shard, t, c, source) for c, t in enumerate(T)}
                coding = {key: figures["mean"] for key, figures in statistics["codec_kl_nats"].items()}
                size = len(image) / len(rows.tokens)
                found.append(
                    Variant(
                        top_k=top_k, codec=codec, bytes_per_token=size, kl_nats=kl, coding_kl_nats=coding, shard=shard
                    )
                )
                bar.advance(1)
    return found


def _spread_kl(rows: ShardArrays, shard: Shard, T: float, column: int, source: Input) -> float:
    """Mean KL over the cached cells: dropped entries get the tail's share per id, the cached tail the rest."""
    V, width = source.manifest["tokenizer_size"], min(source.manifest["top_k"], source.manifest["tokenizer_size"])
    target = shard.targets(0, len(rows.k), T, column, width)
    real = rows.k > 0
    inside = np.arange(width) < rows.k[:, None]
    margins = np.full(inside.shape, np.inf)
    margins[inside] = rows.topk_margins
    logp = -margins[real] / T
    log_tail = rows.tail_log[real, column]
    log_total = np.logaddexp(np.log(np.exp(logp).sum(1)), log_tail)
    p, p_tail = np.exp(logp - log_total[:, None]), np.exp(log_tail - log_total)
    outside = np.maximum(V - target.k[real], 1)
    log_share = target.log_tail[real].astype(np.float64) - np.log(outside)
    kept = np.arange(width) < target.k[real][:, None]
    logq = np.where(kept, target.logp[real], log_share[:, None])
    log_rest = log_share + np.log(np.maximum(V - rows.k[real], 1))
    return float(
        np.mean(_terms(p, logp - log_total[:, None], logq).sum(1) + _terms(p_tail, log_tail - log_total, log_rest))
    )


def _terms(p: Array, logp: Array, logq: Array) -> Array:
    with np.errstate(invalid="ignore"):
        terms: Array = np.where(p > 0, p * (logp - logq), 0.0)
    return terms
