"""One student of the proof: trained, its best validation checkpoint kept in memory, and its figures."""

import functools
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from shared import tracking
from shared.cache.reader import Cache
from shared.config import to_dict
from shared.files import sha256_json
from shared.model.gpt import GPT
from stage2_student.dataset import PackedBlocks
from stage2_student.experiments.dense import DenseBlocks, DenseLoss
from stage2_student.experiments.proof_plan import Member
from stage2_student.experiments.score import score_model
from stage2_student.fused import HeadLoss
from stage2_student.train import training_arguments, weights_digest
from stage2_student.trainer import DistillTrainer

_open = functools.cache(Cache)  # by process: what is decoded stays decoded from member to member


class EpochEnds(TrainerCallback):
    """Evaluate after each epoch and keep the weights with the best validation NLL.

    Args:
        steps: at which epochs end.
    """

    def __init__(self, steps: list[int]) -> None:
        self._steps = set(steps)
        self.nll_nats: list[float] = []
        self.best: dict[str, Tensor] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """An epoch's last step is evaluated."""
        control.should_evaluate = state.global_step in self._steps

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **outcome: Any
    ) -> None:
        """The earliest of equals is the best."""
        self.nll_nats.append(outcome["metrics"]["eval_ce"])
        if self.nll_nats[-1] < min(self.nll_nats[:-1], default=float("inf")):
            self.best = {name: tensor.detach().clone() for name, tensor in outcome["model"].state_dict().items()}


def train_member(member: Member, train: Path, validation: Path, test: Path, dense: Path, out: Path) -> dict[str, Any]:
    """Train one student and return its figures.

    Args:
        member: what to train; the test cache is opened for its final ones alone.
        train, validation, test: caches of one teacher.
        dense: the full distributions of `train`, for the dense arm.
        out: the proof's folder; only W&B's own files are written there, in `wandb`.
    """
    start, config = time.monotonic(), member.config
    cache = _open(train)
    set_seed(config.seed)
    model = GPT(config.student_sizes(vocab_size=cache.tokenizer_size))
    initial = weights_digest(model)
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    options: dict[str, Any] = {
        "block_size": config.block_size,
        "seed": config.seed,
        "num_epochs": config.num_train_epochs,
        "multiple": per_step,
    }
    if member.arm.dense:
        blocks: PackedBlocks = DenseBlocks(cache, **options)
        loss: HeadLoss = DenseLoss(config, dense)
    else:
        temperature = config.temperature if config.alpha > 0 else None
        blocks = PackedBlocks([cache], temperature=temperature, **options)
        loss = HeadLoss(config)
    model.head_loss = loss
    held_out = PackedBlocks(
        [_open(validation)],
        block_size=config.block_size,
        seed=0,
        multiple=config.per_device_eval_batch_size,
        temperature=config.temperature,
    )
    ends = EpochEnds([-(-block // per_step) for block in [*blocks.first_block[1:-1], blocks.num_blocks]])
    arguments = training_arguments(config, out, has_validation=True)
    figures: dict[str, Any] = {
        "arm": member.arm.name,
        "learning_rate": member.learning_rate,
        "seed": member.seed,
        "initial_weights_sha256": initial,
        "data_order_sha256": sha256_json([blocks.documents(index) for index in range(len(blocks))]),
    }
    about = {**figures, "config": to_dict(config)}
    with tracking.start("train", name=member.name, config=about, directory=out, group=out.resolve().name) as run:
        arguments.report_to = ["wandb"] if run.active else []
        trainer = DistillTrainer(
            model=model,
            args=arguments,
            head_loss=loss,
            train_dataset=blocks,
            eval_dataset=held_out,
            callbacks=[ends],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        figures |= {
            "validation_nll_nats": ends.nll_nats,
            "best_epoch": 1 + ends.nll_nats.index(min(ends.nll_nats)),
            "steps": trainer.state.global_step,
        }
        if member.is_final:
            model.load_state_dict(ends.best)
            nll, kl = score_model(model, _open(test), block_size=model.sizes.max_position_embeddings)
            figures |= {"test_nll_nats": nll, "test_kl_nats": kl}
        run.summary({key: value for key, value in figures.items() if key not in about})
    return figures | {"seconds": round(time.monotonic() - start, 1)}
