import re
from pathlib import Path

import click
import pytest

import stage1_teacher
from shared.config import load_config, read_toml
from shared.errors import ConfigError
from stage1_teacher.cli import build
from stage1_teacher.config import TeacherConfig

PROFILES = sorted((Path(stage1_teacher.__file__).parent / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profiles_hold_overrides_only(path):
    overrides = read_toml(path)
    config, default = load_config(TeacherConfig, overrides), TeacherConfig()
    assert all(getattr(config, key) != getattr(default, key) for key in overrides)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k", 0),
        ("top_k", 65_536),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("filter", "lz4"),
        ("shard_tokens", 0),
        ("limit_docs", 0),
        ("max_length", 1),
        ("on_long", "cut"),
        ("codec", "f32"),
        ("temperatures", [0.5, 2.0]),
        ("temperatures", [2.0, 1.0]),
        ("temperatures", [0.0, 1.0]),
        ("top_kk", 3),
        ("load_in", "3bit"),
        ("samples", 0),
        ("samples", 65_536),
        ("samples_from", "head"),
        ("samples_temperature", 3.0),
    ],
)
def test_what_cannot_be_used_is_named(field, value):
    with pytest.raises(ConfigError, match=field):
        load_config(TeacherConfig, {field: value})


def test_help_states_the_configs_defaults():
    shown = {}
    for option in build.params:
        assert isinstance(option, click.Option)
        if found := re.search(r"\[default: ([\w.]+)\]", option.help or ""):
            shown[option.name] = found[1]
    default = TeacherConfig()
    options = [option.name for option in build.params if hasattr(default, option.name)]
    assert shown == {n: str(getattr(default, n)) for n in options if getattr(default, n) not in (None, "")}
    assert len(shown) == 15


def test_samples_of_a_ragged_rows_tail_are_refused():
    with pytest.raises(ConfigError, match="samples of the tail with top_p"):
        TeacherConfig(samples=4, samples_from="tail", top_p=0.9)
    assert TeacherConfig(samples=4, samples_from="full", top_p=0.9).samples_from == "full"
