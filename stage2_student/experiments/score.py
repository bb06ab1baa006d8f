"""A finished student on a validation cache, measured alike for every student of a sweep."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from shared.cache.reader import Cache
from shared.errors import ConfigError
from shared.model.gpt import GPT, IGNORE, GPTConfig
from stage2_student.config import StudentConfig
from stage2_student.dataset import PackedBlocks
from stage2_student.fused import HeadLoss


def score(weights: Path, sizes: GPTConfig, cache: Cache, *, block_size: int) -> tuple[float, float]:
    """NLL and KL(teacher‖student) in nats per target, in float32: K+1 partition at T = 1, as `eval fidelity` has them.

    A run's own `eval_kd` depends on its loss, divergence, temperature and k.

    Args:
        weights: the run's `model.safetensors`.
        sizes: the student's.
        cache: of held-out documents.
        block_size: tokens seen at once; longer documents are cut.

    Raises:
        ConfigError: the cache has no targets.
    """
    model = GPT(sizes)
    model.load_state_dict(load_file(weights))
    return score_model(model, cache, block_size=block_size)


@torch.inference_mode()
def score_model(model: GPT, cache: Cache, *, block_size: int) -> tuple[float, float]:
    """The same of a student in memory, whose loss is replaced."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model.head_loss = HeadLoss(StudentConfig(loss="ghost", divergence="forward", temperature=1.0))
    model.to(device).eval()
    nll, kl, num_targets = 0.0, 0.0, 0
    for batch in DataLoader(PackedBlocks([cache], block_size=block_size, seed=0, temperature=1.0)):
        outputs = model(**{name: tensor.to(device) for name, tensor in batch.items()})
        nll, kl = nll + outputs["ce"].item(), kl + outputs["kd"].item()
        num_targets += int((batch["labels"] != IGNORE).sum())
    if num_targets == 0:
        raise ConfigError("the cache has no targets to score", where=cache.path)
    return nll / num_targets, kl / num_targets
