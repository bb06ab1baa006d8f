"""One training run: from caches and a config to a run folder."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor
from transformers import PrinterCallback, set_seed

from shared import tracking
from shared.cache.directory import require_outside_caches
from shared.cache.identity import require_same
from shared.cache.reader import Cache
from shared.checkpoints import WEIGHTS, locate_model
from shared.distributed import agree, joined, wait
from shared.errors import CacheMismatchError, ResumeError, require
from shared.files import is_system_file, output_path, read_json, sha256_json, write_bytes, write_json
from shared.lock import Lock
from shared.machine import machine, versions
from shared.model.gpt import GPT, GPTConfig
from shared.options import command_line
from shared.process import is_main_process, log, world_size
from shared.records import to_dict
from shared.tokenizer import load_tokenizer, save_tokenizer, special_ids
from stage2_student.arguments import compiles, training_arguments
from stage2_student.checkpoint import (
    RUN_FORMAT,
    RUN_VERSION,
    is_leftover,
    newest_whole,
    remove_leftovers,
    require_no_file,
    step_of,
)
from stage2_student.config import StudentConfig, require_labels
from stage2_student.dataset import PackedBlocks, collate, hold_out
from stage2_student.experiments.dense import DenseBlocks, DenseLoss
from stage2_student.fused import HeadLoss
from stage2_student.init_weights import EMBEDDING, Start, project_embedding, read_embedding, read_start, token_counts
from stage2_student.memory import fit_micro_batch
from stage2_student.request import is_finished
from stage2_student.trainer import DistillTrainer, EpochEnds, RunRecorder, SaveByMinutes, StopEarly, StopOnSignal

# May change between a kill and the resume without changing what is learnt.
FREE_ON_RESUME = (
    "eval_steps", "save_steps", "save_minutes", "save_total_limit", "logging_steps", "dataloader_num_workers",
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",  # see BLOCKS
)  # fmt: skip
BLOCKS = "number of blocks per optimizer step (per_device_train_batch_size x gradient_accumulation_steps x processes)"


def train(
    config: StudentConfig,
    cache_paths: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    validation_path: Path | None = None,
    init_from: Path | None = None,
    batch_tokens: int | str | None = None,
    teacher_logprobs: Path | None = None,
    request: str | None = None,
) -> None:
    """Train a student on one or more caches, or continue a run that was stopped.

    The run folder holds the student as a transformers directory (`config.json`, `model.safetensors`, tokenizer),
    `run.json` with everything the run was made from and its final figures, `training_log.jsonl`, and `checkpoint-N/`.
    Under torchrun all processes train one student together, and rank 0 alone writes.

    Args:
        config: what to train and how.
        cache_paths: caches of equal label identity, none twice.
        out: the run's folder.
        weights: one per cache, the shares of rows that come from each; None takes every document once per epoch.
        validation_path: a cache of held-out documents, of the same label identity.
        init_from: a directory of weights to start from (see `Start`); None draws them from the seed.
        batch_tokens: most tokens of a micro-batch, or `auto` for what memory allows; see `fit_micro_batch`.
        teacher_logprobs: the teacher's full distribution of the cache, for loss=dense; see `experiments.dense`.
        request: recorded in `run.json`; see `request_digest`.

    Raises:
        ResumeError: the folder holds another run or lies in a cache, or another process trains in it.
        ConfigError: a cache is given twice, the caches lack the labels that the loss needs, the weights to start from
            do not fit, or under torchrun the processes do not come together.
        CacheMismatchError: the temperature is off the caches' grid, or the caches are not all one teacher's.
        NonFiniteLossError: the loss is NaN or infinite.
        PeerEndedError: another process of the run has ended.
        Terminated, KeyboardInterrupt: SIGTERM or Ctrl-C came; a checkpoint was saved.
    """
    out = output_path(out)
    require_outside_caches(out)
    both = (config.loss == "dense") == (teacher_logprobs is not None)
    require(both, "loss=dense and --teacher-logprobs belong together", got=f"loss={config.loss}")
    look = functools.partial(check, config, cache_paths, out, weights, validation_path, init_from)
    with joined(), contextlib.ExitStack() as held:
        if is_main_process() and not look().is_done(out):  # the others wait, so that a mistake is named once
            out.mkdir(parents=True, exist_ok=True)
            held.callback(Lock(out, "training in this folder").release)
        wait()
        task = look()  # nobody else can change the folder any more
        (is_done,) = agree([task.is_done(out)])
        if is_done:
            log(f"{out} is up to date")
            return
        task.record["request"] = request
        _train(task, out, batch_tokens, teacher_logprobs)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is to be trained, checked, and the `run.json` of an earlier start."""

    config: StudentConfig
    caches: Sequence[Cache]
    weights: Sequence[float] | None
    validation: Cache | None
    sizes: GPTConfig
    start: Start | None
    embedding: Start | None
    record: dict[str, Any]
    earlier: dict[str, Any] | None

    def is_done(self, out: Path) -> bool:
        """Whether the folder holds the finished student."""
        return self.earlier is not None and is_finished(out, self.earlier)


