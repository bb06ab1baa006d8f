"""Distillation losses on sparse teacher rows, with their gradients, in place on one chunk of logits.

Student logits z over V ids, s = z/T. A teacher row holds K ids with log-probabilities log p_k and the log mass log p_τ
of all other ids, at T. `shared.partition` gives the student's log q over the same cells.

A loss is a function of the cells of a row: the K ids and, last, one bucket of all other ids. With g = dL/ds over the
cells, dL/dz_k = g_k/T for the K ids and dL/dz_j = g_τ·exp(s_j − r)/T for every other id, r being the logsumexp of s
over the bucket.

Shapes: C rows of a chunk, K padded entries of a row, M = K + 1 cells, S padded samples of a row, V vocabulary.
Everything is float32; logs are natural.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from shared.model.gpt import IGNORE
from shared.partition import kl_rows, partition_, scatter_
from stage2_student.config import StudentConfig

LOG_ZERO = -745.0  # mass below e^-745 is 0 in float64 too; what the cache stores for an underflown tail lies below


class SoftLabels(NamedTuple):
    """Teacher rows at one temperature.

    Attributes:
        ids: token ids [C, K], int64; only the first `k` of a row count, the rest may hold anything.
        logp: log p_k [C, K], float32, descending.
        log_tail: log p_τ [C], float32; −inf where a row has no tail.
        k: entries of each row [C], int64; 0 where there is no teacher row.
        sample_ids: sampled ids [C, S], int64, distinct within a row; for `hybrid` outside the row's K ids.
        sample_weights: their weights [C, S], float32; ids of weight 0 may hold anything.
    """

    ids: Tensor
    logp: Tensor
    log_tail: Tensor
    k: Tensor
    sample_ids: Tensor | None = None
    sample_weights: Tensor | None = None

    def rows(self, chosen: slice | Tensor) -> "SoftLabels":
        """The labels of some rows."""
        return self._replace(**{name: field[chosen] for name, field in self._asdict().items() if field is not None})

    def first(self, k: int) -> "SoftLabels":
        """The labels with at most `k` entries per row; the mass of the others joins the tail."""
        at_K = torch.arange(self.ids.shape[1], device=self.k.device)
        dropped_CK = (at_K >= k) & (at_K < self.k[:, None])
        log_dropped_C = self.logp.masked_fill(~dropped_CK, -torch.inf).logsumexp(1)
        return self._replace(
            ids=self.ids[:, :k],
            logp=self.logp[:, :k],
            log_tail=torch.logaddexp(self.log_tail, log_dropped_C),
            k=self.k.clamp(max=k),
        )


class ChunkLoss(NamedTuple):
    """Sums over a chunk, scalars in float32: `total` is what the gradient belongs to."""

    total: Tensor
    kd: Tensor
    ce: Tensor


def cross_entropy_(
    logits_CV: Tensor,
    labels_C: Tensor,
    smoothing: float = 0.0,
    *,
    out_CV: Tensor | None = None,
    factor: Tensor | float = 1.0,
) -> ChunkLoss:
    """Sum of next-token cross-entropy, and its gradient.

    Args:
        logits_CV: float32, overwritten.
        labels_C: int64 target ids, `IGNORE` where there is none.
        smoothing: share of the target that is spread evenly over all V ids (Szegedy et al. 2016, section 7); `total`
            and the gradient have it, `ce` never.
        out_CV: becomes dL/dz, rounded once to its dtype; default: `logits_CV`.
        factor: what the gradient is multiplied by before it is rounded.
    """
    valid_C1, safe_C1 = _targets(labels_C, logits_CV.dtype)
    # [C, 1]: the label's logit and the mean, relative to the row's largest, before the logits become exponentials
    logits_CV.sub_(logits_CV.amax(1, keepdim=True))
    label_C1 = logits_CV.gather(1, safe_C1)
    mean_C1 = logits_CV.mean(1, keepdim=True) if smoothing else 0.0
    sum_C1 = logits_CV.exp_().sum(1, keepdim=True)
    ce = ((sum_C1.log() - label_C1) * valid_C1).sum()
    # dL/dz [C, V]: q less the target's distribution, and the label's by itself
    weight_C1 = factor * valid_C1
    evenly_C1 = weight_C1 * (smoothing / logits_CV.shape[1])
    q_label_C1 = label_C1.exp() / sum_C1
    gradient_CV = logits_CV if out_CV is None else out_CV
    if smoothing:
        logits_CV.mul_(weight_C1 / sum_C1)
        torch.sub(logits_CV, evenly_C1, out=gradient_CV)
    else:
        torch.mul(logits_CV, weight_C1 / sum_C1, out=gradient_CV)
    scatter_(gradient_CV, safe_C1, weight_C1 * (q_label_C1 - (1 - smoothing)) - evenly_C1)
    if not smoothing:
        return ChunkLoss(ce, ce.new_zeros(()), ce)
    evenly = ((sum_C1.log() - mean_C1) * valid_C1).sum()
    return ChunkLoss((1 - smoothing) * ce + smoothing * evenly, ce.new_zeros(()), ce)


def dense_distill_(logits_CV: Tensor, labels_C: Tensor, logp_CV: Tensor, alpha: float) -> ChunkLoss:
    """α·KL(p‖q) over all V ids at T = 1, plus (1−α)·CE, summed; `logits_CV` becomes the gradient.

    What the sparse losses stand in for; the proof compares them with it.

    Args:
        logits_CV: float32, overwritten with dL/dz.
        labels_C: int64 target ids, `IGNORE` where there is none.
        logp_CV: the teacher's log-probabilities of all ids, finite.
        alpha: weight of the divergence.
    """
    valid_C1, safe_C1 = _targets(labels_C, logits_CV.dtype)
    logq_CV = logits_CV.log_softmax(1)
    ce = -(logq_CV.gather(1, safe_C1) * valid_C1).sum()
    p_CV = logp_CV.exp()
    kd = (kl_rows(logp_CV, logq_CV)[:, None] * valid_C1).sum()
    # dL/dz [C, V]: q − αp, and −(1−α) at the label
    torch.exp(logq_CV, out=logits_CV).sub_(p_CV, alpha=alpha)
    logits_CV.scatter_add_(1, safe_C1, torch.full_like(valid_C1, alpha - 1)).mul_(valid_C1)
    return ChunkLoss(alpha * kd + (1 - alpha) * ce, kd, ce)


def _targets(labels_C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Columns [C, 1]: 1 where a row has a target and 0 elsewhere, and ids that can be gathered in every row."""
    valid_C1 = (labels_C != IGNORE)[:, None]
    return valid_C1.to(dtype), labels_C[:, None].where(valid_C1, 0)


