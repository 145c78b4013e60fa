"""The training, by transformers' Trainer."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from truedepth.errors import TruedepthError, reason_of
from truedepth.evaluation.loss import loss_of
from truedepth.healing.distillation import Distillation
from truedepth.healing.options import Healing, Objective

NO_ROOM = 1 << 20
"""A failed write is blamed on a full disk if fewer bytes than this are free."""


class Windows(Dataset[dict[str, Any]]):
    """Windows of tokens, each with its number."""

    def __init__(self, ids: Tensor) -> None:
        """Take token ids `[windows, length]` of any integer type."""
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._ids[index].long(), "number": index}


class Passes(Windows):
    """As many windows as a run takes, in passes over all of them, each in an order of its own.

    So every step is whole, and the same for any number of processes, wherever a pass ends.
    """

    def __init__(self, ids: Tensor, count: int, seed: int) -> None:
        """Take token ids `[windows, length]`, how many windows to give, and the orders' seed."""
        super().__init__(ids)
        self._count, self._seed = count, seed
        self._order = -1, torch.empty(0, dtype=torch.int64)  # of one pass

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self._count:
            raise IndexError(index)  # where a loop over all of them ends
        number, place = divmod(index, len(self._ids))
        if number != self._order[0]:
            seed = random.Random(f"{self._seed} pass {number}").getrandbits(63)
            drawn = torch.Generator().manual_seed(seed)
            self._order = number, torch.randperm(len(self._ids), generator=drawn)
        return super().__getitem__(int(self._order[1][place]))


def run_training(
    model: Distillation,
    windows: Tensor,
    validation: Tensor,
    options: Healing,
    processes: int,
    checkpoints: Path,
    check: Callable[[], object],
) -> tuple[dict[str, Tensor], list[dict[str, float]], int]:
    """Train, or resume a killed run.

    Args:
        model: The student with its teachers.
        windows: `[windows, length]` token ids to train on.
        validation: `[windows, length]` token ids to validate on.
        options: The options of healing.
        processes: Number of processes that train together.
        checkpoints: Directory for the states of the run.
        check: Called before each state is saved; raises an exception if it must not be saved.

    Returns:
        The student's trained parameters from the best validation, by name, on the CPU and complete
        in the first process; the measurements of every validation, the first one from before
        training: `step`, `loss` (KL from the original and next-token loss, blended as in the
        objective, whatever its divergence and temperature), `nll`, `excess`, `stderr`, `kl`; and
        the step of the least `loss`.

    Raises:
        TruedepthError: The loss is no longer finite, or the state cannot be saved.
    """
    trainer = _Trainer(
        model=model,
        args=training_arguments(options, processes, checkpoints),
        train_dataset=Passes(windows, options.steps * options.batch_size, options.seed),
        eval_dataset=Windows(validation),
        compute_metrics=lambda found: _metrics(found.predictions, options.objective),
        callbacks=_callbacks(options, PartialState().is_main_process),
        check=check,
    )
    trainer.remove_callback(PrinterCallback)
    resumed = last_whole(checkpoints)
    trainer.args.eval_on_start = resumed is None
    trainer.train(resume_from_checkpoint=resumed)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    best = {name: state[name].detach().cpu() for name in trainer.trained if name in state}
    rows = [row for row in trainer.state.log_history if "eval_kl" in row]
    names = ("loss", "nll", "excess", "stderr", "kl")
    curve = [{"step": row["step"], **{name: row[f"eval_{name}"] for name in names}} for row in rows]
    trained = {name.removeprefix("student."): value for name, value in best.items()}
    return trained, curve, trainer.state.best_global_step


def passes_per_step(options: Healing, processes: int) -> int:
    """Forward passes per optimizer step, in each process.

    Raises:
        TruedepthError: The batch size is not a multiple of the windows per pass of all processes.
    """
    passes, rest = divmod(options.batch_size, options.micro_batch_size * processes)
    if rest:
        each = f"{processes} processes with {options.micro_batch_size}"
        raise TruedepthError(
            f"{options.batch_size} windows per step are not a multiple of"
            f" {each if processes > 1 else options.micro_batch_size} windows per pass; change"
            " --batch-size or --micro-batch-size."
        )
    return passes


