"""Config is data: defaults, layers, types, and errors that name the key."""

import dataclasses
from typing import Literal

import pytest

from shared.config import load_config, parse_assignments, read_toml
from shared.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    rate: float = 0.1
    steps: int = 10
    name: str = "a"
    flag: bool = False
    grid: tuple[float, ...] = (1.0,)
    kind: Literal["x", "y"] = "x"
    limit: int | None = None


def test_later_layers_win_and_the_rest_keeps_its_default():
    config = load_config(Example, {"steps": 1, "name": "b"}, {"steps": 2})
    assert config == Example(steps=2, name="b")


def test_types_widen_only_where_nothing_is_lost():
    config = load_config(Example, {"rate": 1, "grid": [1, 2], "limit": 3})
    assert (config.rate, config.grid, config.limit) == (1.0, (1.0, 2.0), 3)
    assert isinstance(config.rate, float) and isinstance(config.grid[0], float)
    assert load_config(Example, {"limit": None}).limit is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"step": 1}, ["unknown", "'step'", "did you mean 'steps'"]),
        ({"zzz": 1}, ["unknown", "one of", "rate"]),
        ({"steps": 1.5}, ["Example.steps", "int", "1.5"]),
        ({"steps": True}, ["Example.steps", "int"]),
        ({"steps": "10"}, ["Example.steps", "int", "str"]),
        ({"flag": 1}, ["Example.flag", "bool"]),
        ({"kind": "z"}, ["Example.kind", "x | y", "'z'"]),
        ({"grid": [1, "a"]}, ["Example.grid", "float", "'a'"]),
        ({"limit": "a"}, ["Example.limit", "int", "'a'"]),
    ],
)
def test_a_wrong_value_is_refused_by_name(values, words):
    with pytest.raises(ConfigError) as error:
        load_config(Example, values)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_assignments_are_toml_values_and_else_strings():
    parsed = parse_assignments(["a=1", "b=1e-4", "c=true", "d=[1, 2]", "e=cosine", 'f="1"', "g=a=b"])
    assert parsed == {"a": 1, "b": 1e-4, "c": True, "d": [1, 2], "e": "cosine", "f": "1", "g": "a=b"}


@pytest.mark.parametrize("text", ["novalue", "=1", " =1"])
def test_an_assignment_without_a_key_is_refused(text):
    with pytest.raises(ConfigError, match="key=value"):
        parse_assignments([text])


def test_toml_files(tmp_path):
    (tmp_path / "good.toml").write_text("steps = 3\n")
    assert read_toml(tmp_path / "good.toml") == {"steps": 3}
    (tmp_path / "bad.toml").write_text("steps = \n")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        read_toml(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="No such file"):
        read_toml(tmp_path / "none.toml")
