"""Records from JSON data: exact types, nested fields, and errors that name the path of the field."""

import dataclasses
from typing import Any, Literal

import pytest

from shared.errors import CacheFormatError, ConfigError
from shared.records import convert, from_dict, to_dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    share: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    count: int
    ratio: float
    whole: bool
    kind: Literal["x", "y", 1]
    parts: list[Part]
    grid: tuple[float, ...]
    range: tuple[int, float]
    by_name: dict[str, Part]
    best: Part | None
    either: int | str | list[int]
    free: dict[str, Any]
    loose: Any = None


VALUE: dict[str, Any] = {
    "count": 3,
    "ratio": 1,
    "whole": True,
    "kind": "y",
    "parts": [{"name": "a"}, {"name": "b", "share": 2}],
    "grid": [0.5, 1],
    "range": [1, 2.0],
    "by_name": {"c": {"name": "c", "share": 0.5}},
    "best": None,
    "either": [1],
    "free": {"any": [None, {}]},
    "loose": [1.0],
}


def test_nested_data_becomes_dataclasses():
    record = from_dict(Record, VALUE, where="here")
    assert record == Record(
        count=3,
        ratio=1,
        whole=True,
        kind="y",
        parts=[Part(name="a"), Part(name="b", share=2)],
        grid=(0.5, 1),
        range=(1, 2.0),
        by_name={"c": Part(name="c", share=0.5)},
        best=None,
        either=[1],
        free={"any": [None, {}]},
        loose=[1.0],
    )
    assert type(record.ratio) is int and type(record.parts[1].share) is int  # numbers stay as they were written
    assert to_dict(record) == VALUE | {"parts": [{"name": "a", "share": 1.0}, {"name": "b", "share": 2}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": True}, "here, count; expected: int; got: True (bool)"),
        ({"count": 3.0}, "here, count; expected: int; got: 3.0 (float)"),
        ({"count": None}, "here, count; expected: int; got: None (NoneType)"),
        ({"ratio": "1"}, "here, ratio; expected: float; got: '1' (str)"),
        ({"ratio": False}, "here, ratio; expected: float; got: False (bool)"),
        ({"ratio": float("nan")}, "here, ratio; expected: float; got: nan (float)"),
        ({"ratio": 10**400}, "here, ratio; expected: float"),
        ({"whole": 1}, "here, whole; expected: bool; got: 1 (int)"),
        ({"kind": "z"}, "a value that is not allowed; where: here, kind; expected: x | y | 1; got: 'z' (str)"),
        ({"kind": True}, "here, kind; expected: x | y | 1; got: True (bool)"),
        ({"parts": {}}, "here, parts; expected: list"),
        ({"parts": [{"name": "a"}, 3]}, "here, parts[1]; expected: Part; got: 3 (int)"),
        ({"parts": [{"name": "a"}, {"name": 3}]}, "here, parts[1].name; expected: str; got: 3 (int)"),
        ({"parts": [{}]}, "a field is missing; where: here, parts[0]; expected: name"),
        ({"parts": [{"name": "a", "shar": 1}]}, "an unknown field; where: here, parts[0].shar; fix: did you mean"),
        ({"grid": [1.0, "a"]}, "here, grid[1]; expected: float; got: 'a' (str)"),
        ({"range": [1]}, "here, range; expected: tuple[int, float]; got: [1] (list)"),
        ({"by_name": {"c": None}}, "here, by_name.c; expected: Part; got: None (NoneType)"),
        ({"best": []}, "here, best; expected: Part; got: [] (list)"),
        ({"either": [None]}, "here, either[0]; expected: int; got: None (NoneType)"),
        ({"extra": 1}, "an unknown field; where: here, extra; fix: one of best, "),
    ],
)
def test_a_wrong_value_is_refused_by_its_path(change, message):
    with pytest.raises(CacheFormatError) as error:
        from_dict(Record, VALUE | change, where="here", error=CacheFormatError)
    assert message in str(error.value)


def test_what_is_no_object_is_refused():
    with pytest.raises(ConfigError) as error:
        from_dict(Part, [], where="here", fix="write it again")
    assert str(error.value) == (
        "a value of the wrong type; where: here; expected: Part; got: [] (list); fix: write it again"
    )


def test_unknown_fields_are_ignored_unless_strict():
    value = {"name": "a", "extra": 1}
    assert from_dict(Part, value, where="here", strict=False) == Part(name="a")
    parts = VALUE | {"parts": [value]}
    assert from_dict(Record, parts, where="here", strict=False).parts == [Part(name="a")]
    with pytest.raises(ConfigError, match="an unknown field; where: here, extra"):
        from_dict(Part, value, where="here")


def test_numbers_of_a_configuration_become_floats():
    values = convert([1, 0.5], tuple[float, ...], where="Example.grid")
    assert (values, type(values[0])) == ((1.0, 0.5), float)
    with pytest.raises(ConfigError, match=r"where: Example\.grid\[1\]; expected: float; got: 'a' \(str\)"):
        convert([1, "a"], tuple[float, ...], where="Example.grid")
