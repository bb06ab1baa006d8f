"""pass@k and its interval."""

import math
from collections.abc import Sequence

_Z_95 = 1.959963984540054


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Estimate without bias the probability that at least one of k samples of a problem passes.

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1:
    1 − C(n−c, k) / C(n, k).

    Args:
        num_samples: n, samples drawn for the problem, duplicates included.
        num_passed: c, how many of them passed.
        k: at most n; no unbiased estimate exists of others.
    """
    assert 1 <= k <= num_samples and 0 <= num_passed <= num_samples
    all_choices, all_failing = math.comb(num_samples, k), math.comb(num_samples - num_passed, k)
    return (all_choices - all_failing) / all_choices  # of integers, so that a rare pass is not rounded away


def mean_interval(estimates: Sequence[float], num_samples: int) -> tuple[float, float]:
    """The 95 % interval over problems of the mean of their estimates: Wilson's (1927), with their effective number.

    Estimates from several samples vary less between problems than passes and failures do. The design effect is their
    variance over that of passes and failures with the same mean, and as many more problems is the mean worth (Franco,
    Little, Louis and Slud 2019, "Comparative study of confidence intervals for proportions in complex sample surveys");
    but never more than there are samples. Unlike a percentile bootstrap it is not empty where all problems are alike.

    Args:
        estimates: of each problem, one or more, within [0, 1].
        num_samples: of each problem.
    """
    assert estimates and all(0 <= estimate <= 1 for estimate in estimates)
    n, mean = len(estimates), math.fsum(estimates) / len(estimates)
    if mean in (0, 1):
        return _score_interval(mean, n)
    variance = math.fsum((estimate - mean) ** 2 for estimate in estimates) / n
    design_effect = min(max(variance / (mean * (1 - mean)), 1 / num_samples), 1.0)
    return _score_interval(mean, n / design_effect)


def _score_interval(share: float, n: float) -> tuple[float, float]:
    z2 = _Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At 0 and at 1 the bound is exactly the share; rounding must not leave it on the wrong side.
    return (0.0 if share == 0 else centre - half, 1.0 if share == 1 else centre + half)
