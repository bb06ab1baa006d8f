"""One shard through the teacher: rows stay on its device until the last batch, then become arrays to encode."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from shared.batching import plan_batches
from shared.cache.format import ShardArrays
from shared.cache.rows import truncate
from shared.errors import CacheFormatError
from stage1_teacher.config import TeacherConfig
from stage1_teacher.sampling import draw, to_samples, uniforms
from stage1_teacher.topk import LabelRows, label_rows

if TYPE_CHECKING:
    from stage1_teacher.documents import Piece
    from stage1_teacher.logits import LogitSource

MAX_EXCESS_MASS = 1e-4

# Row numbers in the shard, what is kept of them, and M samples of each: ids i64 [N, M], margins f32 [N, M].
Rows = list[tuple[np.ndarray, LabelRows, tuple[torch.Tensor, torch.Tensor] | None]]


def label_shard(
    source: "LogitSource",
    pieces: Sequence["Piece"],
    config: TeacherConfig,
    tokenizer_size: int,
    advance: Callable[[int], None],
) -> tuple[ShardArrays, float]:
    """Label one shard's pieces: `capture`, then `to_arrays`."""
    rows = capture(source, pieces, config, tokenizer_size, config.batch_tokens, advance)
    return to_arrays(rows, pieces, config, tokenizer_size)


def capture(
    source: "LogitSource",
    pieces: Sequence["Piece"],
    config: TeacherConfig,
    tokenizer_size: int,
    batch_tokens: int,
    advance: Callable[[int], None],
) -> Rows:
    """Run one shard's pieces through the teacher, batch by batch.

    Args:
        source: the teacher's logits.
        pieces: the shard's documents in order.
        config: top-k, grid and samples.
        tokenizer_size: ids beyond it are masked.
        batch_tokens: most tokens of a batch, padding included.
        advance: told of tokens done.

    Returns:
        What is kept of each row, on the teacher's device.
    """
    lengths, ends, tokens = _layout(pieces)
    uniform_SM = _uniforms(pieces, config.samples) if config.samples else None
    captured: Rows = []
    for batch in plan_batches(lengths, batch_tokens):
        # A document's last token predicts nothing: rows are the tokens before it, in document order.
        rows_N = np.concatenate([np.arange(ends[i], ends[i + 1] - 1) for i in batch])
        real_BT = torch.arange(lengths[batch[0]] - 1) < torch.tensor([[lengths[i] - 1] for i in batch])
        ids_BT = torch.zeros(real_BT.shape, dtype=torch.int64)
        ids_BT[real_BT] = torch.from_numpy(tokens[rows_N])
        for logits_NV in source.chunks(ids_BT, real_BT) if len(rows_N) else ():
            rows, rows_N = rows_N[: len(logits_NV)], rows_N[len(logits_NV) :]
            gold = torch.from_numpy(tokens[rows + 1]).to(logits_NV.device)
            samples = None
            if uniform_SM is not None:
                uniform_NM = torch.from_numpy(uniform_SM[rows]).to(logits_NV.device)
            if uniform_SM is not None and config.samples_from == "full":  # before the logits are overwritten
                samples = draw(logits_NV[:, :tokenizer_size], uniform_NM, config.samples_temperature)
            kept = label_rows(
                logits_NV, gold, top_k=config.top_k, temperatures=config.temperatures, tokenizer_size=tokenizer_size
            )
            if uniform_SM is not None and config.samples_from == "tail":
                tail_NV = logits_NV[:, :tokenizer_size].scatter_(1, kept.ids, -torch.inf)
                samples = draw(tail_NV, uniform_NM, config.samples_temperature)
            if samples is not None:
                samples = (samples[0], kept.top_logit[:, None] - samples[1])
            captured.append((rows, kept, samples))
        advance(sum(lengths[i] for i in batch))
    return captured


def to_arrays(
    captured: Rows, pieces: Sequence["Piece"], config: TeacherConfig, tokenizer_size: int
) -> tuple[ShardArrays, float]:
    """Bring a shard's rows from the device into the order of its documents.

    Returns:
        The shard's arrays, and the mean probability that the teacher gave to ids beyond the tokenizer.

    Raises:
        CacheFormatError: logits that cannot be used (document and position named), or too much mass on such ids.
    """
    _, ends, tokens = _layout(pieces)
    S, K = len(tokens), min(config.top_k, tokenizer_size)
    k, gold_in_topk = np.zeros(S, np.int64), np.zeros(S, bool)
    ids_SK, margins_SK = np.zeros((S, K), np.int32), np.zeros((S, K), np.float32)
    tail_log = np.full((S, len(config.temperatures)), -np.inf)
    gold_logprob, entropy, excess = np.full(S, np.nan, np.float32), np.zeros(S, np.float32), np.zeros(S, np.float32)
    M = config.samples or 0
    drawn_SM, drawn_margins_SM = np.full((S, M), -1, np.int64), np.zeros((S, M), np.float32)
    for rows, kept, samples in captured:
        excess[rows], top_logit = kept.excess_mass.cpu(), kept.top_logit.cpu().numpy()
        for bad in np.flatnonzero(~np.isfinite(top_logit + excess[rows])):
            piece = int(np.searchsorted(ends, rows[bad], side="right")) - 1
            raise CacheFormatError(
                "the teacher's logits cannot be used",
                where=f"document {pieces[piece].meta['id']!r}, position {rows[bad] - ends[piece]}",
                expected="finite logits, or −inf beside them",
                got=f"a largest logit of {top_logit[bad]}",
                fix="another --dtype, such as float32, may help",
            )
        ids_SK[rows], margins_SK[rows] = kept.ids.cpu(), kept.margins.cpu()
        k[rows], tail_log[rows], gold_in_topk[rows] = kept.k.cpu(), kept.tail_log.cpu(), kept.gold_rank.cpu() < K
        gold_logprob[rows], entropy[rows] = kept.gold_logprob.cpu(), kept.entropy_nats.cpu()
        if samples is not None:
            drawn_SM[rows], drawn_margins_SM[rows] = samples[0].cpu(), samples[1].cpu()

    excess_mass = float(excess.sum(dtype=np.float64)) / max(S - len(pieces), 1)
    if excess_mass > MAX_EXCESS_MASS:
        raise CacheFormatError(
            "the teacher predicts ids that its tokenizer does not have",
            expected=f"a mean probability of at most {MAX_EXCESS_MASS:g} on ids from {tokenizer_size}",
            got=f"{excess_mass:.2e}",
            fix="use the tokenizer that the teacher was trained with",
        )
    drawn_from, temperature = config.sampled()
    kept_SK = np.arange(K) < k[:, None]
    arrays = ShardArrays(
        tokens=tokens,
        loss_mask=np.concatenate([np.array([*piece.is_target[1:], False], np.uint8) for piece in pieces]),
        doc_indptr=ends,
        doc_meta=[piece.meta for piece in pieces],
        k=k,
        topk_ids=ids_SK[kept_SK].astype(np.int64),
        topk_margins=margins_SK[kept_SK],
        tail_log=tail_log,
        gold_logprob=gold_logprob,
        gold_in_topk=gold_in_topk,
        entropy_nats=entropy,
        samples=to_samples(drawn_SM, drawn_margins_SM, temperature=temperature, drawn_from=drawn_from) if M else None,
    )
    if config.top_p is not None:
        arrays = truncate(arrays, config.temperatures, top_p=config.top_p)
    return arrays, excess_mass


def _uniforms(pieces: Sequence["Piece"], num: int) -> np.ndarray:
    """Random numbers for each row's samples `[S, num]`; none for a piece's last row."""
    return np.concatenate([np.pad(uniforms(piece.meta, len(piece.ids) - 1, num), ((0, 1), (0, 0))) for piece in pieces])


def _layout(pieces: Sequence["Piece"]) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Lengths of a shard's pieces, their borders `[D + 1]`, and all their tokens `[S]`."""
    lengths = [len(piece.ids) for piece in pieces]
    tokens = np.concatenate([piece.ids for piece in pieces]).astype(np.int64)
    return lengths, np.cumsum([0, *lengths]), tokens
