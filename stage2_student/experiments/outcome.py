"""What the proof's figures amount to: the search's choice, paired differences with intervals, and sentences."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shared.errors import ConfigError
from shared.machine import machine, versions
from stage2_student.experiments.proof_plan import Plan
from stage2_student.experiments.statistics import Paired, compare, holm

FORMAT, VERSION = "codedistill-proof", 1


def choose(plan: Plan, searched: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Each arm's learning rate: of the trial whose best epoch has the lowest validation NLL; the first of equals."""
    return {
        arm.name: min(
            (trial for trial in searched if trial["arm"] == arm.name),
            key=lambda trial: min(trial["validation_nll_nats"]),
        )["learning_rate"]
        for arm in plan.arms
    }


def summarise(
    plan: Plan,
    settings: Mapping[str, Any],
    searched: Sequence[Mapping[str, Any]],
    finals: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The proof's outcome, from the members' figures.

    Returns:
        `arms`: of each `name`, `loss`, `k`, `alpha`, `temperature`, the chosen `learning_rate` and `epochs` (the best
        one in the search; each seed's own in `epochs_by_seed`), `test_nll` and `test_kl` with `mean`, `sd` and `seeds`,
        and `versus_ce`: the paired difference from the first arm, null for itself. `comparisons`: all that the plan
        asks for, with `difference`, `ci95`, `significant` (the interval excludes 0), `p`, `p_holm` over all of them and
        the same of the KL under `kl`. `summary`: sentences. `settings`, `search`, `members`, `seconds`, `versions`,
        `machine`. NLL and KL are in nats per target.
    """
    _require_pairs(finals)
    by_arm = {arm.name: [figures for figures in finals if figures["arm"] == arm.name] for arm in plan.arms}
    baseline = plan.arms[0].name
    pairs = [
        (arm.name, other) for arm in plan.arms for other in dict.fromkeys((baseline, *arm.versus)) if other != arm.name
    ]
    nll = {pair: _compare(by_arm, pair, "test_nll_nats") for pair in pairs}
    kl = {pair: _compare(by_arm, pair, "test_kl_nats") for pair in pairs}
    adjusted = dict(zip(pairs, holm([nll[pair].p for pair in pairs]), strict=True))
    comparisons = [
        {"arm": pair[0], "versus": pair[1], **_paired(nll[pair]), "p_holm": adjusted[pair], "kl": _paired(kl[pair])}
        for pair in pairs
    ]
    against_baseline = {row["arm"]: row for row in comparisons if row["versus"] == baseline}
    configs = {member.arm.name: member.config for member in plan.search()}
    arms = []
    for arm in plan.arms:
        figures, config = by_arm[arm.name], configs[arm.name]
        rate = figures[0]["learning_rate"]
        trial = next(t for t in searched if t["arm"] == arm.name and t["learning_rate"] == rate)
        arms.append({
            "name": arm.name,
            "loss": "dense" if arm.dense else config.loss if config.alpha else "cross-entropy",
            "k": None if arm.dense or not config.alpha else config.k or settings["top_k"],
            "alpha": config.alpha,
            "temperature": config.temperature,
            "label_smoothing": config.label_smoothing,
            "learning_rate": rate,
            "epochs": trial["best_epoch"],
            "epochs_by_seed": [member["best_epoch"] for member in figures],
            "test_nll": _over_seeds(figures, "test_nll_nats"),
            "test_kl": _over_seeds(figures, "test_kl_nats"),
            "versus_ce": against_baseline.get(arm.name),
        })  # fmt: skip
    return {
        "format": FORMAT,
        "version": VERSION,
        "arms": arms,
        "comparisons": comparisons,
        "summary": _sentences(plan, comparisons),
        "settings": dict(settings),
        "search": list(searched),
        "members": list(finals),
        "seconds": round(sum(member["seconds"] for member in [*searched, *finals]), 1),
        "versions": versions("codedistill", "torch", "transformers", "accelerate", "numpy", "h5py"),
        "machine": machine(),
    }


def _compare(by_arm: Mapping[str, Sequence[Mapping[str, Any]]], pair: tuple[str, str], figure: str) -> Paired:
    ours, theirs = ([member[figure] for member in by_arm[name]] for name in pair)
    return compare(ours, theirs)


def _paired(outcome: Paired) -> dict[str, Any]:
    return dataclasses.asdict(outcome) | {"ci95": list(outcome.ci95), "significant": outcome.significant}


def _over_seeds(figures: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    values = [member[name] for member in figures]
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)), "seeds": values}


def _require_pairs(finals: Sequence[Mapping[str, Any]]) -> None:
    """A seed's students had the same initial weights and data order: what makes the differences paired."""
    by_seed: dict[int, set[tuple[str, str]]] = {}
    for member in finals:
        key = (member["initial_weights_sha256"], member["data_order_sha256"])
        by_seed.setdefault(member["seed"], set()).add(key)
    for seed, kinds in by_seed.items():
        if len(kinds) != 1:
            raise ConfigError("arms of one seed began differently, so they are no pairs", where=f"seed {seed}")


def _sentences(plan: Plan, comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was found, the null results included, and what it does not show."""
    sentences = []
    for row in comparisons:
        low, high = row["ci95"]
        if row["significant"]:
            verdict = f"{'lower' if row['difference'] < 0 else 'higher'} test NLL than {row['versus']}"
            verdict += "" if row["p_holm"] < 0.05 else " (not after Holm's correction)"
        else:
            verdict = f"no difference from {row['versus']} shown"
        sentences.append(
            f"{row['arm']}: {verdict}: {row['difference']:+.4f} nats per target, 95 % [{low:+.4f}, {high:+.4f}]."
        )
    return [
        *sentences,
        f"{len(comparisons)} comparisons were made; of {len(comparisons)} true nulls, intervals of 95 % exclude 0 in "
        f"{0.05 * len(comparisons):.1f} on average, which Holm's correction guards against.",
        f"The intervals cover training anew with other seeds ({len(plan.seeds)} of them), not other documents, "
        "teachers or sizes of student.",
    ]
