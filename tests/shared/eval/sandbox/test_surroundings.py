"""What test and program share of their processes: how far it crosses, and which side sets it."""

import random

import pytest

from shared.eval.sandbox.surroundings import CheckerSurroundings, SolverSurroundings


@pytest.fixture(autouse=True)
def _generator():
    state = random.getstate()
    yield
    random.setstate(state)


@pytest.mark.parametrize("num_draws", [0, 1, 311, 312, 313, 5_000])
def test_a_generator_goes_on_where_the_program_left_it(num_draws):
    of_test, of_program = CheckerSurroundings(["random"]), SolverSurroundings(["random"])
    random.seed(7)
    random.random()
    given = random.getstate()
    of_program.give(of_test.take())
    for _ in range(num_draws):
        random.random()
    left = random.getstate()
    drawn = of_program.take()
    assert drawn == {"random": 2 * num_draws}
    random.setstate(given)
    of_test.give(drawn)
    assert random.getstate() == left


def test_no_program_chooses_the_state_of_the_tests_generator():
    of_test, of_program = CheckerSurroundings(["random"]), SolverSurroundings(["random"])
    random.seed(7)
    given = random.getstate()
    of_program.give(of_test.take())
    random.seed(0)
    chosen = of_program.take()
    assert chosen == {"random": None}
    for state in (chosen, {"random": 1 << 40}, {"random": list(given)}):
        random.setstate(given)
        of_test.give(state)
        assert random.getstate() == given


@pytest.mark.parametrize("state", [[], 5, None])
def test_a_state_of_another_form_is_refused(state):
    with pytest.raises(ValueError, match="malformed"):
        CheckerSurroundings(["random"]).give(state)
    with pytest.raises(ValueError, match="malformed"):
        CheckerSurroundings([]).give({})
