"""Packed blocks of caches as a map-style data set: item i is the same for every number of workers, ranks and
restarts."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from shared.cache.format import Array
from shared.cache.reader import Cache, ShardMemory
from shared.cache.shard import Shard
from shared.errors import ConfigError
from shared.model.gpt import IGNORE
from stage2_student.order import BlockOrder, lanes_within, largest_pool

ALIGNED_BYTES = 64
SHARD_BYTES = 640 << 20  # of memory for the shards in use, in each process that reads

Block = dict[str, Array]


class PackedBlocks(Dataset[Block]):
    """All blocks of all epochs, in training order.

    A block's labels are as narrow as in the cache; `soft_labels.decode` turns them into log-probabilities on the
    device, from batches that `collate` has made.

    Args:
        caches: where the documents are; of one label identity.
        weights: one per cache, the shares of blocks that come from each (see `BlockOrder`); None takes every document
            of every cache once per epoch.
        block_size: rows of a block.
        seed: what the order depends on.
        held_out: for each cache, which documents to leave out, bool [D]; see `hold_out`.
        num_epochs: passes over the documents, or with weights over as many blocks, each packed anew; the last may be a
            part of one.
        num_blocks: exactly so many blocks instead, with as many epochs as that takes.
        multiple: the length is rounded up to a multiple of it with empty blocks, so that no rank, micro-batch or step
            has fewer blocks than another; accelerate would repeat the first blocks instead.
        temperature: T of the soft labels; None leaves them out.
        with_samples: add the sampled targets to the soft labels.
        all_targets: every token that has a next one is a target, whatever the loss mask says.
        closing_id: the token that documents close with. Where a document ends, it gets all of the teacher's
            probability: a teacher that saw its texts run together gives it next to none, and a student would learn
            to go on. None leaves the teacher's rows as they are.

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
        closing_id: int | None = None,
    ) -> None:
        self.caches, self.block_size, self.closing_id = caches, block_size, closing_id
        self.temperature, self.with_samples, self.all_targets = temperature, with_samples, all_targets
        doc_rows = [cache.doc_lengths - np.uint32(1) for cache in caches]
        if held_out is not None:
            doc_rows = [np.where(out, np.uint32(0), rows) for out, rows in zip(held_out, doc_rows, strict=True)]
        cache_rows = [int(rows.sum(dtype=np.int64)) for rows in doc_rows]
        self.num_rows = sum(cache_rows)
        if self.num_rows == 0 or (weights is not None and 0 in cache_rows):
            empty = caches[cache_rows.index(0)].path
            raise ConfigError("no document of the cache has a token to predict", where=empty)
        memory = ShardMemory(SHARD_BYTES)
        for cache in caches:
            cache.memory, cache.reads_in_order = memory, False
        pool_bytes = max(
            largest_pool(cache.doc_lengths, cache.shard_indptr, block_size) * cache.bytes_per_token for cache in caches
        )
        self.order = BlockOrder(
            doc_rows,
            [cache.shard_indptr for cache in caches],
            block_size=block_size,
            seed=seed,
            weights=weights,
            # With weights a lane has a pool of each cache in hand.
            num_lanes=lanes_within(SHARD_BYTES, pool_bytes * (1 if weights is None else len(caches))),
        )
        # All lanes' pools, those at hand and the next ones, must fit into the local cache.
        self._fetches_ahead = any(
            cache.can_expect(2 * self.order.num_lanes * largest_pool(cache.doc_lengths, cache.shard_indptr, block_size))
            for cache in caches
        )
        each = self.order.num_blocks_per_epoch
        self.num_blocks = math.ceil(num_epochs * each) if num_blocks is None else num_blocks
        self.num_epochs = self.num_blocks / each
        self.padding = 1 - self.num_rows * self.num_epochs / (self.num_blocks * block_size)  # share of all positions
        self._length = math.ceil(self.num_blocks / multiple) * multiple

    def __len__(self) -> int:
        return self._length

    def epoch_ends(self) -> list[int]:
        """Blocks up to the end of each epoch, the last of which may be a part of one."""
        each = self.order.num_blocks_per_epoch
        return [*range(each, self.num_blocks, each), self.num_blocks]

    def __getitem__(self, index: int) -> Block:
        """One block.

        Returns:
            `input_ids`, `position_ids`, `labels` i64 [T] and, with a temperature, `soft_<name>` for each field of
            `soft_labels.NarrowRows`. What is left of the block is padding: id 0, positions that count on from 0, no
            labels and no teacher rows.
        """
        cache, segments = self._segments(index)
        T = self.block_size
        block: Block = {
            "input_ids": np.zeros(T, np.int64),
            "position_ids": np.arange(T, dtype=np.int64),
            "labels": np.full(T, IGNORE, np.int64),
        }
        parts = [cache.locate(doc) for doc, _, _ in segments]
        rows = None
        if self.temperature is not None:
            rows = _Rows(cache, [shard for shard, _ in parts], T, self.temperature, with_samples=self.with_samples)
        at = 0
        for (doc, start, stop), (shard, first) in zip(segments, parts, strict=True):
            size, source = stop - start, slice(first + start, first + stop)
            next_ones = slice(first + start + 1, first + stop + 1)
            block["input_ids"][at : at + size] = shard.tokens[source]
            block["position_ids"][at : at + size] = np.arange(size)
            labels = block["labels"][at : at + size]
            labels[:] = shard.tokens[next_ones]
            if not self.all_targets:
                labels[shard.loss_mask[source] == 0] = IGNORE
            if rows is not None:
                rows.copy(at, shard, source)
                is_end = stop == cache.doc_lengths[doc] - 1
                if self.closing_id is not None and is_end and shard.tokens[first + stop] == self.closing_id:
                    rows.set_certain(at + size - 1, self.closing_id)
            at += size
        block["position_ids"][at:] = np.arange(T - at)
        return block | ({} if rows is None else rows.fields)

    def documents(self, index: int) -> list[str]:
        """The documents of a block, as their caches name them, with the rows of them that it holds."""
        cache, segments = self._segments(index)
        return [f"{cache.meta(doc).get('id', doc)} [{start}:{stop}]" for doc, start, stop in segments]

    def _segments(self, index: int) -> tuple[Cache, list[tuple[int, int, int]]]:
        """A block's cache and, of each segment, document, first row and end; none in a block that only fills up."""
        if not 0 <= index < len(self):
            raise IndexError(index)  # ends iteration
        if index >= self.num_blocks:
            return self.caches[0], []
        number, docs, starts, stops = self.order.block(index)
        if self._fetches_ahead:
            for ahead, first, stop in self.order.documents_ahead(index):
                self.caches[ahead].expect_documents(first, stop)
        return self.caches[number], list(zip(docs.tolist(), starts.tolist(), stops.tolist(), strict=True))


