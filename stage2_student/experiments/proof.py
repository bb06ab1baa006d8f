"""`student proof`: what may be claimed of the differences between ways to train one student.

Each variant has the same search over the grid, judged on the validation cache, and every run keeps the epoch with the
best validation NLL. Each variant's best settings are then trained with new seeds; a seed has the same initial weights
and data order in all variants. Only these runs are scored on the test cache.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from shared.cache.reader import Cache
from shared.errors import ConfigError, require
from shared.eval.report.plots import proof_plot
from shared.eval.results import Comparison, Proof, ProofVariant, Spread
from shared.files import write_bytes, write_json
from shared.machine import versions
from shared.options import command_line
from shared.process import log
from stage2_student.experiments.grid import Experiment, Run, read_experiment
from stage2_student.experiments.report import proof_page, sentences
from stage2_student.experiments.runner import Inputs, Row, Runner, locked
from stage2_student.experiments.statistics import compare_settings, figures_of
from stage2_student.train import identify, require_same_labels

RESULT = "proof.json"
# Evaluate and save at the end of each epoch, and end with the weights of the epoch with the lowest validation NLL.
BEST_EPOCH = {
    "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1, "load_best_model_at_end": True,
    "metric_for_best_model": "ce", "greater_is_better": False,
}  # fmt: skip


def prove(
    config: Path, train: Path, validation: Path, test: Path, out: Path, *, teacher: Path | None = None, jobs: int = 1
) -> Proof:
    """Search, confirm and compare, and write `proof.{json,md,svg}`. What is finished is kept.

    Args:
        config: an experiment (see `read_experiment`) with two or more variants and `[confirm]` seeds.
        train, validation, test: caches of one teacher without a document in common.
        out: the proof's folder; the runs are in `search/` and `final/`.
        teacher: the model that made the caches, for variants with loss=dense.
        jobs: runs trained at once (see `Runner`).

    Returns:
        What `proof.json` holds.

    Raises:
        ConfigError: the experiment, or caches that do not go with it.
        CacheMismatchError: caches of different teachers, or another teacher than theirs.
        ResumeError: another process works in the folder.
        DistillError: runs failed; the others were trained.
        Terminated, KeyboardInterrupt: SIGTERM or Ctrl-C came; the processes were stopped, each with a checkpoint.
    """
    experiment = read_experiment(config)
    searching = experiment.runs(BEST_EPOCH)
    _require_confirmable(experiment, searching)
    caches = {"train": Cache(train), "validation": Cache(validation), "test": Cache(test)}
    _require_separate(caches)
    logprobs = out / "teacher-logprobs.npy"
    alike: dict[str, Any] = {
        "inputs": Inputs(caches=[train], validation=validation, teacher=teacher, teacher_logprobs=logprobs),
        "jobs": jobs,
        "group": out.resolve().name,
        "keep_checkpoints": False,
    }
    search = Runner(runs=searching, out=out / "search", **alike)
    with locked(out):
        searched = _train(search)
        confirming = experiment.confirming_runs(choose(experiment, searched), BEST_EPOCH)
        log("chosen: " + "; ".join(dict.fromkeys(run.setting for run in confirming)))
        runs = _train(Runner(runs=confirming, out=out / "final", scored_on=test, **alike))
        logprobs.unlink(missing_ok=True)
        settings = {
            "fixed": experiment.fixed,
            "grid": experiment.grid,
            "search_seed": searching[0].config.seed,
            "seeds": list(experiment.confirm.seeds),
            "top_k": caches["train"].width,
            "caches": {name: identify(cache) | {"documents": cache.num_documents, "tokens": cache.num_tokens}
                       for name, cache in caches.items()},
        }  # fmt: skip
        result = summarise_proof(experiment, settings, searched, runs)
        write_bytes(out / "proof.md", proof_page(result).encode())
        if plot := proof_plot(result):
            write_bytes(out / "proof.svg", plot.svg())
        write_json(out / RESULT, result.to_dict())
    return result


def choose(experiment: Experiment, searched: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Each variant's values of the grid: those of its run with the lowest validation NLL, the first of equals."""
    chosen = {}
    for variant in experiment.variants:
        trials = [row for row in searched if row.swept["variant"] == variant.name]
        best = min(trials, key=lambda row: min(row.validation_nll_nats))
        chosen[variant.name] = {key: best.swept[key] for key in experiment.grid}
    return chosen


