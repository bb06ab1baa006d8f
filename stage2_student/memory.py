"""The device memory of a training run, estimated before anything is allocated, and the micro-batch that fits."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.distributed import smallest
from shared.errors import ConfigError, require
from shared.model.gpt import GPTConfig
from shared.process import log, world_size
from stage2_student.config import StudentConfig
from stage2_student.fused import chunk_rows

USABLE = 0.9  # of the free memory; the rest is for the device's own needs and fragmentation


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes at the peak of a training step."""

    state_bytes: int  # float32 weights, gradients and Adam's two moments
    activation_bytes: int  # what the layers keep for the backward pass of one micro-batch
    head_bytes: int  # the fused head's scratch memory and the gradient of its matrix

    @property
    def total_bytes(self) -> int:
        """The sum of all three."""
        return self.state_bytes + self.activation_bytes + self.head_bytes


def estimate_memory(config: StudentConfig, sizes: GPTConfig, num_parameters: int) -> MemoryEstimate:
    """Estimate the memory of training; attention matrices are not kept (flash or memory-efficient attention).

    Args:
        config: micro-batch, precision and gradient checkpointing count.
        sizes: the student's.
        num_parameters: its parameters, tied tensors once.
    """
    H, F, V = sizes.hidden_size, sizes.intermediate_size, sizes.vocab_size
    kept = H + 2 * sizes.num_key_value_heads * sizes.head_dim  # q, k, v
    # Mixed precision keeps the matrix products' inputs in bfloat16, norms and the residual stream in float32.
    product_bytes = 2 if config.bf16 else 4
    # Per token and layer: two norms' inputs in float32; their outputs, q, k and v (also turned and repeated for the
    # query heads), attention's output, the MLP's hidden layer before and after its non-linearity as product inputs.
    per_token = 2 * 4 * H + product_bytes * (2 * H + 2 * kept + 3 * H + H + 2 * F)
    layers = sizes.num_hidden_layers * per_token
    if config.training.get("gradient_checkpointing", False):  # the layers' inputs, and all of one layer at a time
        layers = sizes.num_hidden_layers * (4 * H) + per_token
    # Logits and the matrix's gradient; under mixed precision the logits' bfloat16 copy, the matrix's, and a chunk's
    # gradient of the matrix, which a GPU forms in float32.
    on_gpu = torch.cuda.is_available()
    copies = (2 + (4 if on_gpu else 2)) if config.bf16 else 0
    head = chunk_rows("cuda" if on_gpu else "cpu") * V * (4 + (2 if config.bf16 else 0)) + V * H * (4 + copies)
    return MemoryEstimate(
        state_bytes=16 * num_parameters,
        activation_bytes=_micro_batch_tokens(config) * (layers + 4 * H),  # and the last norm's input
        head_bytes=head,
    )


def fit_micro_batch(
    config: StudentConfig,
    sizes: GPTConfig,
    num_parameters: int,
    batch_tokens: int | str | None,
    *,
    earlier: Mapping[str, Any] | None = None,
) -> StudentConfig:
    """Choose the largest micro-batch within a limit; accumulation keeps the blocks of each step.

    The memory that training will take is logged, before it is allocated.

    Args:
        config: says how many blocks each process has per step, as micro-batch times accumulation.
        sizes, num_parameters: the student's.
        batch_tokens: max tokens of a micro-batch; `auto` for what fits the free memory of every process by the
            estimate; None keeps the config.
        earlier: the `run.json` of the run that is resumed. `auto` keeps its micro-batch if that still fits, because
            another order of summation gives other last bits.

    Raises:
        ConfigError: not even one block fits, or the micro-batch needs more memory than there is in all.
    """
    is_auto, blocks = batch_tokens == "auto", config.per_device_train_batch_size * config.gradient_accumulation_steps
    candidates, limit = [config], math.inf
    if batch_tokens is not None:
        limit = smallest(free_memory()) * USABLE if is_auto else int(batch_tokens)
        candidates = [
            dataclasses.replace(config, per_device_train_batch_size=size, gradient_accumulation_steps=blocks // size)
            for size in range(blocks, 0, -1)
            if blocks % size == 0
        ]
    if is_auto and earlier:
        previous = earlier["config"]["per_device_train_batch_size"]
        candidates.sort(key=lambda fitted: fitted.per_device_train_batch_size != previous)
    for fitted in candidates:
        size, tokens = fitted.per_device_train_batch_size, _micro_batch_tokens(fitted)
        memory = estimate_memory(fitted, sizes, num_parameters)
        needed = memory.total_bytes if is_auto else tokens
        if needed <= limit:
            if batch_tokens is not None:
                log(f"micro-batches of {size} x {config.block_size} tokens, {blocks // size} per step and process")
            log(
                f"memory, about: {memory.total_bytes / 2**30:.2f} GiB per device "
                f"({memory.state_bytes / 2**30:.2f} weights, gradients and optimizer, "
                f"{memory.activation_bytes / 2**30:.2f} activations of {tokens:,} tokens, "
                f"{memory.head_bytes / 2**30:.2f} head)"
            )
            own_bytes = memory.total_bytes - (memory.state_bytes if world_size() > 1 else 0)  # FSDP cuts the state
            most = smallest(total_memory())
            require(
                own_bytes <= most,
                "training needs more memory than a device has",
                expected=f"at most {most / 2**30:.2f} GiB",
                got=f"about {own_bytes / 2**30:.2f} GiB",
                fix="a smaller per_device_train_batch_size, block_size or preset, --batch-tokens auto, or "
                "gradient_checkpointing=true",
            )
            return fitted
    raise ConfigError(
        "not even one block fits into a micro-batch",
        where="--batch-tokens",
        expected=f"at most {int(limit):,} {'bytes of memory' if is_auto else 'tokens'}",
        got=f"{needed:,}",
        fix="a smaller block_size or preset, or gradient_checkpointing=true",
    )


def _micro_batch_tokens(config: StudentConfig) -> int:
    return config.per_device_train_batch_size * config.block_size


def free_memory() -> int:
    """Free bytes of this process's device; without a GPU, its share of the available main memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):  # in a container; "max" where it has no limit of its own
        cgroup = Path("/sys/fs/cgroup")
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def total_memory() -> int:
    """Bytes of this process's device, free or not; without a GPU, its share of the main memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[1])
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
