"""pass@k and its interval."""

import math

from shared.errors import ConfigError

_Z_95 = 1.959963984540054


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Estimate without bias the probability that at least one of k samples of a problem passes.

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1:
    1 − C(n−c, k) / C(n, k).

    Args:
        num_samples: n, samples drawn for the problem, duplicates included.
        num_passed: c, how many of them passed.
        k: at most n.

    Raises:
        ConfigError: k > n (no unbiased estimate exists), or counts that make no sense.
    """
    if not 1 <= k <= num_samples:
        raise ConfigError("pass@k needs at least k samples", expected=f"1 <= k <= {num_samples}", got=f"k={k}")
    if not 0 <= num_passed <= num_samples:
        raise ConfigError("a count of passes that is impossible", expected=f"0 to {num_samples}", got=num_passed)
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def wilson_interval(num_passed: int, num_problems: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927): within [0, 1] and not empty at 0 or all passes.

    Raises:
        ConfigError: there are no problems, or counts that make no sense.
    """
    if not 0 <= num_passed <= num_problems or num_problems == 0:
        raise ConfigError("no interval for this share", expected="0 <= passed <= problems, problems >= 1",
                          got=f"{num_passed} of {num_problems}")  # fmt: skip
    n, share, z2 = num_problems, num_passed / num_problems, _Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At 0 and at n the bound is exactly the share; rounding must not leave it on the wrong side.
    return (0.0 if num_passed == 0 else centre - half, 1.0 if num_passed == n else centre + half)