class _Rows:
    """The teacher's rows of one block, still as narrow as in the cache; see `soft_labels.NarrowRows`."""

    def __init__(
        self, cache: Cache, shards: Sequence[Shard], T: int, temperature: float, *, with_samples: bool
    ) -> None:
        K = self._width = cache.width
        self._temperature, self._column = temperature, cache.column(temperature)
        codebook, self._code_shift = _join(shards)
        code_type = np.min_scalar_type(max(len(codebook) - 1, 0))
        id_type = np.uint16 if cache.tokenizer_size <= 1 << 16 else np.int32
        self.fields: Block = {
            "soft_ids": np.zeros((T, K), id_type),
            "soft_codes": np.zeros((T, K), code_type),
            "soft_k": np.zeros(T, np.int32),
            "soft_log_tail": np.full(T, -np.inf, np.float32),
            "soft_codebook": codebook,
        }
        self._sampling = cache.sampling if with_samples else None
        if self._sampling is not None:
            S = self._sampling.num
            self._sample_column = cache.column(self._sampling.temperature)
            self.fields |= {
                "soft_sample_ids": np.zeros((T, S), id_type),
                "soft_sample_counts": np.zeros((T, S), np.uint16),
                "soft_sample_margins": np.zeros((T, S), np.float32),
                "soft_sample_log_tail": np.full(T, -np.inf, np.float32),
            }

    def copy(self, at: int, shard: Shard, rows: slice) -> None:
        """Copy rows of a shard to row `at` of the block."""
        fields, here, K = self.fields, slice(at, at + rows.stop - rows.start), self._width
        first, last = int(shard.row_indptr[rows.start]), int(shard.row_indptr[rows.stop])
        k, shift = shard.k[rows], self._code_shift[id(shard)]
        fields["soft_k"][here] = k
        for name, source in (("soft_ids", shard.ids), ("soft_codes", shard.codes)):
            target = fields[name][here]
            if last - first == target.size:
                target.reshape(-1)[:] = source[first:last]
            else:
                target[np.arange(K) < k[:, None]] = source[first:last]
        if shift:
            fields["soft_codes"][here] += fields["soft_codes"].dtype.type(shift)  # padding may hold anything
        fields["soft_log_tail"][here] = shard.log_tails(rows, self._column, self._temperature)
        if self._sampling is not None:
            samples = shard.sampled(rows.start, rows.stop)
            assert samples is not None
            fields["soft_sample_ids"][here] = samples.ids
            fields["soft_sample_counts"][here] = samples.counts
            fields["soft_sample_margins"][here] = samples.margins
            fields["soft_sample_log_tail"][here] = shard.log_tails(
                rows, self._sample_column, self._sampling.temperature
            )

    def set_certain(self, at: int, id: int) -> None:
        """Give one token all probability in row `at`, as its first entry, whose margin is 0."""
        fields = self.fields
        fields["soft_ids"][at, 0], fields["soft_k"][at], fields["soft_log_tail"][at] = id, 1, -np.inf
        if self._sampling is not None:
            is_drawn = self._sampling.drawn_from == "full"
            for name in ("soft_sample_ids", "soft_sample_counts", "soft_sample_margins"):
                fields[name][at] = 0
            fields["soft_sample_ids"][at, 0] = id
            fields["soft_sample_counts"][at, 0] = self._sampling.num if is_drawn else 0
            fields["soft_sample_log_tail"][at] = -np.inf