def distill_(
    logits_CV: Tensor,
    labels_C: Tensor,
    soft: SoftLabels,
    config: StudentConfig,
    *,
    out_CV: Tensor | None = None,
    factor: Tensor | float = 1.0,
) -> ChunkLoss:
    """α·T²·KD plus (1−α)·CE, summed, and the gradient.

    KD by `config.loss`, all at temperature T:
    - `ghost`: the divergence of the teacher's and the student's distributions over the K ids and the tail's bucket.
    - `truncated`: the same, both renormalised over the K ids. Its gradient is biased.
    - `sampled`: −Σ w_i log softmax(s)_i over sampled ids (arXiv 2503.16870): unbiased, and up to a constant, the
      teacher's entropy, the forward KL over all V ids.
    - `hybrid`: the same with the exact K ids, of weights p_k, beside samples of the tail.

    Args:
        logits_CV: float32, overwritten.
        labels_C: int64 target ids, `IGNORE` where there is none; KD counts the same positions, where the row is not
            empty.
        soft: the teacher's rows at `config.temperature`.
        config: `loss`, `divergence`, `skew`, `beta`, `alpha` and `temperature` count.
        out_CV: becomes dL/dz, rounded once to its dtype; default: `logits_CV`.
        factor: what the gradient is multiplied by before it is rounded.
    """
    alpha, temperature = config.alpha, config.temperature
    # [C, 1]: which rows have a target, and its id and logit, before the logits are overwritten
    valid_C1, safe_C1 = _targets(labels_C, logits_CV.dtype)
    label_C1 = logits_CV.gather(1, safe_C1)
    if temperature != 1:  # cross-entropy is at T = 1, so it needs exponentials of its own
        top_C1 = logits_CV.amax(1, keepdim=True)
        hard_CV = (logits_CV - top_C1).exp_()
        hard_sum_C1 = hard_CV.sum(1, keepdim=True)
        ce = ((hard_sum_C1.log() - (label_C1 - top_C1)) * valid_C1).sum()
        logits_CV.div_(temperature)

    # log p and log q [C, M]: both sides over the row's cells
    ids_CK, real_CK, logp_CK, logp_tail_C = _cells(soft, config.loss)
    taught_C1 = valid_C1 * real_CK.any(1, keepdim=True)
    cells = partition_(logits_CV, ids_CK, real_CK)
    logp_CM = torch.cat((logp_CK, logp_tail_C[:, None]), 1)

    # KD [C] and its gradient by s over the cells [C, M]
    kd_C, g_CM = _cell_loss(logp_CM, cells.logq, config)
    kd = (kd_C * taught_C1[:, 0]).sum()
    gradient_CM = factor * alpha * temperature * taught_C1 * g_CM

    # dL/dz [C, V]: the bucket's ids share its gradient by exp(s_j − r); at T = 1 cross-entropy's q joins the cells
    hard_C1 = factor * (1 - alpha) * valid_C1
    gradient_CV = logits_CV if out_CV is None else out_CV
    bucket_sum_C1 = cells.bucket_sum.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    if temperature == 1:
        ce = ((cells.normaliser - (label_C1[:, 0] - cells.top)) * valid_C1[:, 0]).sum()
        gradient_CM = gradient_CM + hard_C1 * cells.logq.exp()
        share_C1 = gradient_CM[:, -1:] / bucket_sum_C1
        gradient_CK, at_label_C1 = gradient_CM[:, :-1], share_C1 * logits_CV.gather(1, safe_C1)
        torch.mul(logits_CV, share_C1, out=gradient_CV)
    else:
        logits_CV.mul_(gradient_CM[:, -1:] / bucket_sum_C1).addcmul_(hard_CV, hard_C1 / hard_sum_C1)
        gradient_CK = gradient_CM[:, :-1] + logits_CV.gather(1, cells.ids)
        at_label_C1 = logits_CV.gather(1, safe_C1)
        if out_CV is not None:
            out_CV.copy_(logits_CV)

    # then the row's own ids [C, K], those that are no entry as the entry they repeat, and the label, less 1
    repeated_C1 = gradient_CK.gather(1, cells.real.int().argmax(1, keepdim=True))
    scatter_(gradient_CV, cells.ids, gradient_CK.where(cells.real, repeated_C1))
    is_label_CK = cells.real & (cells.ids == safe_C1)
    among_ids_C1 = gradient_CK.where(is_label_CK, 0).sum(1, keepdim=True)
    scatter_(gradient_CV, safe_C1, among_ids_C1.where(is_label_CK.any(1, keepdim=True), at_label_C1) - hard_C1)
    return ChunkLoss(alpha * temperature**2 * kd + (1 - alpha) * ce, kd, ce)


