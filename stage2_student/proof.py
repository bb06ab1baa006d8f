"""The proof: one student, one cache, several losses, paired seeds, and what may be claimed of their differences.

Each arm has the same search over learning rates, judged on the validation cache, and everywhere the epoch with the best
validation NLL. The students that are compared are then trained with seeds of their own, each seed with the same initial
weights and data order in all arms, and they alone are scored on the test cache.
"""

import ctypes
import dataclasses
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from shared.cache.claim import Claim
from shared.cache.identity import require_same
from shared.cache.reader import Cache
from shared.config import to_dict
from shared.errors import ConfigError, ResumeError
from shared.eval.models import model_digest
from shared.runtime import log, machine, read_json, versions, write_bytes, write_json
from shared.tokenizer import load_tokenizer
from stage2_student.config import require_labels
from stage2_student.proof_dense import write_dense
from stage2_student.proof_member import train_member
from stage2_student.proof_plan import Arm, Member, Plan, read_plan
from stage2_student.proof_report import page, plot
from stage2_student.proof_statistics import Paired, compare, holm
from stage2_student.train import identify

FORMAT, VERSION = "codedistill-proof", 1
SETTINGS, RESULT = "settings.json", "proof.json"
_PR_SET_PDEATHSIG = 1


def prove(
    plan_path: Path, train: Path, validation: Path, test: Path, out: Path, *, teacher: Path | None = None, jobs: int = 1
) -> dict[str, Any]:
    """Train all members of a plan that are not finished, and write `proof.{json,md,svg}`.

    Args:
        plan_path: TOML (see `read_plan`).
        train, validation, test: caches of one teacher without a document in common.
        out: the proof's folder: `members/NAME.json` as they finish, `settings.json`.
        teacher: the model that made the caches, for an arm of its full distribution.
        jobs: members trained at once; they share the processor's threads.

    Returns:
        What `proof.json` holds (see `summarise`).

    Raises:
        ConfigError: the plan, or caches that do not go with it.
        CacheMismatchError: caches of different teachers, or another teacher than theirs.
        ResumeError: the folder holds a proof of other settings, or another process works in it.
    """
    plan, caches = read_plan(plan_path), {"train": train, "validation": validation, "test": test}
    settings = _settings(plan, caches, teacher)
    (out / "members").mkdir(parents=True, exist_ok=True)
    claim = Claim(out, "the proof in this folder")
    try:
        if (out / SETTINGS).exists():
            _require_equal(read_json(out / SETTINGS), settings, out)
        else:
            write_json(out / SETTINGS, settings)
        dense = out / "teacher-logprobs.npy"
        members = plan.search()
        if teacher and any(arm.dense for arm in plan.arms) and not _all_done(plan, out):
            write_dense(teacher, Cache(train), dense)
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin_worker, (jobs,)) as pool:
            try:
                searched = _train(pool, members, caches, dense, out)
                chosen = choose(plan, searched)
                log("learning rates chosen: " + ", ".join(f"{arm} {rate:g}" for arm, rate in chosen.items()))
                finals = _train(pool, plan.finals(chosen), caches, dense, out)
            except BaseException:
                for child in multiprocessing.active_children():
                    child.terminate()  # what they were training is trained again
                raise
        dense.unlink(missing_ok=True)
        result = summarise(plan, settings, searched, finals)
        write_bytes(out / "proof.md", page(result).encode())
        write_bytes(out / "proof.svg", plot(result))
        write_json(out / RESULT, result)
    finally:
        claim.release()
    return result


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
    values = torch.tensor([member[name] for member in figures], dtype=torch.float64)
    return {"mean": values.mean().item(), "sd": values.std().item(), "seeds": values.tolist()}


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