def _join(shards: Sequence[Shard]) -> tuple[Array, dict[int, int]]:
    """One codebook for several shards, and what is to be added to the codes of each, by the shard's `id`.

    Codebooks of one codec are as long as their shard needs, and begin alike.
    """
    distinct = list({id(shard): shard for shard in shards}.values())
    longest = max((shard.codebook for shard in distinct), key=len, default=np.zeros(1, np.float32))
    codebooks, shifts, end = [longest], {}, len(longest)
    for shard in distinct:
        book = shard.codebook
        if book is longest or np.array_equal(book, longest[: len(book)]):
            shifts[id(shard)] = 0
            continue
        shifts[id(shard)] = end
        codebooks.append(book)
        end += len(book)
    return np.concatenate(codebooks), shifts


class Batch(dict[str, Tensor]):
    """Fields [B, …] that lie in one buffer, which is all that a worker sends: each tensor would cost a descriptor."""

    def __init__(self, fields: Mapping[str, Tensor], buffer: Tensor | None = None) -> None:
        super().__init__(fields)
        self.buffer = buffer

    def __reduce__(self) -> tuple[Any, ...]:
        if self.buffer is None:
            return dict, (dict(self),)
        return _unpack, (self.buffer, self._layout())

    def pin_memory(self) -> "Batch":
        """A copy in pinned memory, from which a GPU copies while the host goes on; torch's `DataLoader` calls it."""
        return self if self.buffer is None else _unpack(self.buffer.pin_memory(), self._layout())

    def to(self, device: Any, *, non_blocking: bool = False) -> "Batch":
        """The batch on a device, in one copy; accelerate calls it."""
        if self.buffer is None:
            return Batch({name: field.to(device, non_blocking=non_blocking) for name, field in self.items()})
        return _unpack(self.buffer.to(device, non_blocking=non_blocking), self._layout())

    def _layout(self) -> dict[str, tuple[int, torch.Size, torch.dtype]]:
        return {
            name: (int(field.storage_offset()) * field.itemsize, field.shape, field.dtype)
            for name, field in self.items()
        }


def _unpack(buffer: Tensor, layout: Mapping[str, tuple[int, torch.Size, torch.dtype]]) -> Batch:
    fields = {}
    for name, (start, shape, dtype) in layout.items():
        size = math.prod(shape) * dtype.itemsize
        fields[name] = buffer[start : start + size].view(dtype).view(shape)
    return Batch(fields, buffer)


def collate(blocks: Sequence[Mapping[str, Array]]) -> Batch:
    """Blocks as a batch; codebooks are filled up to the longest, codes widened to the widest.

    What the model would have to ask the device for, and wait, is counted here: `document_bounds`, where documents begin
    (see `gpt.Documents`), int32, and `targets`, the places among all B·T positions that have a label, int64.
    """
    shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
    for name, first in blocks[0].items():
        dtype = max((block[name].dtype for block in blocks), key=lambda dtype: dtype.itemsize)
        longest = max(len(block[name]) for block in blocks)
        shapes[name] = (len(blocks), longest, *first.shape[1:]), dtype
    starts_BT = np.stack([block["position_ids"] for block in blocks]) == 0
    starts_BT[:, 0] = True
    counted: dict[str, Array] = {
        "document_bounds": np.append(np.flatnonzero(starts_BT), starts_BT.size).astype(np.int32),
        "targets": np.flatnonzero(np.concatenate([block["labels"] for block in blocks]) != IGNORE),
    }
    layout, end = {}, 0
    for name, (shape, dtype) in (
        shapes | {name: (array.shape, array.dtype) for name, array in counted.items()}
    ).items():
        layout[name] = (end, torch.Size(shape), torch.from_numpy(np.empty(0, dtype)).dtype)
        end += -(-math.prod(shape) * dtype.itemsize // ALIGNED_BYTES) * ALIGNED_BYTES
    batch = _unpack(torch.zeros(end, dtype=torch.uint8), layout)
    for name in shapes:
        for row, block in zip(batch[name].numpy(), blocks, strict=True):
            row[: len(block[name])] = block[name]
    for name, array in counted.items():
        batch[name].numpy()[:] = array
    return batch


def hold_out(cache: Cache, fraction: float, seed: int) -> np.ndarray:
    """Which documents of a cache are kept for validation: a seeded draw, bool [D].

    The parts of a document that was split stay together, and so do documents of one id: what is drawn are ids, by the
    order of their SHA-256 with the seed, whatever order the cache has them in. At least one id is drawn.
    """
    names = [name for record in cache.records() for name in record.documents]
    ids = [str(doc if name is None else name) for doc, name in enumerate(names)]
    digests = {name: hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogatepass")).digest() for name in ids}
    ranked = sorted(digests, key=digests.__getitem__)
    drawn = set(ranked[: max(round(fraction * len(ranked)), 1)])
    return np.array([name in drawn for name in ids])
