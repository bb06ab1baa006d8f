"""Weights of sampled targets."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.cache.shard import SampledTargets, Targets


def sample_weights(samples: SampledTargets, soft: Targets, soft_drawn: Targets, temperature: float) -> NDArray[Any]:
    """Importance weights of ids that were drawn S times at T_s, for a loss at T ≤ T_s.

    The weight is count/S · p_T(i)/p_{T_s}(i), and for draws from the tail's conditional distribution also times the
    tail's mass p_τ(T_s). The weights are not normalised by their sum, which would bias the loss. arXiv 2503.16870 draws
    at T_s = T, where the ratio is 1.

    Args:
        samples: of n rows.
        soft: the same rows at T; soft_drawn: at T_s.
        temperature: T.

    Returns:
        float32 [n, S], 0 where there is no sample.
    """
    # log p_T/p_{T_s} [n, S], from the margins (z_first − z_i) and the first entries' log-probabilities
    log_ratio = np.zeros_like(samples.margins)
    if temperature != samples.temperature:
        # A row's first entry has margin 0: its log-probability is minus the log of the normaliser.
        with np.errstate(invalid="ignore"):  # empty rows, which have no samples either
            log_normalisers = soft.logp[:, :1] - soft_drawn.logp[:, :1]
        log_ratio = log_normalisers + samples.margins * np.float32(1 / samples.temperature - 1 / temperature)
    if samples.drawn_from == "tail":
        log_ratio = log_ratio + soft_drawn.log_tail[:, None]
    # weights [n, S], 0 where nothing was drawn
    weights = samples.counts / samples.num * np.exp(log_ratio, where=samples.counts > 0, out=np.zeros_like(log_ratio))
    return weights.astype(np.float32)
