"""Student's t, paired intervals and Holm's correction, against tables and values worked out by hand."""

import math

import pytest

from stage2_student.experiments.statistics import compare_settings, holm, paired_difference, quantile, within

# Two-sided 95 % points of Student's t, as every table has them.
TABLE = {
    1: 12.7062047361747,
    2: 4.302652729749464,
    3: 3.182446305284263,
    4: 2.7764451051977987,
    9: 2.2621571628,
    30: 2.0422724563012373,
    200: 1.9718962236316089,
}


@pytest.mark.parametrize(("degrees", "point"), TABLE.items())
def test_quantiles_are_those_of_the_tables(degrees, point):
    assert quantile(0.95, degrees) == pytest.approx(point, rel=1e-9)
    assert within(point, degrees) == pytest.approx(0.95, abs=1e-10)


def test_closed_forms_of_one_and_two_degrees():
    for t in (0.0, 0.3, 1.0, 7.0, 1e6):
        assert within(t, 1) == pytest.approx(2 / math.pi * math.atan(t), abs=1e-14)
        assert within(t, 2) == pytest.approx(t / math.sqrt(2 + t * t), abs=1e-14)


def test_an_interval_by_hand():
    """Differences 1, 2, 3: mean 2, standard deviation 1, so 2 ± 4.3027/√3, and t = 2·√3 with two degrees."""
    outcome = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    reach = TABLE[2] / math.sqrt(3)
    assert outcome.difference == 2
    assert outcome.ci95 == pytest.approx([2 - reach, 2 + reach], rel=1e-9)
    assert outcome.p == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-12)
    assert not outcome.significant
    narrower = paired_difference([12.0, 24.0, 36.0, 12.0, 24.0, 36.0], [1.0, 2.0, 3.0, 1.0, 2.0, 3.0])
    assert narrower.significant and narrower.ci95[0] > 0 and narrower.p < 0.05


def test_pairs_matter_and_the_sign_is_ours_less_theirs():
    theirs = [1.0, 5.0, 9.0]
    outcome = paired_difference([x - 0.5 + 0.01 * i for i, x in enumerate(theirs)], theirs)
    assert outcome.difference == pytest.approx(-0.49)
    assert outcome.ci95[1] < 0
    again = paired_difference(theirs, theirs)
    assert (again.difference, again.ci95, again.p, again.significant) == (0.0, [0.0, 0.0], 1.0, False)
    shifted = paired_difference([2.0, 6.0, 10.0], theirs)
    assert (shifted.difference, shifted.ci95, shifted.p, shifted.significant) == (1.0, [1.0, 1.0], 0.0, True)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_settings_are_compared_with_the_first_and_with_those_they_name():
    """Pairs are formed by seed, whatever the order; one common seed makes no pair."""
    figures = {
        "ce": {1: (5.0, 2.0), 2: (6.0, 3.0), 3: (7.0, 4.0)},
        "ghost": {3: (6.6, 4.0), 1: (4.5, 2.0), 2: (5.4, 3.0)},
        "once": {1: (4.0, 1.0)},
        "dense": {1: (4.5, 1.0), 2: (5.4, 2.0)},
    }
    rows = compare_settings(figures, {"dense": ["ghost", "missing"], "ghost": ["ce"]})
    assert [(row.setting, row.versus) for row in rows] == [("ghost", "ce"), ("dense", "ce"), ("dense", "ghost")]
    nll = paired_difference([6.6, 4.5, 5.4], [7.0, 5.0, 6.0])
    assert (rows[0].difference, rows[0].ci95, rows[0].p) == (nll.difference, nll.ci95, nll.p)
    assert rows[0].kl == paired_difference([2.0, 3.0, 4.0], [2.0, 3.0, 4.0])
    assert rows[1].kl.difference == -1.0 and rows[2].difference == 0.0
    assert [row.p_holm for row in rows] == holm([row.p for row in rows])
    assert compare_settings({}, {}) == []
