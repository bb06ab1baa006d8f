"""Packed blocks of a cache as a map-style data set: item i is the same for every number of workers, ranks and
restarts."""

import functools
import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from shared.cache.reader import Cache
from shared.errors import ConfigError
from shared.model.gpt import IGNORE
from stage2_student.packing import Block, pack
from stage2_student.samples import sample_weights


class PackedBlocks(Dataset[dict[str, Tensor]]):
    """All blocks of all epochs, in training order.

    Args:
        caches: where the documents are; of one label identity.
        weights: one per cache, the shares of rows that come from each (see `mixing`); None takes every document of
            every cache once per epoch.
        block_size: rows of a block.
        seed: what the order depends on.
        held_out: for each cache, which documents to leave out, bool [D]; see `hold_out`.
        num_epochs: passes over the documents, or with weights over as many rows, each packed anew; the last may be a
            part of one.
        num_blocks: exactly so many blocks instead, with as many epochs as that takes.
        multiple: the length is rounded up to a multiple of it with empty blocks, so that no rank, micro-batch or step
            has fewer blocks than another; accelerate would repeat the first blocks instead.
        temperature: T of the soft labels; None leaves them out.
        with_samples: add the sampled targets to the soft labels.
        all_targets: every token that has a next one is a target, whatever the loss mask says.

    Raises:
        ConfigError: no cache, or with weights one of them, has a document of two tokens.
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        *,
        weights: Sequence[float] | None = None,
        block_size: int,
        seed: int,
        held_out: Sequence[np.ndarray] | None = None,
        num_epochs: float = 1,
        num_blocks: int | None = None,
        multiple: int = 1,
        temperature: float | None,
        with_samples: bool = False,
        all_targets: bool = False,
    ) -> None:
        self.caches, self.weights, self.block_size, self.seed = caches, weights, block_size, seed
        self.temperature, self.all_targets = temperature, all_targets
        self.num_samples = caches[0].samples(0, 0, 0).num if with_samples and temperature is not None else 0
        self.first_doc = np.cumsum([0, *(cache.num_documents for cache in caches)])
        self.doc_lengths = [cache.doc_lengths for cache in caches]
        if held_out is not None:
            self.doc_lengths = [
                np.where(out, 0, lengths) for out, lengths in zip(held_out, self.doc_lengths, strict=True)
            ]
        cache_rows = [int(np.maximum(lengths - 1, 0).sum()) for lengths in self.doc_lengths]
        self.num_rows = sum(cache_rows)
        if self.num_rows == 0 or (weights is not None and 0 in cache_rows):
            empty = caches[cache_rows.index(0)].path
            raise ConfigError("no document of the cache has a token to predict", where=empty)
        starts = [0]  # of each epoch's blocks, and the end of the last
        while len(starts) - 1 < num_epochs if num_blocks is None else starts[-1] < num_blocks:
            starts.append(starts[-1] + len(self._plan(len(starts) - 1)))
        if num_blocks is None:
            part = num_epochs - (len(starts) - 2)
            num_blocks = starts[-2] + math.ceil(part * (starts[-1] - starts[-2]))
        self.first_block, self.num_blocks = starts, num_blocks
        self.num_epochs = len(starts) - 2 + (num_blocks - starts[-2]) / (starts[-1] - starts[-2])
        self._length = math.ceil(self.num_blocks / multiple) * multiple

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One block.

        Returns:
            `input_ids`, `position_ids`, `labels` [T] int64 and, with a temperature, `soft_ids` [T, K] int64,
            `soft_logp` [T, K] float32, `soft_log_tail` [T] float32, `soft_k` [T] int64; with samples `soft_sample_ids`
            [T, S] int64, `soft_sample_weights` [T, S] float32. What is left of the block is padding: id 0, positions
            that count on from 0, no labels and no teacher rows.
        """
        block = self._block(index)
        T, K = self.block_size, self.caches[0].width
        arrays = {
            "input_ids": np.zeros(T, np.int64),
            "position_ids": np.arange(T, dtype=np.int64),
            "labels": np.full(T, IGNORE, np.int64),
        }
        if self.temperature is not None:
            arrays["soft_ids"] = np.zeros((T, K), np.int64)
            arrays["soft_logp"] = np.full((T, K), -np.inf, np.float32)
            arrays["soft_log_tail"] = np.full(T, -np.inf, np.float32)
            arrays["soft_k"] = np.zeros(T, np.int64)
        if self.num_samples:
            arrays["soft_sample_ids"] = np.zeros((T, self.num_samples), np.int64)
            arrays["soft_sample_weights"] = np.zeros((T, self.num_samples), np.float32)
        at = 0
        for number, start, stop in block:
            cache, doc = self._locate(number)
            rows = slice(at, at + stop - start)
            tokens = cache.tokens(doc)
            arrays["input_ids"][rows] = tokens[start:stop]
            arrays["position_ids"][rows] = np.arange(stop - start)
            is_target = cache.loss_mask(doc)[start:stop] | self.all_targets
            arrays["labels"][rows] = np.where(is_target, tokens[start + 1 : stop + 1], IGNORE)
            if self.temperature is not None:
                soft = cache.targets(doc, self.temperature, start, stop)
                arrays["soft_ids"][rows], arrays["soft_logp"][rows] = soft.ids, soft.logp
                arrays["soft_log_tail"][rows], arrays["soft_k"][rows] = soft.log_tail, soft.k
                if self.num_samples:
                    samples = cache.samples(doc, start, stop)
                    drawn = cache.targets(doc, samples.temperature, start, stop)
                    arrays["soft_sample_ids"][rows] = samples.ids
                    arrays["soft_sample_weights"][rows] = sample_weights(samples, soft, drawn, self.temperature)
            at = rows.stop
        arrays["position_ids"][at:] = np.arange(T - at)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def documents(self, index: int) -> list[str]:
        """The documents of a block, as their caches name them, with the rows of them that it holds."""
        names = []
        for number, start, stop in self._block(index):
            cache, doc = self._locate(number)
            names.append(f"{cache.meta(doc).get('id', doc)} [{start}:{stop}]")
        return names

    def _block(self, index: int) -> Block:
        if not 0 <= index < len(self):
            raise IndexError(index)  # ends iteration
        if index >= self.num_blocks:
            return ()
        epoch = int(np.searchsorted(self.first_block, index, side="right")) - 1
        return self._plan(epoch)[index - self.first_block[epoch]]

    def _locate(self, number: int) -> tuple[Cache, int]:
        which = int(np.searchsorted(self.first_doc, number, side="right")) - 1
        return self.caches[which], number - int(self.first_doc[which])

    def _plan(self, epoch: int) -> list[Block]:
        lengths = tuple(lengths.tobytes() for lengths in self.doc_lengths)
        return _plan(lengths, self.weights and tuple(self.weights), self.block_size, self.seed, epoch)


def hold_out(cache: Cache, fraction: float, seed: int) -> np.ndarray:
    """Which documents of a cache are kept for validation: a seeded draw, bool [D].

    The parts of a document that was split stay together, and so do documents of one id: what is drawn are ids, by the
    order of their SHA-256 with the seed, whatever order the cache has them in. At least one id is drawn.
    """
    ids = [str(cache.meta(doc).get("id", doc)) for doc in range(cache.num_documents)]
    digests = {name: hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogatepass")).digest() for name in ids}
    ranked = sorted(digests, key=digests.__getitem__)
    drawn = set(ranked[: max(round(fraction * len(ranked)), 1)])
    return np.array([name in drawn for name in ids])


@functools.lru_cache(maxsize=4)
def _plan(
    doc_lengths: tuple[bytes, ...], weights: tuple[float, ...] | None, block_size: int, seed: int, epoch: int
) -> list[Block]:
    lengths = [np.frombuffer(part, np.int64) for part in doc_lengths]
    return pack(lengths, block_size, weights=weights, seed=seed, epoch=epoch)