def training_arguments(options: Healing, processes: int, directory: Path) -> TrainingArguments:
    """The options as transformers' arguments; the run's states go to `directory`."""
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=options.steps,
        per_device_train_batch_size=options.micro_batch_size,
        per_device_eval_batch_size=options.micro_batch_size,
        gradient_accumulation_steps=passes_per_step(options, processes),
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule.value,
        warmup_steps=math.ceil(options.warmup * options.steps),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        bf16=options.dtype is torch.bfloat16,
        use_cpu=options.device == "cpu",
        seed=options.seed,
        logging_steps=max(1, min(10, options.eval_every)),
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=options.eval_every,
        save_strategy="steps",
        save_steps=options.eval_every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        report_to="none",
        disable_tqdm=True,
        label_names=[],
        remove_unused_columns=False,
        dataloader_pin_memory=options.device != "cpu",
        ddp_find_unused_parameters=False,
    )


class _Trainer(Trainer):  # type: ignore[misc]
    """Saves the trained parameters and no others, and stops if the loss is not finite."""

    def __init__(self, model: nn.Module, check: Callable[[], object], **options: Any) -> None:
        self._check = check
        self.trained = {name for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(model=model, **options)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """The order is the dataset's own."""
        return SequentialSampler(train_dataset or self.train_dataset)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], **_: Any) -> Tensor:
        loss: Tensor = model(**inputs)
        if not loss.isfinite():
            raise TruedepthError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}. Try a smaller"
                " --learning-rate, a longer --warmup, or --dtype float32; the same command resumes"
                " from the last validation, --restart starts over.",
                1,
            )
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[None, Tensor, Tensor]:
        with torch.no_grad():
            rows = model(**self._prepare_inputs(inputs), measure=True)
        return None, rows, rows

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Do not warn: frozen parameters are missing from a checkpoint on purpose."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # each for a full disk
            directory = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            reason = reason_of(error)
            if shutil.disk_usage(directory.parent).free < NO_ROOM:  # torch's message omits this
                reason = "No space left on device."
            shutil.rmtree(directory, ignore_errors=True)
            raise TruedepthError(
                f"Keeping the training's state in {directory} failed: {reason} Fix that, then run"
                " the same command again: it resumes from the state before.",
                exit_code=1,
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        state = self.model.state_dict() if state_dict is None else state_dict
        held = {name: value.contiguous() for name, value in state.items() if name in self.trained}
        save_file(held, directory / "model.safetensors")


def _metrics(rows: Any, objective: Objective) -> dict[str, float]:
    loss = loss_of(torch.as_tensor(rows, dtype=torch.float64), 2)
    nll = float(rows[:, 0].mean())
    share = objective.next_token
    return {
        "loss": (1 - share) * loss.kl + share * nll,
        "nll": nll,
        "excess": loss.excess,
        "stderr": loss.stderr or 0.0,
        "kl": loss.kl,
    }


def last_whole(checkpoints: Path) -> str | None:
    """The last complete checkpoint; `trainer_state.json` is the last file that is written."""
    whole = []
    for state in checkpoints.glob("checkpoint-*/trainer_state.json"):
        try:
            json.loads(state.read_text(encoding="utf-8"))
        except ValueError:
            continue
        whole.append(state.parent)
    newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return str(newest) if newest else None


def _callbacks(options: Healing, first: bool) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [_Lines(options)]
    if options.tensorboard is not None and first:  # opening a log creates a file
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TruedepthError("--tensorboard needs `pip install truedepth[heal]`.") from error
        from transformers.integrations import TensorBoardCallback

        callbacks.append(TensorBoardCallback(SummaryWriter(str(options.tensorboard))))
    return callbacks


class _Lines(TrainerCallback):  # type: ignore[misc]
    """Progress lines on standard error: step, loss, speed and time left; each validation."""

    def __init__(self, options: Healing) -> None:
        self._step_tokens = options.step_tokens
        self._seconds: float = 0.0
        self._steps = 0
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._seconds += time.monotonic() - self._began
        self._steps += 1

    def on_log(self, _: Any, state: Any, __: Any, logs: dict[str, float], **___: Any) -> None:
        if not state.is_world_process_zero:
            return
        if "eval_kl" in logs:
            print(
                f"validation: excess loss {logs['eval_excess']:.4f} ± {logs['eval_stderr']:.4f},"
                f" KL {logs['eval_kl']:.4f} nats per token",
                file=sys.stderr,
            )
        elif "loss" in logs and self._steps:
            each = self._seconds / self._steps
            left = each * (state.max_steps - state.global_step) / 60
            print(
                f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.4f},"
                f" {self._step_tokens / each:,.0f} tokens/s, {left:.0f} min left",
                file=sys.stderr,
            )
