"""The runs of an experiment: a TOML grid and its variants, each run with a readable name and a resolved config."""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.config import read_toml
from shared.errors import ConfigError, DistillError, require
from shared.files import sha256_json
from shared.records import convert, from_dict, to_dict
from stage2_student.config import StudentConfig, student_config

MAX_NAME_BYTES = 120  # file systems allow 255, and the names of logs and temporary files are longer


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One student of an experiment."""

    name: str  # of its folder
    setting: str  # the name without the seed. Runs of one setting differ in nothing else
    swept: dict[str, Any]  # the values that the grid, its variant or its own `[[run]]` gives it, for tables
    settings: dict[str, Any]  # every value that differs from a default
    config: StudentConfig  # resolved


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to train the student; `settings` are what it changes."""

    name: str = ""  # in tables and folder names
    versus: tuple[str, ...] = ()  # variants that it is compared with, beside the first one
    settings: dict


@dataclass(frozen=True, kw_only=True, slots=True)
class Seeds:
    """Seeds of the runs that confirm a search (`student proof`)."""

    seeds: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """An experiment's file."""

    path: str
    fixed: dict[str, Any]  # settings of every run
    grid: dict[str, list[Any]] = field(default_factory=dict)  # every combination is trained, with every variant
    variant: tuple[Variant, ...]  # the first one is the baseline
    run: list[dict[str, Any]] = field(default_factory=list)  # the settings of each `[[run]]`, outside the grid
    confirm: Seeds = Seeds()

    def runs(self, forced: Mapping[str, Any] | None = None) -> list[Run]:
        """Every run, in the file's order; `forced` settings win over the file's.

        Raises:
            ConfigError: a key or value that no run can have, or the same run twice.
        """
        product = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        listed: list[tuple[Variant | None, dict[str, Any]]] = []
        if self.grid or self.variant:
            listed = [(variant, values) for variant in self.variant or (None,) for values in product]
        return self._resolve([*listed, *((None, values) for values in self.run)], forced or {})

    def confirming_runs(self, chosen: Mapping[str, Mapping[str, Any]], forced: Mapping[str, Any]) -> list[Run]:
        """Seed by seed a run of each variant, with the values `chosen` for it in the search."""
        listed = [
            (variant, {**chosen[variant.name], "seed": seed}) for seed in self.confirm.seeds for variant in self.variant
        ]
        return self._resolve(listed, forced)

    def _resolve(self, listed: Iterable[tuple[Variant | None, dict[str, Any]]], forced: Mapping[str, Any]) -> list[Run]:
        runs: list[Run] = []
        for variant, values in listed:
            own = {**(variant.settings if variant else {}), **values}
            swept = {"variant": variant.name, **values} if variant else values
            label = _label(swept)
            try:
                config = student_config(self.fixed, own, forced)
            except DistillError as error:
                raise ConfigError(f"a run is refused: {error}", where=f"{self.path}: {label}") from error
            same = next((run for run in runs if run.config == config), None)
            if same:
                raise ConfigError("two runs are the same", where=self.path, got=f"{_label(same.swept)} and {label}")
            name = _folder_name(swept, config, taken=[run.name for run in runs])
            setting = _label({key: value for key, value in swept.items() if key != "seed"})
            settings = {**self.fixed, **own, **forced}
            runs.append(Run(name=name, setting=setting, swept=swept, settings=settings, config=config))
        return runs


def read_experiment(path: Path) -> Experiment:
    """Read an experiment's TOML file.

    It is a training config (`student train --config`) with one or more of: a table `[grid]` of lists, of which every
    combination is trained; tables `[[variant]]`, each with a `name`, with which the grid is repeated; tables `[[run]]`,
    each of which describes one further run; a table `[confirm]` with the `seeds` of `student proof`. A run's name
    depends only on what the file says of that run, so a grid that grows keeps the students it has trained.

    Raises:
        ConfigError: no TOML, no run, or tables of another form.
    """
    fixed, where = read_toml(path), str(path)
    tables = {name: fixed.pop(name) for name in ("grid", "run", "confirm") if name in fixed}
    listed = convert(fixed.pop("variant", []), list[dict[str, Any]], where=f"{where}, variant")
    variants = [_variant_fields(table) for table in listed]
    experiment = from_dict(Experiment, tables | {"path": where, "fixed": fixed, "variant": variants}, where=where)
    for key, values in experiment.grid.items():
        require(values, "a grid's key needs a list of values", where=f"{path}: grid.{key}", got=repr(values))
    require(all(experiment.run), "each [[run]] must be a table of settings", where=path)
    _require_distinct(experiment)
    require(experiment.runs(), "nothing to train", where=path,
            expected="a table [grid] of lists, or tables [[variant]] or [[run]]")  # fmt: skip
    return experiment


def _variant_fields(table: dict[str, Any]) -> dict[str, Any]:
    """A `[[variant]]` as the fields of `Variant`."""
    own = {key: table[key] for key in ("name", "versus") if key in table}
    return own | {"settings": {key: value for key, value in table.items() if key not in own}}


def _require_distinct(experiment: Experiment) -> None:
    """Refuse variants that cannot be told apart, paired, or compared as they ask for."""
    where, names = experiment.path, [variant.name for variant in experiment.variant]
    distinct = len(set(names)) == len(names) and all(re.fullmatch(r"[a-z0-9.-]+", name) for name in names)
    require(distinct, "the variants cannot be told apart", where=where, got=", ".join(names),
            expected="for each variant a name of its own of lower-case letters, digits, dots and dashes")  # fmt: skip
    for variant in experiment.variant:
        shared = ", ".join(sorted(variant.settings.keys() & {*experiment.grid, "seed"}))
        require(not shared, "every variant has the same grid and seeds", where=where, got=shared)
        unknown = ", ".join(sorted(set(variant.versus) - (set(names) - {variant.name})))
        require(not unknown, f"{variant.name} is compared with a variant that does not exist", where=where, got=unknown)


def _label(swept: Mapping[str, Any]) -> str:
    return ",".join(str(value) if key == "variant" else f"{key}={value}" for key, value in swept.items())


def _folder_name(swept: Mapping[str, Any], config: StudentConfig, *, taken: Sequence[str]) -> str:
    """The label in characters that every file system and shell accepts; a digest where that is not enough."""
    name = re.sub(r"[^\w.,=+-]", "-", _label(swept), flags=re.ASCII)
    if len(name) > MAX_NAME_BYTES or name in taken:
        name = f"{name[: MAX_NAME_BYTES - 9]}-{sha256_json(to_dict(config))[:8]}"
    return name


def to_toml(value: Any) -> str:
    """A value that came from TOML, as TOML on one line."""
    if isinstance(value, dict):
        pairs = (f"{json.dumps(key, ensure_ascii=False)} = {to_toml(item)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