def _settings(plan: Plan, paths: Mapping[str, Path], teacher: Path | None) -> dict[str, Any]:
    """All that the figures depend on, by digest, having checked that it goes together."""
    caches = {name: Cache(path) for name, path in paths.items()}
    first = caches["train"]
    seen: dict[bytes, str] = {}
    for name, cache in caches.items():
        require_same("the label identities", first.label_identity, cache.label_identity,
                     ours_name=first.path, theirs_name=cache.path,
                     fix="build all caches with the same teacher and options")  # fmt: skip
        for doc in range(cache.num_documents):
            theirs = seen.setdefault(sha256(cache.tokens(doc).tobytes()).digest(), name)
            if theirs != name:
                got = cache.meta(doc).get("id", doc)
                raise ConfigError("two caches share a document", where=f"{paths[theirs]} and {cache.path}", got=got)
    for member in plan.search():
        require_labels(member.config, first)
        if member.config.temperature not in first.temperatures:
            raise ConfigError("no such temperature in the caches", where=member.arm.name, got=member.config.temperature)
    needs_teacher = [arm.name for arm in plan.arms if arm.dense]
    if needs_teacher and teacher is None:
        raise ConfigError("an arm needs the teacher's full distribution", where=needs_teacher[0], fix="--teacher DIR")
    return {
        "learning_rates": list(plan.learning_rates),
        "search_seed": plan.search_seed,
        "seeds": list(plan.seeds),
        "student": dict(plan.common),
        "arms": [_describe(arm) for arm in plan.arms],
        "configs": {member.arm.name: to_dict(member.config) for member in plan.search()},
        "top_k": first.width,
        "teacher": model_digest(teacher, load_tokenizer(teacher)) if needs_teacher and teacher else None,
        "caches": {name: identify(cache) | {"documents": cache.num_documents, "tokens": cache.num_tokens}
                   for name, cache in caches.items()},
    }  # fmt: skip


def _describe(arm: Arm) -> dict[str, Any]:
    return {"name": arm.name, "versus": list(arm.versus), "dense": arm.dense, **arm.settings}


def _require_equal(theirs: Mapping[str, Any], ours: Mapping[str, Any], out: Path) -> None:
    for key in ours:
        if ours[key] != theirs.get(key):
            raise ResumeError(
                f"the folder holds a proof with other settings: {key}",
                where=out,
                expected=theirs.get(key),
                got=ours[key],
                fix="choose another --out, or give the settings of that proof",
            )


def _file(member: Member, out: Path) -> Path:
    return out / "members" / f"{member.name}.json"


def _all_done(plan: Plan, out: Path) -> bool:
    """Whether no member is left to train."""
    if not all(_file(member, out).exists() for member in plan.search()):
        return False
    chosen = choose(plan, [read_json(_file(member, out)) for member in plan.search()])
    return all(_file(member, out).exists() for member in plan.finals(chosen))


def _train(
    pool: ProcessPoolExecutor, members: Sequence[Member], caches: Mapping[str, Path], dense: Path, out: Path
) -> list[dict[str, Any]]:
    """Figures of all members, in order; those that have none yet are trained."""
    waiting = [member for member in members if not _file(member, out).exists()]
    log(f"{len(members) - len(waiting)} of {len(members)} {members[0].name.partition('-')[0]} members are finished")
    start = time.monotonic()
    futures = {
        pool.submit(train_member, member, caches["train"], caches["validation"], caches["test"], dense, out): member
        for member in waiting
    }
    for number, future in enumerate(as_completed(futures), 1):
        figures, member = future.result(), futures[future]
        write_json(_file(member, out), figures)
        left = (time.monotonic() - start) / number * (len(waiting) - number)
        log(
            f"{member.name}: validation NLL {min(figures['validation_nll_nats']):.4f} after epoch "
            f"{figures['best_epoch']}; {figures['seconds']:.0f} s; {number}/{len(waiting)}, {left / 60:.0f} min left"
        )
    return [read_json(_file(member, out)) for member in members]


def _begin_worker(jobs: int) -> None:
    """Share the threads, and end with the parent, also where that is killed (Linux)."""
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:
            sys.exit(1)
