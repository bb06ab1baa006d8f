"""What the proof compares: arms, the search that each is given, and the seeds; read from TOML."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config import load_config, read_toml
from shared.errors import ConfigError
from stage2_student.config import StudentConfig, student_config


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to train the student.

    Attributes:
        name: of files and tables.
        versus: arms that it is compared with, seed by seed.
        dense: the teacher's full distribution in place of the cache's rows.
        settings: of `student_config`, what sets it apart.
    """

    name: str = ""
    versus: tuple[str, ...] = ()
    dense: bool = False
    settings: dict


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One student: an arm at a learning rate with a seed. `is_final` ones alone are scored on the test set."""

    arm: Arm
    learning_rate: float
    seed: int
    is_final: bool
    config: StudentConfig

    @property
    def name(self) -> str:
        """Its file's, unique in a proof."""
        stage = "final" if self.is_final else "search"
        return f"{stage}-{self.arm.name}-{self.learning_rate:g}-{self.seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A proof's settings.

    Attributes:
        learning_rates: each arm is tried with all of them.
        search_seed: of these trials; none of `seeds`.
        seeds: of the students that are compared; initial weights and data order depend on the seed alone.
        common: what all arms share, as `student train --set` has it; `num_train_epochs` is the most that is trained.
        arms: the first is the baseline that all are compared with.
    """

    learning_rates: tuple[float, ...]
    search_seed: int
    seeds: tuple[int, ...]
    common: Mapping[str, Any]
    arms: Sequence[Arm]

    def search(self) -> list[Member]:
        """The trials, scored on the validation set."""
        return [
            self._member(arm, rate, self.search_seed, is_final=False)
            for arm, rate in itertools.product(self.arms, self.learning_rates)
        ]

    def finals(self, chosen: Mapping[str, float]) -> list[Member]:
        """The students to compare, seed by seed, given each arm's learning rate."""
        return [
            self._member(arm, chosen[arm.name], seed, is_final=True)
            for seed, arm in itertools.product(self.seeds, self.arms)
        ]

    def _member(self, arm: Arm, rate: float, seed: int, *, is_final: bool) -> Member:
        # Nothing is written but the member's figures, and the trainer draws no bars of its own.
        own = {"learning_rate": rate, "seed": seed, "eval_steps": 0, "save_steps": 0, "disable_tqdm": True}
        config = student_config(self.common, arm.settings, own)
        return Member(arm=arm, learning_rate=rate, seed=seed, is_final=is_final, config=config)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Numbers:
    learning_rates: tuple[float, ...] = ()
    search_seed: int = 0
    seeds: tuple[int, ...] = ()


def read_plan(path: Path) -> Plan:
    """Read a proof's TOML: `learning_rates`, `search_seed`, `seeds`, `[student]` and `[[arm]]`.

    Raises:
        ConfigError: no TOML, a key or value that no run can have, fewer than two arms, rates or seeds than a
            comparison needs, or an arm that is compared with none of the plan's.
    """
    given = read_toml(path)
    common, arms = given.pop("student", {}), given.pop("arm", [])
    numbers = load_config(_Numbers, given)
    plan = Plan(
        learning_rates=numbers.learning_rates,
        search_seed=numbers.search_seed,
        seeds=numbers.seeds,
        common=common,
        arms=[_arm(arm, path) for arm in arms],
    )
    names = [arm.name for arm in plan.arms]
    if len(set(names)) != len(names) or len(names) < 2 or any(not re.fullmatch(r"[a-z0-9.-]+", n) for n in names):
        expected = "two or more, each with a name of its own in lower case, digits, dots and dashes"
        raise ConfigError("the arms cannot be told apart", where=path, expected=expected, got=", ".join(names))
    for arm in plan.arms:
        if not set(arm.versus) <= set(names) - {arm.name}:
            got = ", ".join(arm.versus)
            raise ConfigError(f"{arm.name} is compared with an arm that is not there", where=path, got=got)
        if arm.dense and (set(arm.settings) & {"loss", "k", "temperature", "divergence"}):
            raise ConfigError("the dense arm's labels are the full distribution at T = 1", where=f"{path}, {arm.name}")
    if len(set(plan.seeds)) < 2 or len(set(plan.seeds)) != len(plan.seeds) or plan.search_seed in plan.seeds:
        got = f"seeds {list(plan.seeds)}, search_seed {plan.search_seed}"
        raise ConfigError("the seeds", where=path, expected="two or more, each once, none the search's", got=got)
    if len(set(plan.learning_rates)) != max(len(plan.learning_rates), 1):
        raise ConfigError(
            "learning_rates", where=path, expected="one or more, each once", got=list(plan.learning_rates)
        )
    plan.search()  # so that what no run can have is refused now
    return plan


def _arm(given: Mapping[str, Any], path: Path) -> Arm:
    own = {key: given[key] for key in ("name", "versus", "dense") if key in given}
    settings = {key: value for key, value in given.items() if key not in own}
    taken = settings.keys() & {"learning_rate", "seed"}
    if taken:
        raise ConfigError("all arms have the same", where=path, got=", ".join(sorted(taken)))
    return load_config(Arm, own, {"settings": settings})
