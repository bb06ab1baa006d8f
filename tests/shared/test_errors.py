import math

import pytest

from shared.errors import CacheFormatError, ConfigError, require, require_range


def test_require_raises_the_error_named_with_all_its_parts():
    require(1 < 2, "never said")
    with pytest.raises(ConfigError) as caught:
        require(False, "two and two", where="sum", expected=4, got=5, fix="count again")
    assert str(caught.value) == "two and two; where: sum; expected: 4; got: 5; fix: count again"
    assert caught.value.for_terminal() == "two and two\n  where: sum\n  expected: 4\n  got: 5\n  fix: count again"
    with pytest.raises(CacheFormatError, match=r"^no shard$"):
        require([], "no shard", error=CacheFormatError)


@pytest.mark.parametrize(
    ("value", "holds"), [(0.0, False), (5e-324, True), (1.0, True), (1.5, False), (math.nan, False)]
)
def test_a_range_names_its_bounds_and_the_value(value, holds):
    if holds:
        require_range(value, "alpha", above=0, at_most=1)
    else:
        with pytest.raises(ConfigError) as caught:
            require_range(value, "alpha", above=0, at_most=1)
        assert str(caught.value) == f"a value out of range; where: alpha; expected: above 0, at most 1; got: {value}"


def test_infinity_is_never_in_range():
    with pytest.raises(ConfigError, match="expected: at least 1; got: inf"):
        require_range(math.inf, "epochs", at_least=1)
