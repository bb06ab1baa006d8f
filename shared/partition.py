"""The K+1 partition of a vocabulary: the K ids of a teacher's row, and one bucket of all other ids.

With logits z, a_k = z_k for the K ids, r = logsumexp of z without them and ℓ = logaddexp(logsumexp(a), r):
log q_k = a_k − ℓ, and the bucket has log q_τ = r − ℓ. The bucket is never formed as 1 − Σq, which errs by 1 % where it
is 1e-4 and is invalid in most rows at 1e-7.

Shapes: C rows, K padded entries of a row, M = K + 1 cells with the bucket last, V vocabulary. Logs are natural.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Partition(NamedTuple):
    """Rows of logits over their cells.

    Ids that are no entries repeat an entry of the row; a row without entries has the single id 0.
    """

    ids: Tensor  # the row's ids [C, K]
    real: Tensor  # which of them are entries [C, K]
    logq: Tensor  # log-probabilities of the cells [C, M]; −inf where no entry, or the bucket is empty (K = V)
    top: Tensor  # the row's largest logit [C]
    normaliser: Tensor  # ℓ − top [C]
    bucket_sum: Tensor  # Σ exp(z_j − max z_j) over the bucket's ids [C]: the row sums of what the logits have become


def partition_(logits_CV: Tensor, ids_CK: Tensor, real_CK: Tensor) -> Partition:
    """Partition rows of logits, in place.

    Args:
        logits_CV: float32 or float64; become exp(z_j − max z_j) of the bucket's ids, and 0 at the row's own.
        ids_CK: int64, distinct within a row.
        real_CK: bool, which of them count; the others may hold anything.
    """
    # ids [C, K]: fill up with the row's first entry, so that scattering touches no other id
    empty_C1 = ~real_CK.any(1, keepdim=True)
    first_C1 = ids_CK.gather(1, real_CK.int().argmax(1, keepdim=True)).masked_fill(empty_C1, 0)
    ids_CK = ids_CK.where(real_CK, first_C1)
    real_CK = torch.cat((real_CK[:, :1] | empty_C1, real_CK[:, 1:]), 1)
    # a [C, K]: the row's own logits; the logits keep those of the bucket
    a_CK = logits_CV.gather(1, ids_CK).masked_fill_(~real_CK, -torch.inf)
    scatter_(logits_CV, ids_CK, torch.full_like(a_CK, -torch.inf))
    # top [C]: a, r and ℓ are relative to the row's largest logit, so that differences of large logits stay exact
    outside_C = logits_CV.amax(1)
    top_C = torch.maximum(outside_C, a_CK.amax(1))
    outside_C = outside_C.where(outside_C > -torch.inf, top_C)  # K = V: the bucket is empty
    a_CK -= top_C[:, None]
    # r [C]: the bucket, from exponentials relative to its own largest logit
    bucket_sum_C = logits_CV.sub_(outside_C[:, None]).exp_().sum(1)
    r_C = outside_C - top_C + bucket_sum_C.log()
    # log q [C, M]
    normaliser_C = torch.logaddexp(a_CK.logsumexp(1), r_C)
    logq_CM = torch.cat((a_CK, r_C[:, None]), 1) - normaliser_C[:, None]
    return Partition(ids_CK, real_CK, logq_CM, top_C, normaliser_C, bucket_sum_C)


def scatter_(out_CV: Tensor, ids_CK: Tensor, values_CK: Tensor) -> None:
    """Write values at some ids of each row; an id that repeats has one value.

    A compiler writes in place for `index_put_`, and copies the whole for `scatter_`, which is faster without one.
    """
    values_CK = values_CK.to(out_CV.dtype)
    if torch.compiler.is_compiling():
        out_CV.index_put_((torch.arange(len(ids_CK), device=ids_CK.device)[:, None], ids_CK), values_CK)
    else:
        out_CV.scatter_(1, ids_CK, values_CK)


def kl_rows(log_a_CM: Tensor, log_b_CM: Tensor) -> Tensor:
    """Σ a (log a − log b) of each row [C], in nats; cells of no mass in a add nothing."""
    a_CM = log_a_CM.exp()
    return torch.where(a_CM > 0, a_CM * (log_a_CM - log_b_CM), 0).sum(1)