def check(
    config: StudentConfig,
    cache_paths: Sequence[Path],
    out: Path,
    weights: Sequence[float] | None,
    validation_path: Path | None,
    init_from: Path | None,
) -> Task:
    """Hold a run against the caches, the weights to start from and its folder; nothing is allocated or written.

    Arguments and errors are those of `train`.
    """
    require(len({path.resolve() for path in cache_paths}) == len(cache_paths), "a cache is given twice",
            where="--cache", got=", ".join(map(str, cache_paths)))  # fmt: skip
    require(not (validation_path and config.validation_fraction), "held-out documents are given twice",
            where="--validation, validation_fraction")  # fmt: skip
    has_validation = validation_path is not None or config.validation_fraction > 0
    evaluates = has_validation and (config.eval_steps or config.training.get("eval_strategy") == "epoch")
    require(not config.early_stopping_patience or evaluates, "stopping early needs evaluations",
            where="early_stopping_patience",
            fix="eval_steps above 0 or eval_strategy=epoch, and --validation or validation_fraction")  # fmt: skip
    caches = [Cache(path) for path in cache_paths]
    validation = Cache(validation_path) if validation_path else None
    record = _describe(config, caches, weights, validation)
    sizes = config.student_sizes(vocab_size=caches[0].tokenizer_size)
    require(not (init_from and config.init_embedding), "weights to start from have their own embedding",
            where="--init-from, init_embedding", fix="give one of them")  # fmt: skip
    start = read_start(init_from, sizes, caches[0]) if init_from else None
    record["init_from"] = start and {"path": str(init_from), "weights_sha256": start.weights_sha256}
    embedding = None
    if config.init_embedding:
        embedding = read_embedding(locate_model(config.init_embedding, caches[0].path), caches[0])
    record["init_embedding"] = embedding and {"path": config.init_embedding, "weights_sha256": embedding.weights_sha256}
    earlier = _earlier_run(out, record)
    training_arguments(config, out, has_validation=has_validation)  # so that transformers says now what it refuses
    return Task(config=config, caches=caches, weights=weights, validation=validation, sizes=sizes, start=start,
                embedding=embedding, record=record, earlier=earlier)  # fmt: skip


