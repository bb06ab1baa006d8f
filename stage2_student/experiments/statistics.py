"""Paired differences over seeds: Student's t-intervals, p-values, and Holm's correction for many comparisons."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from shared.eval.results import Comparison, PairedDifference
from stage2_student.experiments.runner import Row

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


Figures = dict[str, dict[int, tuple[float, float]]]  # NLL and KL in nats per target, by setting and seed


def figures_of(rows: Iterable[Row], setting: Callable[[Row], str]) -> Figures:
    """The figures of the runs that have both."""
    figures: Figures = {}
    for row in rows:
        if row.nll_nats is not None and row.kl_to_teacher_nats is not None:
            figures.setdefault(setting(row), {})[row.seed] = (row.nll_nats, row.kl_to_teacher_nats)
    return figures


def compare_settings(figures: Figures, versus: Mapping[str, Sequence[str]]) -> list[Comparison]:
    """Compare each setting with the first one, and with those that `versus` names for it.

    Args:
        figures: see `figures_of`.
        versus: by setting, further settings to compare it with.

    Returns:
        The comparisons of settings that have two seeds in common.
    """
    pairs = [
        (ours, theirs)
        for ours in figures
        for theirs in dict.fromkeys((next(iter(figures)), *versus.get(ours, ())))
        if theirs != ours and theirs in figures and len(figures[ours].keys() & figures[theirs].keys()) > 1
    ]
    outcomes = []
    for ours, theirs in pairs:
        common = [(figures[ours][seed], figures[theirs][seed]) for seed in figures[ours] if seed in figures[theirs]]
        outcomes.append([paired_difference(*np.array(common)[:, :, figure].T) for figure in (0, 1)])
    corrected = holm([nll.p for nll, _ in outcomes])
    return [
        Comparison(**dataclasses.asdict(nll), setting=ours, versus=theirs, p_holm=p, kl=kl)
        for (ours, theirs), (nll, kl), p in zip(pairs, outcomes, corrected, strict=True)
    ]


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> PairedDifference:
    """`ours` − `theirs`, paired in order; at least two pairs."""
    differences = np.subtract(ours, theirs)
    n, mean = len(differences), float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    reach = quantile(0.95, n - 1) * error
    p = 1 - within(abs(mean) / error, n - 1) if error else float(mean == 0)
    low, high = mean - reach, mean + reach
    return PairedDifference(difference=mean, ci95=[low, high], p=p, significant=not low <= 0 <= high)


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


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): rejecting those below 0.05 errs at all in at most 5 % of experiments."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted
