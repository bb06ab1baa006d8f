"""The proof: one student, one cache, several losses, paired seeds, and what may be claimed of their differences.

Each arm has the same search over learning rates, judged on the validation cache, and everywhere the epoch with the best
validation NLL. The students that are compared are then trained with seeds of their own, each seed with the same initial
weights and data order in all arms, and they alone are scored on the test cache.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from shared.cache.identity import require_same
from shared.cache.lock import Claim
from shared.cache.reader import Cache
from shared.checkpoints import model_digest
from shared.config import to_dict
from shared.errors import ConfigError, DistillError, ResumeError
from shared.files import read_json, write_bytes, write_json
from shared.process import log
from shared.tokenizer import load_tokenizer
from stage2_student.config import require_labels
from stage2_student.experiments.dense import write_dense
from stage2_student.experiments.outcome import choose, summarise
from stage2_student.experiments.proof_plan import Arm, Member, Plan, read_plan
from stage2_student.experiments.proof_report import page, plot
from stage2_student.experiments.proof_run import train_member
from stage2_student.train import identify

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
        DistillError: a student failed, or its process was killed.
    """
    plan, caches = read_plan(plan_path), {"train": train, "validation": validation, "test": test}
    settings = _settings(plan, caches, teacher)
    (out / "members").mkdir(parents=True, exist_ok=True)
    claim = Claim(out, "training in this folder")
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
        member = futures[future]
        try:
            figures = future.result()
        except BrokenProcessPool as error:
            fix = "more memory, or fewer --jobs; the same command continues"
            raise DistillError("a process of the proof was killed", where=out, fix=fix) from error
        except DistillError as error:
            raise DistillError(f"a student of the proof failed: {error}", where=member.name) from error
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