def summarise_proof(
    experiment: Experiment, settings: Mapping[str, Any], searched: Sequence[Row], runs: Sequence[Row]
) -> Proof:
    """The proof's result, from its runs.

    Raises:
        ConfigError: runs without figures, or runs of one seed that did not begin alike.
    """
    _require_pairs(runs)
    versus = {variant.name: variant.versus for variant in experiment.variants}
    comparisons = compare_settings(figures_of(runs, lambda row: row.swept["variant"]), versus)
    baseline = experiment.variants[0].name
    against_baseline = {row.setting: row for row in comparisons if row.versus == baseline}
    return Proof(
        command=command_line(),
        versions=versions("codedistill", "torch", "transformers", "accelerate", "numpy", "h5py"),
        variants=[
            _describe_variant(name, [row for row in runs if row.swept["variant"] == name], searched,
                              settings["top_k"], against_baseline.get(name))
            for name in versus
        ],
        comparisons=comparisons,
        summary=sentences(comparisons, len(experiment.confirm.seeds)),
        settings=dict(settings),
        search=[dataclasses.asdict(row) for row in searched],
        runs=[dataclasses.asdict(row) for row in runs],
        seconds=round(sum(row.seconds for row in [*searched, *runs]), 1),
    )  # fmt: skip


def _describe_variant(
    name: str, runs: Sequence[Row], searched: Sequence[Row], top_k: int, versus_ce: Comparison | None
) -> ProofVariant:
    """What a variant is and what its runs reached."""
    config, chosen = runs[0].config, {key: value for key, value in runs[0].swept.items() if key != "seed"}
    distils = config["alpha"] > 0
    epochs = [row.best_epoch for row in [*(trial for trial in searched if trial.swept == chosen), *runs]]
    return ProofVariant(
        name=name,
        loss=config["loss"] if distils else "cross-entropy",
        k=(config["k"] or top_k) if distils and config["loss"] != "dense" else None,
        **{key: config[key] for key in ("alpha", "temperature", "label_smoothing", "learning_rate")},
        epochs=epochs[0],
        epochs_by_seed=epochs[1:],
        test_nll=_over_seeds([row.nll_nats for row in runs]),
        test_kl=_over_seeds([row.kl_to_teacher_nats for row in runs]),
        versus_ce=versus_ce,
    )


def _over_seeds(values: Sequence[Any]) -> Spread:
    return Spread(mean=float(np.mean(values)), sd=float(np.std(values, ddof=1)), seeds=list(values))


def _train(runner: Runner) -> list[Row]:
    runner.train()
    runner.require_finished()
    return runner.rows


def _require_confirmable(experiment: Experiment, searching: Sequence[Run]) -> None:
    where = experiment.path
    count = len(experiment.variants)
    require(count > 1 and not experiment.run, "a proof compares variants", where=where,
            expected="two or more [[variant]] and no [[run]]", got=f"{count} and {len(experiment.run)}")  # fmt: skip
    seeds, search_seed = experiment.confirm.seeds, searching[0].config.seed
    distinct = len(set(seeds)) == len(seeds) > 1 and search_seed not in seeds and "seed" not in experiment.grid
    require(distinct, "the seeds of a proof", where=where,
            expected="two or more in [confirm] seeds, each once, none the search's",
            got=f"seeds {list(seeds)}, search seed {search_seed}")  # fmt: skip


def _require_separate(caches: Mapping[str, Cache]) -> None:
    """Refuse caches of different labels, or with a document in common."""
    require_same_labels(list(caches.values()))
    seen: dict[bytes, Cache] = {}
    for cache in caches.values():
        for doc in range(cache.num_documents):
            other = seen.setdefault(sha256(cache.tokens(doc).tobytes()).digest(), cache)
            if other is not cache:
                got = cache.meta(doc).get("id", doc)
                raise ConfigError("two caches share a document", where=f"{other.path} and {cache.path}", got=got)


def _require_pairs(runs: Sequence[Row]) -> None:
    """Differences are paired only where a seed's students had the same initial weights, blocks and steps."""
    by_seed: dict[int, set[str]] = {}
    for row in runs:
        require(not row.reasons, "a run has no test figures", where=row.name, got=row.reasons)
        began = [row.initial_weights_sha256, row.data, row.config["block_size"], row.steps]
        by_seed.setdefault(row.seed, set()).add(json.dumps(began))
    for seed, kinds in by_seed.items():
        require(len(kinds) == 1, "variants of one seed began differently, so they are no pairs", where=f"seed {seed}")