def _train(task: Task, out: Path, batch_tokens: int | str | None, teacher_logprobs: Path | None) -> None:
    record, earlier, sizes = task.record, task.earlier, task.sizes
    checkpoint = _newest_checkpoint(out, earlier)
    set_seed(task.config.seed)
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in GPT(sizes).parameters())
    config = fit_micro_batch(task.config, sizes, num_parameters, batch_tokens, earlier=earlier)
    model = GPT(sizes)
    if task.start:
        model.load_state_dict(task.start.tensors)
    if teacher_logprobs:
        head_loss: HeadLoss = DenseLoss(config, teacher_logprobs, task.caches)
    else:
        sampling = task.caches[0].sampling if config.uses_samples else None
        head_loss = HeadLoss(config, sampling, compiles=compiles(config) and torch.cuda.is_available())
    model.head_loss = head_loss
    blocks, held_out_blocks = _data(task, config)
    if task.embedding:
        weight = model.model.embed_tokens.weight
        counts = token_counts(task.caches)
        weight.data = project_embedding(task.embedding.tensors[EMBEDDING], counts, weight.data)
    record |= {
        "config": to_dict(config),
        "initial_weights_sha256": weights_digest(model.state_dict()),
        "parameters": num_parameters,
    }
    record["data"] = _describe_blocks(blocks, config, model, num_parameters)
    arguments = training_arguments(config, out, has_validation=held_out_blocks is not None)
    per_step = _blocks_per_step(config)
    if config.save_steps:
        for step in range(config.save_steps, len(blocks) // per_step + 1, config.save_steps):
            require_no_file(out / f"checkpoint-{step}")

    run_id = earlier["wandb_run_id"] if earlier else None
    with tracking.start("train", name=out.name, config=record, directory=out.parent, run_id=run_id) as run:
        record["wandb_run_id"] = run.id
        if is_main_process():
            write_json(out / "run.json", record | {"state": "running"})
        tokens_per_step = (1 - blocks.padding) * config.block_size * per_step
        recorder = RunRecorder(out, config.save_total_limit, tokens_per_step, run)
        stop, early = StopOnSignal(), StopEarly(config.early_stopping_patience, config.early_stopping_threshold)
        trainer = DistillTrainer(
            model=model,
            args=arguments,
            head_loss=head_loss,
            train_dataset=blocks,
            eval_dataset=held_out_blocks,
            data_collator=collate,
            callbacks=[recorder, early, stop, EpochEnds(config.training, blocks.epoch_ends(), per_step)],
        )
        if config.save_minutes:
            trainer.add_callback(SaveByMinutes(config.save_minutes))
        trainer.remove_callback(PrinterCallback)
        start = time.monotonic()
        with stop:
            if checkpoint:
                log(f"continuing from {checkpoint}")
                trainer.continue_from(checkpoint, early)
            else:
                trainer.train()
            stop.raise_requested()
            # From here on a signal waits: without a last checkpoint (save_steps=0) only memory holds the weights.
            _finish(trainer, task, out, run, seconds=time.monotonic() - start)
        stop.raise_requested()


def _newest_checkpoint(out: Path, earlier: dict[str, Any] | None) -> Path | None:
    """The checkpoint to resume from, on all ranks; rank 0 removes what a kill left behind."""
    if earlier and earlier["state"] == "finished":
        log(f"{out / WEIGHTS} is missing or damaged and is made again")
    newest = None
    if is_main_process():
        remove_leftovers(out)
        newest = newest_whole(out)
    (step,) = agree([-1 if newest is None else step_of(newest)])
    return None if step < 0 else out / f"checkpoint-{step}"


def _describe_blocks(blocks: PackedBlocks, config: StudentConfig, model: GPT, num_parameters: int) -> dict[str, Any]:
    """What `run.json` records of the training data, which is also logged."""
    embeddings = model.model.embed_tokens.weight.numel() / num_parameters  # the output head is the same tensor
    log(
        f"student {config.preset}: {num_parameters:,} parameters ({embeddings:.0%} in embeddings); "
        f"{blocks.num_rows:,} rows x {blocks.num_epochs:.4g} epochs in {blocks.num_blocks:,} blocks of "
        f"{config.block_size} ({blocks.padding:.1%} padding){', compiled' if compiles(config) else ''}"
    )
    return {"rows_per_epoch": blocks.num_rows, "epochs": blocks.num_epochs, "blocks": blocks.num_blocks,
            "padding": blocks.padding}  # fmt: skip


def _finish(trainer: DistillTrainer, task: Task, out: Path, run: tracking.Run, *, seconds: float) -> None:
    """Take the last measurements and write the student."""
    record = task.record
    metrics = trainer.final_evaluation() if trainer.eval_dataset is not None else {}
    record["metrics"] = metrics | {
        "steps": trainer.state.global_step,
        "skipped_steps": trainer.skipped_steps,
        "seconds_since_start_or_resume": seconds,
    }
    run.summary(record["metrics"])
    weights = trainer.accelerator.get_state_dict(trainer.model)  # gathered on all ranks where FSDP has cut them
    if is_main_process():
        require(
            weights_digest(weights) != record["initial_weights_sha256"],
            "training has changed no weight",
            where=out,
            expected="steps with targets and a learning rate above 0",
            got=f"{trainer.state.global_step} steps, {trainer.skipped_steps} of them without targets",
        )
        finished = {"state": "finished", "weights_sha256": _write_student(weights, task.sizes, task.caches[0], out)}
        write_json(out / "run.json", record | finished)
        log(f"{out}: " + ", ".join(f"{key} {value:.4g}" for key, value in record["metrics"].items()))
    wait()  # the lock holds until all are here


def _data(task: Task, config: StudentConfig) -> tuple[PackedBlocks, PackedBlocks | None]:
    """Training blocks and held-out blocks; every step and rank has equally many."""
    alike: dict[str, Any] = {
        "block_size": config.block_size,
        "with_samples": config.uses_samples,
        "all_targets": config.targets == "all",
    }
    held_out = None
    if config.validation_fraction:
        held_out = [hold_out(cache, config.validation_fraction, config.seed) for cache in task.caches]
    blocks = (DenseBlocks if config.loss == "dense" else PackedBlocks)(
        task.caches,
        weights=task.weights,
        held_out=held_out,
        seed=config.seed,
        num_epochs=config.num_train_epochs,
        num_blocks=config.max_steps * _blocks_per_step(config) if config.max_steps > 0 else None,
        multiple=_blocks_per_step(config),
        temperature=config.temperature if config.alpha > 0 else None,
        closing_id=special_ids(load_tokenizer(task.caches[0].tokenizer_path))["eos"],
        **alike,
    )
    if task.validation is None and held_out is None:
        return blocks, None
    return blocks, PackedBlocks(
        [task.validation] if task.validation else task.caches,
        held_out=[~mask for mask in held_out] if held_out else None,
        seed=0,
        multiple=config.per_device_eval_batch_size * world_size(),
        temperature=config.temperature,
        **alike,
    )


def _describe(
    config: StudentConfig, caches: Sequence[Cache], weights: Sequence[float] | None, validation: Cache | None
) -> dict[str, Any]:
    """What the run is made from, as `run.json` records it."""
    cache, all_caches = caches[0], [*caches, *([validation] if validation else [])]
    require_same_labels(all_caches)
    require(config.temperature in cache.temperatures, "the cache holds no tails at this temperature",
            error=CacheMismatchError, where=cache.path, got=config.temperature,
            expected=f"temperature one of {', '.join(f'{T:g}' for T in cache.temperatures)}")  # fmt: skip
    require_labels(config, cache)
    if config.targets == "completion":
        for each in all_caches:
            each.require_targets()
    trained_on = [identify(cache) for cache in caches]
    if validation and validation.shares_data(trained_on):
        log(f"warning: {validation.path} holds documents that are trained on: its figures are not held out")
    return {
        "format": RUN_FORMAT,
        "version": RUN_VERSION,
        "config": to_dict(config),
        "world_size": world_size(),
        "caches": [
            each | {"weight": weight}
            for each, weight in zip(trained_on, weights or itertools.repeat(None), strict=False)
        ],
        "validation": validation and identify(validation),
        "cache_paths": [each.location for each in all_caches],
        "command": command_line(),
        "machine": machine(),
        "versions": versions("codedistill", "torch", "transformers", "accelerate", "numpy", "h5py"),
    }


def require_same_labels(caches: Sequence[Cache]) -> None:
    """Raise `CacheMismatchError` unless all caches have one teacher and equal label options."""
    for other in caches[1:]:
        require_same("the label identities", caches[0].label_identity, other.label_identity,
                     ours_name=caches[0].path, theirs_name=other.path,
                     fix="build all caches with the same teacher and options")  # fmt: skip


def identify(cache: Cache) -> dict[str, Any]:
    """A cache by its digests, and whose labels of what it holds."""
    return {
        "label_identity": cache.label_identity,
        "shards": cache.manifest.shard_digests,
        "teacher": cache.manifest.identity["teacher"],
        "sources": cache.manifest.sources,
    }


def _earlier_run(out: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `run.json` in the folder, which must be of the same run; None in a new or empty folder."""
    other: dict[str, Any] = {"error": ResumeError, "where": out, "fix": "choose another --out"}
    require(out.is_dir() or not out.exists(), "the run's path is not a folder", **other)
    if not (out / "run.json").exists():
        is_free = not out.exists() or all(is_leftover(path) or is_system_file(path.name) for path in out.iterdir())
        require(is_free, "the folder holds something that is no run", **other)
        return None
    earlier: dict[str, Any] = read_json(out / "run.json")
    is_run = (earlier.get("format"), earlier.get("version")) == (RUN_FORMAT, RUN_VERSION)
    require(is_run, "run.json is not that of a run", **other)
    ours, theirs = _decisive(record), _decisive(earlier)
    for key in (key for key in ours if key not in FREE_ON_RESUME):
        require(ours[key] == theirs.get(key), f"the folder holds a run with another {key}", error=ResumeError,
                where=out, expected=theirs.get(key), got=ours[key],
                fix="choose another --out, or give the options of that run")  # fmt: skip
    return earlier


def _decisive(record: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run another one where it differs, except for `FREE_ON_RESUME`."""
    config, caches, validation = record["config"], record["caches"], record["validation"]
    return {
        **config,
        "cache.label_identity": caches[0]["label_identity"],
        "cache.shards": sha256_json([cache["shards"] for cache in caches]),
        "cache.weight": [cache["weight"] for cache in caches],
        **{key: (record.get(key) or {}).get("weights_sha256") for key in ("init_from", "init_embedding")},
        "validation cache": validation and sha256_json(validation["shards"]),
        BLOCKS: record["world_size"] * config["per_device_train_batch_size"] * config["gradient_accumulation_steps"],
    }


def _blocks_per_step(config: StudentConfig) -> int:
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of all weights, as safetensors."""
    return hashlib.sha256(to_safetensors({k: v.cpu().contiguous() for k, v in weights.items()})).hexdigest()


def _write_student(weights: Mapping[str, Tensor], sizes: GPTConfig, cache: Cache, out: Path) -> str:
    """The run folder as a transformers directory; the weights last, whose SHA-256 is returned."""
    tokenizer = load_tokenizer(cache.tokenizer_path)
    save_tokenizer(tokenizer, out)
    ids = special_ids(tokenizer)
    special = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")}
    dtype = {"dtype": "float32", "torch_dtype": "float32"}  # its names in transformers 5 and earlier
    write_json(out / "config.json", sizes.to_dict() | special | dtype)
    write_json(out / "generation_config.json", special)
    data = to_safetensors(dict(weights), metadata={"format": "pt"})
    write_bytes(out / WEIGHTS, data)
    return hashlib.sha256(data).hexdigest()
