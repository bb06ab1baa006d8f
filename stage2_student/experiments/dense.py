"""The teacher's full distribution, for `loss=dense`: all V log-probabilities of every target, in one file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.cache.format import Array
from shared.cache.reader import Cache
from shared.checkpoints import load_model
from shared.errors import CacheMismatchError, require
from shared.eval.fidelity.rows import partition_rows
from shared.files import fsync_directory
from shared.logits import LogitSource
from shared.progress import progress
from shared.tokenizer import load_tokenizer, special_ids
from stage2_student.config import StudentConfig
from stage2_student.dataset import Block, PackedBlocks
from stage2_student.fused import HeadLoss
from stage2_student.losses import ChunkLoss, SoftLabels, dense_distill_

CHUNK_ROWS = 256  # rows that go through the teacher's head at once
MAX_KL_NATS = 0.01  # mean KL between the cache's rows and the teacher's; other batches of a bf16 model make 1e-4
IMPOSSIBLE = -1e4  # a log-probability whose exponential is 0, finite in float16


class DenseLabels(SoftLabels):
    """Rows of the file, as column `ids` [C, 1], on the host; the other fields are empty."""


@torch.inference_mode()
def write_dense(teacher: Path, cache: Cache, path: Path) -> None:
    """Run the teacher once over a cache's documents and write its log-probabilities, float16 [targets, V], in order.

    Where a document ends, EOS has all probability, as in `PackedBlocks`. A file that exists is kept.

    Raises:
        CacheMismatchError: the rows are not those of the cache, so it is another teacher.
    """
    if path.exists():
        return
    model, _ = load_model(teacher, cache.manifest.identity["labels"]["dtype"])
    source, V = LogitSource(model, CHUNK_ROWS), cache.tokenizer_size
    masks, closing_id = _target_masks(cache), special_ids(load_tokenizer(cache.tokenizer_path))["eos"]
    temporary = path.with_name(f".{path.name}.tmp")
    kl_nats, at, shape = 0.0, 0, (sum(int(mask.sum()) for mask in masks), V)
    rows_NV = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
    with progress("Full distributions", cache.num_tokens, "tokens") as bar:
        for doc, mask in enumerate(masks):
            tokens = torch.from_numpy(cache.tokens(doc).astype(np.int64))
            soft = cache.targets(doc, 1.0, 0, len(mask))
            cached = [torch.from_numpy(part[mask]) for part in (soft.k, soft.ids, soft.logp, soft.log_tail)]
            first = at
            for chunk_CV in source.chunks(tokens[None, :-1], torch.from_numpy(mask)[None]):
                logits_CV, rows = chunk_CV[:, :V].cpu(), slice(at - first, at - first + len(chunk_CV))
                kl_nats += partition_rows(logits_CV, *(part[rows] for part in cached))[0].sum().item()
                rows_NV[at : at + len(logits_CV)] = logits_CV.log_softmax(1).numpy()
                at += len(logits_CV)
            if mask[-1:].any() and tokens[-1] == closing_id:
                rows_NV[at - 1] = IMPOSSIBLE
                rows_NV[at - 1, closing_id] = 0
            bar.advance(len(tokens))
    kl_nats /= max(at, 1)
    if not kl_nats <= MAX_KL_NATS:
        temporary.unlink()
        raise CacheMismatchError(
            "the teacher's distributions are not those of the cache",
            where=f"{teacher} and {cache.path}",
            expected=f"a mean KL of at most {MAX_KL_NATS} nats per target",
            got=f"{kl_nats:.3g}",
            fix="--teacher: the model that the caches were built with",
        )
    rows_NV.flush()
    temporary.replace(path)
    fsync_directory(path.parent)


class DenseBlocks(PackedBlocks):
    """Blocks whose positions carry the number of their row in the file, `soft_row` [T, 1] int64, in place of labels.

    The arguments are those of `PackedBlocks`; there is one cache, and `temperature` is not used.
    """

    def __init__(self, caches: Sequence[Cache], **options: Any) -> None:
        super().__init__(caches, **options | {"temperature": None})
        masks = _target_masks(caches[0])
        self._first_row = np.cumsum([0, *(int(mask.sum()) for mask in masks)])
        self._row_in_doc = [np.cumsum(mask) - 1 for mask in masks]

    def __getitem__(self, index: int) -> Block:
        """One block; positions without a target have the row of another."""
        row_T1 = np.zeros((self.block_size, 1), np.int64)
        at = 0
        for doc, start, stop in self._segments(index)[1]:
            row_T1[at : at + stop - start, 0] = self._first_row[doc] + self._row_in_doc[doc][start:stop]
            at += stop - start
        return super().__getitem__(index) | {"soft_row": row_T1}


class DenseLoss(HeadLoss):
    """KL(teacher‖student) over all V ids mixed with cross-entropy; on a cache's rows it is `ghost`.

    Args:
        config: of `loss=dense`.
        path: the file, as `write_dense` wrote it for the cache.
        caches: what is trained on; one.

    Raises:
        ConfigError: several caches, or a file of another cache.
    """

    def __init__(self, config: StudentConfig, path: Path, caches: Sequence[Cache]) -> None:
        super().__init__(config)
        require(len(caches) == 1, "loss=dense trains on one cache", where="--cache", got=f"{len(caches)} caches")
        require(path.is_file(), "the teacher's log-probabilities are missing", where=path)
        self._logp_NV = np.load(path, mmap_mode="r")
        expected = (sum(int(mask.sum()) for mask in _target_masks(caches[0])), caches[0].tokenizer_size)
        got = self._logp_NV.shape
        require(got == expected, "log-probabilities of another cache", where=path, expected=expected, got=got)

    def labels(self, soft: dict[str, Tensor], chosen_N: Tensor) -> SoftLabels | None:
        """The numbers of the rows, where the batch has them."""
        if "soft_row" not in soft:
            return super().labels(soft, chosen_N)
        row_N1 = soft["soft_row"].flatten(0, 1)[chosen_N].cpu()  # the host waits here, and for no chunk
        return DenseLabels(row_N1, row_N1, row_N1, row_N1)

    def chunk_(
        self, logits_CV: Tensor, labels_C: Tensor, soft: SoftLabels | None, out_CV: Tensor, factor: Tensor | float
    ) -> ChunkLoss:
        """Loss sums of a chunk; `out_CV` becomes the gradient times `factor`."""
        if not isinstance(soft, DenseLabels):
            return super().chunk_(logits_CV, labels_C, soft, out_CV, factor)
        half_CV = torch.from_numpy(self._logp_NV[soft.ids[:, 0].numpy()])
        if logits_CV.is_cuda:
            half_CV = half_CV.pin_memory().to(logits_CV.device, non_blocking=True)
        sums = dense_distill_(logits_CV, labels_C, half_CV.float().log_softmax(1), self.config.alpha)
        if out_CV is not logits_CV:
            torch.mul(logits_CV, factor, out=out_CV)
        return sums


def _target_masks(cache: Cache) -> list[Array]:
    """For each document, which of its rows are targets, bool [n − 1]."""
    return [cache.loss_mask(doc)[:-1] for doc in range(cache.num_documents)]
