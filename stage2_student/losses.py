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
    valid_C = labels_C != IGNORE
    safe_C = labels_C.where(valid_C, 0)[:, None]
    label_logit_C = logits_CV.gather(1, safe_C)[:, 0]
    max_C1 = logits_CV.amax(1, keepdim=True)
    logits_CV.sub_(max_C1).exp_()
    sum_C1 = logits_CV.sum(1, keepdim=True)
    ce = (max_C1 + sum_C1.log()).squeeze(1).sub_(label_logit_C).mul_(valid_C).sum()
    logits_CV.mul_(valid_C[:, None] / sum_C1)
    logits_CV.scatter_add_(1, safe_C, -valid_C[:, None].float())
    return ChunkLoss(ce, ce.new_zeros(()), ce)


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
    if temperature != 1 and alpha < 1:  # cross-entropy lives at T = 1, so it needs its own exponentials
        hard_CV = logits_CV.clone()
        ce = cross_entropy_(hard_CV, labels_C).ce
        kd = ghost_(logits_CV, labels_C, soft, alpha=1.0, temperature=temperature).kd
        logits_CV.mul_(alpha).add_(hard_CV, alpha=1 - alpha)
        return ChunkLoss(alpha * temperature**2 * kd + (1 - alpha) * ce, kd, ce)

    valid_C = labels_C != IGNORE
    taught_C = valid_C & (soft.k > 0)
    safe_C = labels_C.where(valid_C, 0)[:, None]
    label_logit_C = logits_CV.gather(1, safe_C)[:, 0]

    # A row without teacher entries is handled as one of a single id, whose share of the student's mass still counts.
    column_K = torch.arange(soft.ids.shape[1], device=logits_CV.device)
    real_CK = column_K < soft.k.clamp(min=1)[:, None]
    first_C1 = soft.ids[:, :1].where(soft.k[:, None] > 0, 0)
    ids_CK = soft.ids.where(real_CK & (soft.k[:, None] > 0), first_C1)
    logp_CK = soft.logp.masked_fill(~(real_CK & taught_C[:, None]), -torch.inf)
    p_CK, p_tail_C = logp_CK.exp(), soft.log_tail.masked_fill(~taught_C, -torch.inf).exp()

    s_CV = logits_CV if temperature == 1 else logits_CV.div_(temperature)
    a_CK = s_CV.gather(1, ids_CK).masked_fill_(~real_CK, -torch.inf)
    s_CV.scatter_(1, ids_CK, -torch.inf)
    max_C = s_CV.amax(1)
    max_C = max_C.masked_fill(max_C == -torch.inf, 0)  # k = V: no id is left outside the row
    s_CV.sub_(max_C[:, None]).exp_()
    sum_C = s_CV.sum(1)
    r_C = max_C + sum_C.log()
    normaliser_C = torch.logaddexp(a_CK.logsumexp(1), r_C)
    logq_CK, logq_tail_C = a_CK - normaliser_C[:, None], r_C - normaliser_C
    q_CK, q_tail_C = logq_CK.exp(), logq_tail_C.exp()

    kd_C = torch.where(p_CK > 0, p_CK * (logp_CK - logq_CK), 0).sum(1)
    kd_C += torch.where(p_tail_C > 0, p_tail_C * (soft.log_tail - logq_tail_C), 0)
    kd = kd_C.sum()
    ce = ((normaliser_C - label_logit_C) * valid_C).sum() if temperature == 1 else kd.new_zeros(())

    soft_C, hard_C = alpha * temperature * taught_C, (1 - alpha) * valid_C
    tail_gradient_C = soft_C * (q_tail_C - p_tail_C) + hard_C * q_tail_C
    s_CV.mul_((tail_gradient_C / sum_C.clamp(min=torch.finfo(torch.float32).tiny))[:, None])
    head_gradient_CK = soft_C[:, None] * (q_CK - p_CK) + hard_C[:, None] * q_CK
    s_CV.scatter_add_(1, ids_CK, head_gradient_CK.masked_fill_(~real_CK, 0))
    s_CV.scatter_add_(1, safe_C, -hard_C[:, None].float())
    return ChunkLoss(alpha * temperature**2 * kd + (1 - alpha) * ce, kd, ce)
