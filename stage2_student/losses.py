"""Distillation losses on sparse teacher rows, with their gradients, in place on one chunk of logits.

Student logits z over V ids, s = z/T. A teacher row holds K ids with log-probabilities log p_k and the log mass log p_τ
of all other ids, at T. With a_k = s_k, r = logsumexp of s without the K ids, ℓ = logaddexp(logsumexp(a), r):
log q_k = a_k − ℓ and log q_τ = r − ℓ. The tail is never formed as 1 − Σq, which is invalid in most rows at a tail of
1e-7.

Shapes: C rows of a chunk, K padded entries of a row, V vocabulary. Everything is float32; logs are natural.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from shared.model.gpt import IGNORE


class SoftLabels(NamedTuple):
    """Teacher rows at one temperature.

    Attributes:
        ids: token ids [C, K], int64; only the first `k` of a row count, the rest may hold anything.
        logp: log p_k [C, K], float32.
        log_tail: log p_τ [C], float32; −inf where a row has no tail.
        k: entries of each row [C], int64; 0 where there is no teacher row.
    """

    ids: Tensor
    logp: Tensor
    log_tail: Tensor
    k: Tensor

    def rows(self, chunk: slice) -> "SoftLabels":
        """The labels of some rows."""
        return SoftLabels(*(field[chunk] for field in self))


class ChunkLoss(NamedTuple):
    """Sums over a chunk, scalars in float32: `total` is what the gradient belongs to."""

    total: Tensor
    kd: Tensor
    ce: Tensor


def cross_entropy_(logits_CV: Tensor, labels_C: Tensor) -> ChunkLoss:
    """Sum of next-token cross-entropy; `logits_CV` becomes its gradient.

    Args:
        logits_CV: float32, overwritten with dL/dz.
        labels_C: int64 target ids, `IGNORE` where there is none.
    """
    valid_C1, safe_C1 = _targets(labels_C, logits_CV.dtype)
    logits_CV.sub_(logits_CV.amax(1, keepdim=True))
    label_C1 = logits_CV.gather(1, safe_C1)
    sum_C1 = logits_CV.exp_().sum(1, keepdim=True)
    ce = ((sum_C1.log() - label_C1) * valid_C1).sum()
    logits_CV.mul_(valid_C1 / sum_C1)
    logits_CV.scatter_add_(1, safe_C1, -valid_C1)
    return ChunkLoss(ce, ce.new_zeros(()), ce)


def _targets(labels_C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Columns [C, 1]: 1 where a row has a target and 0 elsewhere, and ids that can be gathered in every row."""
    valid_C1 = (labels_C != IGNORE)[:, None]
    return valid_C1.to(dtype), labels_C[:, None].where(valid_C1, 0)


def ghost_(logits_CV: Tensor, labels_C: Tensor, soft: SoftLabels, *, alpha: float, temperature: float) -> ChunkLoss:
    """α·T²·KL(p‖q) over the K+1 partition plus (1−α)·CE, summed; `logits_CV` becomes the gradient.

    With g = q − p over the partition: dL/dz_k = g_k/T for the K ids and g_τ·exp(s_j − r)/T for every other id.

    Args:
        logits_CV: float32, overwritten with dL/dz.
        labels_C: int64 target ids, `IGNORE` where there is none; the divergence counts the same positions.
        soft: the teacher's rows at `temperature`.
        alpha: weight of the divergence, in (0, 1].
        temperature: T, a grid temperature of the cache.
    """
    hard_CV = None
    if temperature != 1:  # cross-entropy lives at T = 1, so it needs its own exponentials
        hard_CV = logits_CV.clone()
        ce = cross_entropy_(hard_CV, labels_C).ce
        logits_CV.div_(temperature)

    valid_C1, safe_C1 = _targets(labels_C, logits_CV.dtype)
    valid_C = valid_C1[:, 0]
    taught_C = valid_C * (soft.k > 0)
    label_C = logits_CV.gather(1, safe_C1)[:, 0]

    # A row without teacher entries is handled as one of the single id 0, whose share of the student's mass counts.
    real_CK = torch.arange(soft.ids.shape[1], device=logits_CV.device) < soft.k.clamp(min=1)[:, None]
    first_C1 = soft.ids[:, :1].where(soft.k[:, None] > 0, 0)
    ids_CK = soft.ids.where(real_CK, first_C1).where(soft.k[:, None] > 0, first_C1)
    logp_CK = soft.logp.masked_fill(~real_CK | (taught_C == 0)[:, None], -torch.inf)
    logp_tail_C = soft.log_tail.masked_fill(taught_C == 0, -torch.inf)
    p_CK, p_tail_C = logp_CK.exp(), logp_tail_C.exp()

    # From here on a, r and ℓ are relative to the row's largest logit, so that differences of large logits stay exact.
    a_CK = logits_CV.gather(1, ids_CK).masked_fill_(~real_CK, -torch.inf)
    logits_CV.scatter_(1, ids_CK, -torch.inf)
    outside_C = logits_CV.amax(1)
    top_C = torch.maximum(outside_C, a_CK.amax(1))
    outside_C = outside_C.where(outside_C > -torch.inf, top_C)  # k = V: no id is outside
    a_CK -= top_C[:, None]
    sum_C = logits_CV.sub_(outside_C[:, None]).exp_().sum(1)
    r_C = outside_C - top_C + sum_C.log()
    normaliser_C = torch.logaddexp(a_CK.logsumexp(1), r_C)
    logq_CK, logq_tail_C = a_CK - normaliser_C[:, None], r_C - normaliser_C
    q_CK, q_tail_C = logq_CK.exp(), logq_tail_C.exp()

    kd = torch.where(p_CK > 0, p_CK * (logp_CK - logq_CK), 0).sum()
    kd += torch.where(p_tail_C > 0, p_tail_C * (logp_tail_C - logq_tail_C), 0).sum()
    if hard_CV is None:
        ce = ((normaliser_C - (label_C - top_C)) * valid_C).sum()

    # At T = 1 the gradient of cross-entropy is q − 1 at the label: its q joins here, its label below.
    soft_C, hard_C = alpha * temperature * taught_C, (1 - alpha) * valid_C if hard_CV is None else 0 * valid_C
    tail_gradient_C = soft_C * (q_tail_C - p_tail_C) + hard_C * q_tail_C
    logits_CV.mul_((tail_gradient_C / sum_C.clamp(min=torch.finfo(torch.float32).tiny))[:, None])
    head_gradient_CK = soft_C[:, None] * (q_CK - p_CK) + hard_C[:, None] * q_CK
    logits_CV.scatter_add_(1, ids_CK, head_gradient_CK.masked_fill_(~real_CK, 0))
    logits_CV.scatter_add_(1, safe_C1, -hard_C[:, None])
    if hard_CV is not None:
        logits_CV.add_(hard_CV, alpha=1 - alpha)
    return ChunkLoss(alpha * temperature**2 * kd + (1 - alpha) * ce, kd, ce)
