"""pass@k and its interval."""

import itertools
import math
import random
from fractions import Fraction

import pytest

from shared.eval.programs.passk import mean_interval, pass_at_k


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 6), (7, 3, 5), (4, 1, 4)])
def test_is_the_share_of_all_subsets_that_hold_a_pass(n, c, k):
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(float(Fraction(sum(map(any, subsets)), len(subsets))), abs=1e-15)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 6), (5, 2, 0), (5, 6, 1), (5, -1, 1), (0, 0, 1)])
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(AssertionError):
        pass_at_k(n, c, k)


def wilson_interval(passed, problems):
    """One sample each; it must be the roots p of (passed/problems − p)² = z² p(1 − p)/problems."""
    found = mean_interval([1.0] * passed + [0.0] * (problems - passed), 1)
    share, z2 = passed / problems, 1.959963984540054**2 / problems
    middle, half = share + z2 / 2, math.sqrt((share + z2 / 2) ** 2 - (1 + z2) * share**2)
    assert found == pytest.approx([(middle - half) / (1 + z2), (middle + half) / (1 + z2)], abs=1e-12)
    return found


def test_one_sample_each_has_wilson_s_interval():
    # Newcombe 1998, table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson_interval(164, 164)[1] == 1.0 and wilson_interval(1, 1)[1] == 1.0
    assert wilson_interval(0, 164)[0] == 0.0
    assert mean_interval([0.0] * 20, 50) == wilson_interval(0, 20)  # never empty, however many samples
    for estimates in ([], [0.5, 1.1], [float("nan")]):
        with pytest.raises(AssertionError):
            mean_interval(estimates, 1)


def test_the_estimate_is_unbiased():
    """Over all outcomes of n samples that pass with probability p, its mean is what k samples do: 1 − (1 − p)^k."""
    n = 7
    for p, k in itertools.product((Fraction(0), Fraction(1, 9), Fraction(1, 2), Fraction(1)), range(1, n + 1)):
        mean = sum(
            math.comb(n, c)
            * p**c
            * (1 - p) ** (n - c)
            * Fraction(pass_at_k(n, c, k)).limit_denominator(math.comb(n, k))
            for c in range(n + 1)
        )
        assert mean == 1 - (1 - p) ** k


def test_many_samples_neither_overflow_nor_lose_a_single_pass():
    assert pass_at_k(10_000, 1, 100) == 0.01
    assert pass_at_k(200, 1, 1) == 1 / 200


def test_problems_that_differ_less_count_for_more():
    # Estimates 0.25 and 0.75 alternating: a variance of 1/16 where passes and failures have 1/4, so 40 count as 160.
    assert mean_interval([0.25, 0.75] * 20, 10) == pytest.approx(wilson_interval(80, 160), abs=1e-12)
    # Alike, they are worth as much as all samples.
    assert mean_interval([0.5] * 40, 4) == pytest.approx(wilson_interval(80, 160), abs=1e-12)


def test_coverage():
    """1,000 benchmarks of 50 problems with 5 samples each: the true pass@2 is in about 95 of 100 intervals."""
    draw = random.Random(0)
    chances = [0.0, 0.0, 0.02, 0.1, 0.5]
    truth = sum(1 - (1 - chance) ** 2 for chance in chances) / len(chances)
    covered = 0
    for _ in range(1000):
        problems = [draw.choice(chances) for _ in range(50)]
        passes = [sum(draw.random() < chance for _ in range(5)) for chance in problems]
        low, high = mean_interval([pass_at_k(5, c, 2) for c in passes], 5)
        covered += low <= truth <= high
    assert 930 <= covered <= 970
