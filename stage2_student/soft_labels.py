"""Narrow teacher rows, as a batch carries them, decoded on the device: ids, codes and tails become log-probabilities.

At temperature T a row's entries weigh exp(−m̂_i/T), m̂ being the codebook's value for the entry's code, and its tail
exp(log_tail); log-probabilities are the logs of the weights less the log of their sum (`shared/cache/FORMAT.md`).

Shapes: N positions of a batch, B its blocks, K padded entries of a row, S padded samples, C codes of a codebook.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shared.cache.format import Sampling
from stage2_student.losses import SoftLabels


class NarrowRows(NamedTuple):
    """Teacher rows as stored.

    Attributes:
        ids: token ids [N, K], uint16 or int32; 0 as padding.
        codes: places in the codebook [N, K], uint8, uint16 or int32; 0 as padding.
        k: entries of each row [N], int32; 0 where there is no teacher row.
        log_tail: log weight of all other ids relative to the row's first entry at T [N], float32; −inf where none.
        codebook: margins z_1 − z_i by code [B, C], float32.
        sample_ids: sampled ids [N, S], as `ids`; sample_counts: how often each was drawn [N, S], uint16, 0 as padding.
        sample_margins: z_1 − z_i [N, S], float32; sample_log_tail: as `log_tail`, at the temperature of the draws [N].
    """

    ids: Tensor
    codes: Tensor
    k: Tensor
    log_tail: Tensor
    codebook: Tensor
    sample_ids: Tensor | None = None
    sample_counts: Tensor | None = None
    sample_margins: Tensor | None = None
    sample_log_tail: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """What the rows of a run mean: the temperature T they are decoded at, and how samples were drawn, if any."""

    temperature: float
    sampling: Sampling | None = None


def decode(rows: NarrowRows, chosen_N: Tensor, decoding: Decoding) -> SoftLabels:
    """Decode some rows of a batch, in float32.

    Args:
        rows: all of the batch; N counts its blocks' positions one after the other.
        chosen_N: which of them, int64.
        decoding: T and the sampling.
    """
    num_blocks, num_codes = rows.codebook.shape
    # Unsigned 16-bit numbers can be copied on every device, but not indexed: they are widened first.
    ids_NK = rows.ids.int()[chosen_N].long()
    k_N = rows.k[chosen_N].long()
    # m̂ [N, K]: each block's codes follow those of the block before in one long codebook
    shift_N = chosen_N // (len(rows.k) // num_blocks) * num_codes
    margins_NK = rows.codebook.flatten()[rows.codes.int()[chosen_N].long() + shift_N[:, None]]
    outside_NK = torch.arange(ids_NK.shape[1], device=k_N.device) >= k_N[:, None]
    # log p [N, K] and log p_τ [N]
    log_weights_NK = (margins_NK / -decoding.temperature).masked_fill_(outside_NK, -torch.inf)
    log_tail_N = rows.log_tail[chosen_N]
    log_total_N = _log_total(log_weights_NK, log_tail_N, k_N)
    soft = SoftLabels(ids=ids_NK, logp=log_weights_NK - log_total_N[:, None], log_tail=log_tail_N - log_total_N, k=k_N)
    if decoding.sampling is None:
        return soft
    assert rows.sample_ids is not None and rows.sample_log_tail is not None
    weights = _sample_weights(rows, chosen_N, decoding, margins_NK.masked_fill(outside_NK, torch.inf), log_total_N, k_N)
    return soft._replace(sample_ids=rows.sample_ids.int()[chosen_N].long(), sample_weights=weights)


def _sample_weights(
    rows: NarrowRows, chosen_N: Tensor, decoding: Decoding, margins_NK: Tensor, log_total_N: Tensor, k_N: Tensor
) -> Tensor:
    """Importance weights of ids that were drawn S times at T_s, for a loss at T: float32 [N, S], 0 where none.

    The weight is count/S · p_T(i)/p_{T_s}(i), and for draws from the tail's conditional distribution also times the
    tail's mass p_τ(T_s). The weights are not normalised by their sum, which would bias the loss. arXiv 2503.16870 draws
    at T_s = T, where the ratio is 1.
    """
    sampling, T = decoding.sampling, decoding.temperature
    assert sampling is not None and rows.sample_counts is not None
    assert rows.sample_margins is not None and rows.sample_log_tail is not None
    counts_NS = rows.sample_counts.int()[chosen_N].float()
    # log weights of the tail and of the whole row [N], at the temperature of the draws
    drawn_tail_N = rows.sample_log_tail[chosen_N]
    drawn_total_N = _log_total(margins_NK / -sampling.temperature, drawn_tail_N, k_N)
    # log p_T(i)/p_{T_s}(i) [N, S], for draws from the tail times its mass
    log_ratio_NS = torch.zeros_like(counts_NS)
    if sampling.temperature != T:
        log_ratio_NS = rows.sample_margins[chosen_N] * (1 / sampling.temperature - 1 / T)
        log_ratio_NS = log_ratio_NS + (drawn_total_N - log_total_N)[:, None]
    if sampling.drawn_from == "tail":
        log_ratio_NS = log_ratio_NS + (drawn_tail_N - drawn_total_N)[:, None]
    # weights [N, S], 0 where nothing was drawn
    drawn_NS = counts_NS > 0
    return torch.where(drawn_NS, counts_NS / sampling.num * log_ratio_NS.masked_fill(~drawn_NS, 0).exp(), 0)


def _log_total(log_weights_NK: Tensor, log_tail_N: Tensor, k_N: Tensor) -> Tensor:
    """The log of the sum of each row's weights [N]; 0 in empty rows."""
    # The first weight is 1, so that the sum is at least 1 and at most V.
    total_N = log_weights_NK.exp().sum(1) + log_tail_N.exp()
    return total_N.masked_fill(k_N == 0, 1).log()
