"""HF `Trainer` with the few things distillation needs: exact order, exact averages, sealed checkpoints, a JSONL log."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from shared.errors import NonFiniteLossError
from shared.model.gpt import IGNORE
from stage2_student.checkpoint import rotate, seal
from stage2_student.dataset import PackedBlocks


class DistillTrainer(Trainer):
    """Trains on `PackedBlocks` in their own order and logs both loss terms per target, in nats."""

    train_dataset: PackedBlocks

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._window = torch.zeros(3, dtype=torch.float64)  # kd, ce, targets since the last log

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices decay; biases and norms, which have one dimension, do not."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() >= 2]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The model's own loss, refused where it is not finite; its two terms are kept for the log."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                "the loss is not finite; no step was taken with it",
                where=f"step {self.state.global_step + 1}",
                got=loss.item(),
                fix="a lower learning_rate, or bf16=false",
            )
        if model.training:
            self._window += _sums(outputs, inputs)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss terms of the window and count epochs as the data set does."""
        if "loss" in logs:
            kd, ce, targets = self._gathered(self._window)
            logs |= {"kd": kd / targets, "ce": ce / targets}
            self._window.zero_()
        if self.state.epoch is not None:
            self.state.epoch *= self.train_dataset.num_epochs
            super().log(logs, start_time)
            self.state.epoch /= self.train_dataset.num_epochs
        else:
            super().log(logs, start_time)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Averages over all held-out targets, whatever batch they fell into."""
        sums = torch.zeros(3, dtype=torch.float64)
        model = self._wrap_model(self.model, training=False)
        model.eval()
        with torch.no_grad():
            for batch in self.get_eval_dataloader():
                inputs = self._prepare_inputs(batch)
                with self.accelerator.autocast():
                    sums += _sums(model(**inputs), inputs)
        model.train()
        kd, ce, targets = self._gathered(sums)
        metrics = {f"{metric_key_prefix}_kd": kd / targets, f"{metric_key_prefix}_ce": ce / targets}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _gathered(self, sums: Tensor) -> list[float]:
        return self.accelerator.reduce(sums.to(self.args.device, torch.float32), "sum").tolist()


def _sums(outputs: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    targets = (inputs["labels"] != IGNORE).sum()
    return torch.stack((outputs["kd"].detach(), outputs["ce"].detach(), targets)).double().cpu()


class RunRecorder(TrainerCallback):
    """Appends every log to `training_log.jsonl`, and seals and rotates checkpoints."""

    def __init__(self, run: Path, save_total_limit: int) -> None:
        self.run, self.save_total_limit = run, save_total_limit
        self.log_file = run / "training_log.jsonl"

    def forget_after(self, step: int) -> None:
        """Drop the log lines that a resume will write again."""
        if self.log_file.exists():
            lines = [json.loads(line) for line in self.log_file.read_text().split("\n") if line.endswith("}")]
            kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= step]
            self.log_file.write_text("".join(kept))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """One strict JSON line per log."""
        if state.is_world_process_zero:
            with self.log_file.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}, allow_nan=False) + "\n")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The marker goes last; only then may older checkpoints go."""
        if state.is_world_process_zero:
            seal(self.run / f"checkpoint-{state.global_step}")
            rotate(self.run, self.save_total_limit)
