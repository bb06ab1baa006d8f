"""HF `Trainer` with the few things distillation needs: exact order, exact averages, sealed checkpoints, a JSONL log."""

import contextlib
import json
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SchedulerType

from shared.distributed import gathered, on_any, summed
from shared.errors import DistillError, NonFiniteLossError, PeerEndedError, require
from shared.files import naming, read_json, write_bytes, write_json
from shared.model.gpt import IGNORE
from shared.process import Terminated, log, rank, world_size
from shared.tracking import Run
from stage2_student.checkpoint import WINDOW, require_no_file, rotate, seal
from stage2_student.dataset import PackedBlocks
from stage2_student.fused import HeadLoss

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class DistillTrainer(Trainer):
    """Trains on `PackedBlocks` in their own order and logs both loss terms per target, in nats."""

    train_dataset: PackedBlocks

    def __init__(self, *args: Any, head_loss: HeadLoss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_loss = head_loss
        if self.accelerator.scaler is not None:
            head_loss.scaled = self.accelerator.scaler.scale
        self._step: list[Tensor] = []  # loss, kd, ce, targets of each micro-batch since the last step
        self._gradient_norm = torch.zeros(())  # of the last step, before it was clipped
        self._window = torch.zeros(3, dtype=torch.float64)  # kd, ce, targets since the last log
        self.skipped_steps = 0  # so far, on all ranks alike
        self.add_callback(_CheckBeforeStep(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        """As the base class has it; its workers outlive a signal to all processes."""
        loader = super()._get_dataloader(*args, **kwargs)
        for each in (loader, getattr(loader, "base_dataloader", loader)):  # accelerate wraps the one with the workers
            each.worker_init_fn = _block_signals
        return loader

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices decay; biases and norms, which have one dimension, do not."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() >= 2]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As the base class has it, but a warm-up of W steps starts at 1/(W + 1), so that the first step counts too.

        Raises:
            ConfigError: the first step would not move the weights all the same.
        """
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        num_warmup_steps = self.args.get_warmup_steps(num_training_steps)
        groups = scheduler.optimizer.param_groups
        if isinstance(scheduler, LambdaLR) and num_warmup_steps:
            scheduler.lr_lambdas = [_warmed_up(factor, num_warmup_steps) for factor in scheduler.lr_lambdas]
            for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
                group["lr"] = base * factor(0)
            scheduler._last_lr = [group["lr"] for group in groups]
        require(
            any(group["lr"] > 0 for group in groups),
            "the first step would not move the weights",
            where="learning_rate, lr_scheduler_type, warmup_steps",
            expected="a learning rate above 0 at step 1",
            got=f"learning_rate={self.args.learning_rate:g}, {SchedulerType(self.args.lr_scheduler_type).value}, "
            f"warmup_steps={self.args.warmup_steps:g}, {num_training_steps} steps",
        )
        return scheduler

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss; it and its terms are kept on the device until the step."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._step.append(torch.cat((loss.detach()[None], _sums(outputs, inputs))))
        return (loss, outputs) if return_outputs else loss

    def check_step(self) -> None:
        """Called with all gradients of a step, before it is taken: refuse it where a loss or gradient is not finite.

        A step without targets is skipped: it would move the weights by decay and momentum only. It looks at the device
        once per step; once per micro-batch would let it wait.

        Raises:
            NonFiniteLossError: naming the documents of the micro-batches at fault, all of them where it is a gradient.
            PeerEndedError: the same, on all ranks but the first.
        """
        *losses, norm = torch.cat((torch.stack(self._step).flatten(), self._gradient_norm.reshape(1))).cpu().tolist()
        rows = torch.tensor(losses, dtype=torch.float64).view(-1, 4)
        self._step.clear()
        self._window += rows[:, 1:].sum(0)
        wrong = (~rows[:, 0].isfinite()).nonzero().flatten().tolist()
        # Under float16 a gradient may overflow: the scaler then leaves the step out.
        if not wrong and self.accelerator.scaler is None and not math.isfinite(norm):
            wrong = list(range(len(rows)))
        num_wrong, num_targets = summed(torch.stack((torch.tensor(float(len(wrong))), rows[:, 3].sum()))).tolist()
        if num_targets == 0:
            self.skipped_steps += 1
            self.model.zero_grad(set_to_none=True)  # type: ignore[union-attr]  # no gradient: no decay, no momentum
        if not num_wrong:
            return
        documents = gathered([name for number in wrong for name in self._documents(number)])
        step = self.state.global_step + 1
        if rank() != 0:
            raise PeerEndedError("the loss is not finite; rank 0 says where", where=f"step {step}")
        raise NonFiniteLossError(
            "the loss or its gradient is not finite; no step was taken with it",
            where=f"step {step}, documents {', '.join(documents)}",
            got=f"losses {', '.join(f'{value:g}' for value in rows[wrong, 0].tolist())}" if wrong else None,
            fix="a lower learning_rate, or bf16=false",
        )

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As the base class has it, which calls it before each step; kept for `check_step`."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        whole = getattr(norm, "full_tensor", lambda: norm)()  # FSDP's lies in parts
        self._gradient_norm = torch.as_tensor(whole, dtype=torch.float32, device=self._step[-1].device)
        return norm

    def _documents(self, number: int) -> list[str]:
        """The documents of one of this rank's micro-batches of the step in hand."""
        size = self.args.per_device_train_batch_size
        first = self.state.global_step * self.args.gradient_accumulation_steps + number
        start = (first * world_size() + rank()) * size
        return [name for index in range(start, start + size) for name in self.train_dataset.documents(index)]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The window's averages per target, and epochs counted as the data set does."""
        if "train_runtime" in logs:  # the Trainer's summary, which counts only what ran since the start or resume
            return
        if "loss" in logs:
            averages = self._averages(self._window, with_kd=self._head_loss.config.alpha > 0)
            logs = {
                key: value for key, value in logs.items() if averages or key not in ("loss", "grad_norm")
            } | averages
            if self.skipped_steps:
                logs["skipped_steps"] = self.skipped_steps
            self._window.zero_()
        epoch = self.state.epoch
        self.state.epoch = epoch and epoch * self.train_dataset.num_epochs
        super().log(logs, start_time)
        self.state.epoch = epoch

    def continue_from(self, checkpoint: Path, early: "StopEarly") -> None:
        """Train on from a checkpoint; where training stopped early with it, only take up its state.

        The first log covers all of its window, since the checkpoint has the loss sums since the log before.
        """
        *window, self.skipped_steps = read_json(checkpoint / WINDOW)
        if self.is_world_process_zero():
            self._window = torch.tensor(window, dtype=torch.float64)
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if not early.is_due(state.log_history):
            self.train(resume_from_checkpoint=str(checkpoint))
            return
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir or "", f"checkpoint-{self.state.global_step}")
        require_no_file(folder)
        with _refusals_in_a_line(folder):
            super()._save_checkpoint(model, trial)
        window = summed(self._window).tolist()  # after this, what the other ranks have written is there too
        if self.is_world_process_zero():
            write_json(folder / WINDOW, [*window, self.skipped_steps])

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Averages over all held-out targets, whatever batch they fell into; KD also where it is not trained on."""
        sums = torch.zeros(3, dtype=torch.float64)
        model: Any = self._wrap_model(self.model, training=False)  # type: ignore[arg-type]
        model.eval()
        with torch.no_grad():
            for batch in self.get_eval_dataloader():
                inputs = self._prepare_inputs(batch)
                with self.accelerator.autocast():
                    sums += _sums(model(**inputs), inputs).double().cpu()
        model.train()
        averages = self._averages(sums, with_kd=True)
        require(averages, "the held-out documents have no targets", where="--validation, validation_fraction")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in averages.items()}
        if not math.isfinite(metrics[f"{metric_key_prefix}_loss"]):
            raise NonFiniteLossError("the held-out loss is not finite", where=f"step {self.state.global_step}")
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def final_evaluation(self) -> dict[str, float]:
        """The metrics at the step whose weights are kept, which may have been taken already."""
        keeps_best = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        step = self.state.best_global_step if keeps_best else self.state.global_step
        for record in self.state.log_history:
            if record["step"] == step and "eval_loss" in record:
                return {key: value for key, value in record.items() if key.startswith("eval_")}
        return {key: value for key, value in self.evaluate().items() if key != "epoch"}

    def _averages(self, sums: Tensor, *, with_kd: bool) -> dict[str, float]:
        """Loss and its terms in nats per target over all ranks; no `kd` where no soft labels were read.

        Nothing where there were no targets: their average is not 0.
        """
        kd, ce, targets = summed(sums).tolist()
        if targets == 0:
            return {}
        kd, ce = kd / targets, ce / targets
        loss = self._head_loss.combine(kd, ce)
        return {"loss": loss, "kd": kd, "ce": ce} if with_kd else {"loss": loss, "ce": ce}


@contextlib.contextmanager
def _refusals_in_a_line(checkpoint: Path) -> Iterator[None]:
    """What the system refuses while a checkpoint is saved, in whatever form each library reports it."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("inline_container|PytorchStreamWriter", str(error)):
            raise  # not one of torch's own, which has no type for them
        raise DistillError(
            "a checkpoint cannot be saved",
            where=checkpoint,
            got=str(error).partition("\n")[0],
            fix="make room or give rights; the same command then continues from the last whole checkpoint",
        ) from error


def _warmed_up(factor: Callable[[int], float], num_warmup_steps: int) -> Callable[[int], float]:
    """A schedule's factor by step, from 0, with a linear warm-up that starts above 0."""
    return lambda step: (step + 1) / (num_warmup_steps + 1) if step < num_warmup_steps else factor(step)


def _sums(outputs: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """kd, ce and the number of targets of a batch, float32 [3] on its device."""
    targets = (inputs["labels"] != IGNORE).sum()
    return torch.stack((outputs["kd"].detach(), outputs["ce"].detach(), targets)).float()


def _block_signals(worker: int) -> None:
    """Batch systems and Ctrl-C signal all processes; the step in hand needs its workers, which end with the loader."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


class _CheckBeforeStep(TrainerCallback):
    def __init__(self, trainer: DistillTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.check_step()


class RunRecorder(TrainerCallback):
    """Appends every log to `training_log.jsonl`, says it in a line, and seals and rotates checkpoints.

    Args:
        run: the run's folder.
        save_total_limit: complete checkpoints kept.
        tokens_per_step: tokens trained on in one optimizer step, on average over all blocks.
        tracked: takes every log at its optimizer step, so that a resumed run continues the steps of W&B too.
    """

    def __init__(self, run: Path, save_total_limit: int, tokens_per_step: float, tracked: Run) -> None:
        self.run, self.save_total_limit, self.tokens_per_step = run, save_total_limit, tokens_per_step
        self.tracked = tracked
        self.log_file = run / "training_log.jsonl"

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begin the log file with what was logged up to the checkpoint; a resume writes the rest again."""
        self._start, self._first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            write_bytes(self.log_file, "".join(_log_line(record) for record in state.log_history).encode())

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """One strict JSON line per log, and one for a reader where no progress bar shows."""
        if state.is_world_process_zero:
            with naming(self.log_file), self.log_file.open("a") as file:
                file.write(_log_line({"step": state.global_step, **logs}))
            named = {(f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"): logs[key] for key in logs}
            self.tracked.log(named | {"train/global_step": state.global_step}, step=state.global_step)
        if args.disable_tqdm:
            log(f"step {state.global_step:,}/{state.max_steps:,}: {self._in_words(state, logs)}")

    def _in_words(self, state: TrainerState, logs: dict[str, float]) -> str:
        words = [f"{name} {value:.4g}" for name, value in logs.items() if name not in ("epoch", "grad_norm")]
        num_steps, seconds = state.global_step - self._first_step, time.monotonic() - self._start
        if "loss" in logs and num_steps:
            minutes, left = divmod(round((state.max_steps - state.global_step) * seconds / num_steps), 60)
            words.append(f"{num_steps * self.tokens_per_step / seconds:,.0f} tokens/s")
            words.append(f"{minutes // 60}:{minutes % 60:02}:{left:02} left")
        return ", ".join(words)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The marker goes last; only then may older checkpoints go."""
        if state.is_world_process_zero:
            seal(self.run / f"checkpoint-{state.global_step}")
            rotate(self.run, self.save_total_limit, state.best_model_checkpoint)


def _log_line(record: dict[str, Any]) -> str:
    ordered = {key: record[key] for key in sorted(record)}  # the order that a checkpoint gives back
    return json.dumps({"step": record["step"], **ordered}, allow_nan=False) + "\n"


class EpochEnds(TrainerCallback):
    """Evaluates and saves at the last step of each epoch of the data set, which to HF `Trainer` is one epoch.

    Args:
        training: TrainingArguments as the config has them; a strategy "epoch" in them means these steps.
        ends: blocks up to the end of each epoch.
        blocks_per_step: of all ranks.
    """

    def __init__(self, training: Mapping[str, Any], ends: Sequence[int], blocks_per_step: int) -> None:
        self.steps = {-(-end // blocks_per_step) for end in ends}
        self.evaluates, self.saves = (training.get(f"{kind}_strategy") == "epoch" for kind in ("eval", "save"))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for both where an epoch ends."""
        if state.global_step in self.steps:
            control.should_evaluate |= self.evaluates
            control.should_save |= self.saves


class SaveByMinutes(TrainerCallback):
    """Saves at the first step that ends so many minutes after the last checkpoint, by the clock of rank 0."""

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start to count."""
        self._since = time.monotonic()

    on_train_begin = on_save

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a checkpoint on all ranks where it is time."""
        control.should_save |= on_any(rank() == 0 and time.monotonic() - self._since >= self.seconds)


class StopEarly(TrainerCallback):
    """Ends training where the held-out loss no longer falls.

    What it decides follows from the log alone, which a checkpoint holds, so a resume decides the same. HF's
    `EarlyStoppingCallback` would train on where the checkpoint that it stopped with is resumed from.

    Args:
        patience: so many evaluations in a row without a better loss end training; 0 never does.
        threshold: how much lower a loss must be to be better.
    """

    def __init__(self, patience: int, threshold: float) -> None:
        self.patience, self.threshold = patience, threshold

    def is_due(self, log_history: list[dict[str, float]]) -> bool:
        """Whether training ends with the last evaluation that was logged."""
        best, waited = math.inf, 0
        for loss in (record["eval_loss"] for record in log_history if "eval_loss" in record):
            best, waited = (loss, 0) if best - loss > self.threshold else (best, waited + 1)
        return 0 < self.patience <= waited

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop here if it is due."""
        if self.is_due(state.log_history):
            log(f"step {state.global_step:,}: stopped early, {self.patience} evaluations without a better eval_loss")
            control.should_training_stop = True


class StopOnSignal(TrainerCallback):
    """While entered, SIGTERM or Ctrl-C ends training after the step or evaluation in hand, with a checkpoint, on all
    ranks; a second Ctrl-C ends it at once.

    Attributes:
        requested: whether a signal has come, to any rank.
    """

    requested = False

    def __enter__(self) -> "StopOnSignal":
        self._interrupted = False
        self._previous = {number: signal.signal(number, self._request) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            if rank() == 0:  # `log` is not to be entered twice
                os.write(2, b"interrupted: stopping after this step, with a checkpoint; Ctrl-C again stops at once\n")
        self.requested = True

    def raise_requested(self) -> None:
        """Raise what the signal that has come stands for: `KeyboardInterrupt` or `Terminated`."""
        if self.requested:
            raise KeyboardInterrupt if self._interrupted else Terminated

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop here if the signal has come; all ranks call this at the same step."""
        self.requested = on_any(self.requested)
        if self.requested:
            control.should_save = control.should_training_stop = True

    on_evaluate = on_step_end
