"""What HF `Trainer` is told, from a student's config, this machine and the environment."""

import dataclasses
import os
import shutil
import sys
from pathlib import Path

import torch
from torch.utils._triton import has_triton
from transformers import TrainingArguments

from shared.errors import ConfigError, require
from shared.machine import has_accelerator, require_usable_card
from shared.process import log
from shared.records import to_dict
from stage2_student.config import StudentConfig

NEVER = 2**31  # steps between two evaluations or saves


def compiles(config: StudentConfig) -> bool:
    """Whether the student is compiled. FSDP cuts the layers into several graphs: there only if it is asked for."""
    if config.torch_compile != "auto":
        return config.torch_compile
    has_compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    return torch.cuda.is_available() and has_triton() and bool(has_compiler) and not config.training.get("fsdp")


def half_precision(config: StudentConfig) -> dict[str, bool]:
    """The `TrainingArguments` of mixed precision that this machine has: cards before Ampere know float16 only."""
    if not config.bf16 or not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0):
        return {"bf16": config.bf16}
    log("this card has no bfloat16: training in float16 with a loss scaler")
    return {"bf16": False, "fp16": True}


def training_arguments(config: StudentConfig, out: Path, *, has_validation: bool) -> TrainingArguments:
    """What HF `Trainer` is told.

    Raises:
        ConfigError: transformers refuses them, or the environment asks accelerate for something else.
    """
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"):
        wanted = os.environ.get(name, "")
        require(wanted.lower() in ("", "0", "n", "no", "f", "false", "off"), "students train under DDP and FSDP only",
                where=name, got=wanted, fix=f"unset {name}, or start `accelerate launch` without it")  # fmt: skip
    wanted = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "")  # accelerate would compile, and the run not say so
    require(compiles(config) or wanted.lower() in ("", "no"), "the environment and the config differ in compiling",
            where="ACCELERATE_DYNAMO_BACKEND", expected="no", got=wanted,
            fix="unset it, or set torch_compile=true in the config")  # fmt: skip
    require_usable_card()
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    options = {key: value for key, value in to_dict(config).items() if key in theirs} | {
        "output_dir": str(out),
        "num_train_epochs": 1,  # the data set holds all epochs
        "eval_strategy": "steps" if has_validation and config.eval_steps > 0 else "no",
        "logging_nan_inf_filter": False,  # it waits for the device at each micro-batch; what is not finite is refused
        "ddp_find_unused_parameters": False,
        "eval_steps": config.eval_steps or None,
        "save_strategy": "steps" if config.save_steps or config.save_minutes else "no",
        "save_steps": config.save_steps or NEVER,
        "save_total_limit": None,  # `RunRecorder` rotates
        "data_seed": config.seed,
        "label_names": ["labels"],
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "average_tokens_across_devices": True,
        "report_to": [],
        "disable_tqdm": not sys.stderr.isatty(),
        "torch_compile": compiles(config),
        "tf32": False,  # else compiling would turn it on, for all that the process does
        "use_cpu": not has_accelerator(),
        "accelerator_config": {"non_blocking": torch.cuda.is_available()},  # pinned batches: the host goes on
    }
    options |= config.training | half_precision(config)
    for kind in ("eval", "save"):
        if options[f"{kind}_strategy"] == "epoch":  # `EpochEnds` knows when; HF adds the last step of all
            options |= {f"{kind}_strategy": "steps", f"{kind}_steps": NEVER}
    try:
        arguments = TrainingArguments(**options)
    except (ValueError, TypeError) as error:
        raise ConfigError("transformers refuses these training arguments", got=error) from error
    ours = "fp16" if arguments.fp16 else "bf16" if arguments.bf16 else "no"
    require(arguments.mixed_precision == ours, "the environment and the config differ in the precision of training",
            where="ACCELERATE_MIXED_PRECISION", expected=ours, got=arguments.mixed_precision,
            fix="unset it, or set bf16 or fp16 in the config")  # fmt: skip
    require(not arguments.fsdp or has_accelerator(), "FSDP needs accelerators", where="fsdp",
            got="a processor alone",
            fix="leave it out: under torchrun the processes then average gradients (DDP)")  # fmt: skip
    # One process trains on one device: Trainer would run copies of the model in threads, on a batch of another size.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
