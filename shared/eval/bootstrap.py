"""Intervals by bootstrap over independent units (documents, prompts): whole units are drawn, never their tokens."""

import numpy as np

from shared.cache.format import Array

NUM_RESAMPLES = 2000
METHOD = f"95 % percentile interval over {NUM_RESAMPLES} resamples with replacement, seed 0"
_CHUNK_DRAWS = 1 << 22


def resample_sums(sums_DF: Array) -> Array:
    """Sums over D units drawn with replacement: f64 `[R, F]`, for ratios of sums (Efron & Tibshirani 1993, ch. 6).

    The draws depend only on D: two models' resamples over the same documents are paired.

    Args:
        sums_DF: f64, F sums of each unit.
    """
    rng = np.random.default_rng(0)
    num_units = len(sums_DF)
    resampled = np.empty((NUM_RESAMPLES, sums_DF.shape[1]))
    step = max(1, _CHUNK_DRAWS // max(num_units, 1))
    for start in range(0, NUM_RESAMPLES, step):
        rows = min(step, NUM_RESAMPLES - start)
        drawn = rng.integers(num_units, size=(rows, num_units)) + np.arange(rows)[:, None] * num_units
        counts = np.bincount(drawn.ravel(), minlength=rows * num_units).reshape(rows, num_units)
        resampled[start : start + rows] = counts @ sums_DF
    return resampled


def percentile_interval(values_R: Array) -> list[float] | None:
    """The central 95 % of resampled figures; resamples without a value (0/0) are left out. None if none has one."""
    finite = values_R[np.isfinite(values_R)]
    return np.quantile(finite, (0.025, 0.975)).tolist() if len(finite) else None
