"""Rows of a model's logits beside the teacher's distribution and the text: what each row adds to a fidelity figure."""

import torch
from torch import Tensor

from shared.partition import kl_rows, partition_


def text_rows(logits_NV: Tensor, gold_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compare rows with the text.

    Args:
        logits_NV: float32, only ids of the tokenizer.
        gold_N: i64, the next token.

    Returns:
        Per row: NLL of the gold token in nats; the probability of the first id; whether that is the gold token.
    """
    log_total_N = logits_NV.logsumexp(1)
    highest_N, first_N = logits_NV.max(1)
    nll_N = log_total_N - logits_NV.gather(1, gold_N[:, None])[:, 0]
    return nll_N, (highest_N - log_total_N).exp(), first_N == gold_N


def partition_rows(
    logits_NV: Tensor, k_N: Tensor, ids_NK: Tensor, logp_NK: Tensor, log_tail_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Compare rows with the teacher's K+1 partition at T=1.

    Where the teacher has no tail, the reverse KL leaves the bucket out.

    Args:
        logits_NV: float32 student logits, only ids of the tokenizer.
        k_N: i64, entries per row; the columns after are padding.
        ids_NK: i64, the teacher's ids, first the most likely.
        logp_NK: f32, their log-probabilities in nats.
        log_tail_N: f32, log-probability outside the row; −inf where there is none.

    Returns:
        Per row KL(teacher‖student) and KL(student‖teacher) in nats.
    """
    valid_NK = torch.arange(ids_NK.shape[1], device=ids_NK.device) < k_N[:, None]
    logq_NC = partition_(logits_NV.clone(), ids_NK, valid_NK).logq
    logp_NC = torch.cat((logp_NK.masked_fill(~valid_NK, -torch.inf), log_tail_N[:, None]), 1)
    return kl_rows(logp_NC, logq_NC), kl_rows(logq_NC.masked_fill(logp_NC == -torch.inf, -torch.inf), logp_NC)


def dense_rows(logits_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher‖student) and KL(student‖teacher) of each row in nats, over all ids; both float32 logits."""
    logq_NV, logp_NV = logits_NV.log_softmax(1), teacher_NV.log_softmax(1)
    return kl_rows(logp_NV, logq_NV), kl_rows(logq_NV, logp_NV)


def agreement(ids_NM: Tensor, teacher_NM: Tensor, k_N: Tensor) -> tuple[Tensor, Tensor]:
    """Compare the most likely ids of a model with the teacher's.

    Args:
        ids_NM: i64, the model's M most likely ids, first the most likely.
        teacher_NM: i64, the teacher's.
        k_N: i64, how many of the teacher's are known, at least 1; M or more: all.

    Returns:
        Per row: whether both have the same first id; and |A ∩ B| / m, A and B being the m = min(M, k) most likely ids
        of each.
    """
    columns = torch.arange(teacher_NM.shape[1], device=teacher_NM.device)
    known_NM = columns < k_N[:, None]
    same_NMM = (ids_NM[:, :, None] == teacher_NM[:, None, :]) & known_NM[:, :, None] & known_NM[:, None, :]
    overlap_N = same_NMM.sum((1, 2)) / known_NM.sum(1)
    return ids_NM[:, 0] == teacher_NM[:, 0], overlap_N