def _cell_loss(logp_CM: Tensor, logq_CM: Tensor, config: StudentConfig) -> tuple[Tensor, Tensor]:
    """KD of each row [C], and its gradient by s over the cells [C, M]."""
    if config.uses_samples:
        return _weighted(logp_CM, logq_CM)
    if config.loss == "truncated":
        logp_CM, logq_CM = _renormalised(logp_CM), _renormalised(logq_CM)
    return _divergence(logp_CM, logq_CM, config)


def _cells(soft: SoftLabels, loss: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A loss's ids [C, K], which of them are entries, and the logs of their probabilities or weights and the tail's."""
    real_CK = torch.arange(soft.ids.shape[1], device=soft.ids.device) < soft.k[:, None]
    ids_CK, logp_CK = soft.ids, soft.logp.masked_fill(~real_CK, -torch.inf)
    if loss not in ("sampled", "hybrid"):
        return ids_CK, real_CK, logp_CK, soft.log_tail.masked_fill(soft.k == 0, -torch.inf)
    assert soft.sample_ids is not None and soft.sample_weights is not None
    # samples [C, S] stand in for the bucket of the tail, or for all cells; ids of weight 0 were not drawn
    log_weights_CS = soft.sample_weights.log()
    sampled_CS = log_weights_CS > -torch.inf
    no_bucket_C = torch.full_like(soft.log_tail, -torch.inf)
    if loss == "sampled":
        return soft.sample_ids, sampled_CS, log_weights_CS, no_bucket_C
    pairs = ((ids_CK, soft.sample_ids), (real_CK, sampled_CS), (logp_CK, log_weights_CS))
    ids_CK, real_CK, logp_CK = (torch.cat(pair, 1) for pair in pairs)
    return ids_CK, real_CK, logp_CK, no_bucket_C


def _renormalised(log_CM: Tensor) -> Tensor:
    """The cells without the bucket of the tail, scaled to sum to 1; rows of −inf stay."""
    log_CM = log_CM.clone()
    log_CM[:, -1] = -torch.inf
    total_C1 = log_CM.logsumexp(1, keepdim=True)
    return log_CM - total_C1.masked_fill(total_C1 == -torch.inf, 0)


def _weighted(logw_CM: Tensor, logq_CM: Tensor) -> tuple[Tensor, Tensor]:
    """−Σ w log q of each row [C], and its gradient by s over the cells."""
    w_CM = logw_CM.exp()
    value_C = -torch.where(w_CM > 0, w_CM * logq_CM, 0).sum(1)
    return value_C, w_CM.sum(1, keepdim=True) * logq_CM.exp() - w_CM


def _divergence(logp_CM: Tensor, logq_CM: Tensor, config: StudentConfig) -> tuple[Tensor, Tensor]:
    """The divergence of each row [C], and its gradient by s over the cells [C, M]: g_i = q_i (c_i − Σ_m q_m c_m).

    Reverse KL is infinite where the teacher has no mass and the student always has some. Such cells are left out, as
    is the bucket of a teacher row without a tail; the value is then no divergence of distributions and may be negative.
    All others are finite there: in JSD_β an empty cell adds −(1−β) log(1−β) q.
    """
    # value [C], and c [C, M] with g = q·(c − Σ q·c), the gradient through the student's softmax
    q_CM = logq_CM.exp()
    if config.divergence == "forward":
        return kl_rows(logp_CM, logq_CM), q_CM - logp_CM.exp()
    if config.divergence == "reverse":
        left_out_CM = logp_CM < LOG_ZERO
        value_C = kl_rows(logq_CM.masked_fill(left_out_CM, -torch.inf), logp_CM)
        c_CM = (logq_CM - logp_CM + 1).masked_fill(left_out_CM, 0)
    elif config.divergence == "jsd":
        beta = config.beta
        logm_CM = _mixture(beta, logp_CM, logq_CM)
        value_C = beta * kl_rows(logp_CM, logm_CM) + (1 - beta) * kl_rows(logq_CM, logm_CM)
        c_CM = (1 - beta) * (logq_CM - logm_CM)
    else:
        skew = config.skew
        logm_CM = _mixture(skew, logp_CM, logq_CM)
        if config.divergence == "skewed-forward":
            value_C = kl_rows(logp_CM, logm_CM)
            c_CM = -(1 - skew) * (logp_CM - logm_CM).exp()
        else:
            value_C = kl_rows(logq_CM, logm_CM)
            c_CM = logq_CM - logm_CM + 1 - (1 - skew) * (logq_CM - logm_CM).exp()
    # cells without mass of the student have no gradient, though their c may be infinite
    weighted_CM = torch.where(q_CM > 0, q_CM * c_CM, 0)
    return value_C, weighted_CM - q_CM * weighted_CM.sum(1, keepdim=True)


def _mixture(share: float, logp_CM: Tensor, logq_CM: Tensor) -> Tensor:
    """log(share·p + (1 − share)·q)."""
    return torch.logaddexp(logp_CM + math.log(share), logq_CM + math.log1p(-share))
