"""Paired differences over seeds: Student's t-intervals, p-values, and Holm's correction for many comparisons."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """Of n paired differences: mean, 95 % interval of the mean, and two-sided p-value of a mean of 0."""

    difference: float
    ci95: tuple[float, float]
    p: float

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0."""
        return not self.ci95[0] <= 0 <= self.ci95[1]


def within(t: float, degrees: int) -> float:
    """P(|T| ≤ t) of Student's distribution, t ≥ 0.

    With t = √ν·tan θ it is 2/B(1/2, ν/2) · ∫ cos^{ν−1} from 0 to θ, whose integrand Gauss and Legendre's 64 points
    integrate to the last digits.
    """
    half = math.atan(t / math.sqrt(degrees)) / 2
    integral = half * float(_WEIGHTS @ np.cos(half * (1 + _NODES)) ** (degrees - 1))
    log_beta = math.lgamma(0.5) + math.lgamma(degrees / 2) - math.lgamma((degrees + 1) / 2)
    return 2 * integral * math.exp(-log_beta)


def quantile(probability: float, degrees: int) -> float:
    """The t with P(|T| ≤ t) = probability, by bisection."""
    low, high = 0.0, 1.0
    while within(high, degrees) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, degrees) < probability else (low, middle)
    return high


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """`ours` − `theirs`, paired in order; two pairs at least."""
    differences = np.subtract(ours, theirs)
    n, mean = len(differences), float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    reach = quantile(0.95, n - 1) * error
    if error == 0:
        return Paired(difference=mean, ci95=(mean, mean), p=float(mean == 0))
    return Paired(difference=mean, ci95=(mean - reach, mean + reach), p=1 - within(abs(mean) / error, n - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): rejecting those below 0.05 errs at all in at most 5 % of experiments."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted
