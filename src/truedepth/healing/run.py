"""Healing: trains what a checkpoint runs together back toward the original.

Calibration gives every linear map the best weights that sums over tokens can give it; to improve
further, the layers must change together. The student learns the original's predictions, and by
default only its wide layers and the sub-layers that share a stage are trained. A run keeps its text
and its state in a directory next to its output until it is done; the same call resumes an
interrupted run.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from truedepth.checkpoint.card import model_card
from truedepth.checkpoint.records import CalibrationRecord, HealingRecord, Validation
from truedepth.checkpoint.writing import write_checkpoint
from truedepth.errors import TruedepthError
from truedepth.files.atomic import atomic_directory, beside, check_apart, check_output
from truedepth.files.resumable import unfinished
from truedepth.healing.answers import ANSWERS, Answering
from truedepth.healing.belonging import check_belong
from truedepth.healing.distillation import Distillation
from truedepth.healing.front import share_front
from truedepth.healing.options import Healing, Train
from truedepth.healing.student import (
    add_lora,
    compile_layers,
    is_trained,
    merged_tensors,
    original_beside,
    recompute_activations,
    save_adapter,
    student_of,
)
from truedepth.healing.teacher import KeptPredictions, Original, Teacher
from truedepth.healing.text import TrainingText, mixed, text_parts, training_text
from truedepth.healing.training import last_whole, passes_per_step, run_training
from truedepth.runtime.device import default_device, device_of, fast_dtype
from truedepth.runtime.loading import load
from truedepth.sources.opening import open_source
from truedepth.sources.source import Source
from truedepth.tensors import dtype_name, from_tensor
from truedepth.text import window_of
from truedepth.version import __version__
from truedepth.widening.layout import Layout

CHECKPOINTS, PREDICTIONS = "checkpoints", "predictions"
WAITING = timedelta(days=1)  # for the process that writes answers or reads text


@dataclass(frozen=True)
class Healed:
    """The result of `heal`."""

    path: Path
    """The healed checkpoint."""

    source: str
    """The checkpoint that was healed, and where it was found."""

    original: str
    """The original, and where it was found."""

    record: HealingRecord
    """What config.json says of the healing."""

    curve: list[dict[str, float]]
    """The measurements of every validation, in the order of steps."""

    tokens: int
    """Tokens trained on; text that is read several times counts every time."""

    text_tokens: int
    """Training tokens in the text, each counted once."""

    seconds: float
    """Duration of this call; earlier calls of a resumed run are not included."""

    step_tokens: int
    """Tokens per step."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self) | {"path": str(self.path), "record": self.record.to_dict()}


def heal(
    checkpoint: str | Path | Source,
    out: str | Path,
    *,
    teacher: str | Path | Source,
    healing: Healing | None = None,
    keep_adapter: str | Path | None = None,
    shard_size: int | str = "5GB",
    force: bool = False,
    restart: bool = False,
) -> Healed:
    """Train a converted checkpoint back toward its original, and write the result.

    Under torchrun or `accelerate launch` every process calls this, and the first one writes.

    Args:
        checkpoint: A converted checkpoint, calibrated or not.
        out: Directory to write; appears when it is complete. An interrupted run resumes when the
            same call is made again.
        teacher: The original: hub id, directory, `.gguf` file, or 'default'.
        healing: What to train, on which text, and how.
        keep_adapter: Directory for the LoRA adapter, as peft loads it; it is merged into the
            weights of `out` in any case.
        shard_size: Largest size of a weights file: a number of bytes, or such as `5GB`.
        force: Replace `out` if it exists.
        restart: Discard an unfinished run that had other settings.

    Raises:
        TruedepthError: Models, text or options do not fit, or the loss is no longer finite.
    """
    start = time.monotonic()
    out = Path(out).expanduser().resolve()
    adapter = Path(keep_adapter).expanduser().resolve() if keep_adapter is not None else None
    student = open_source(checkpoint)
    student.check_plain("which cannot be trained")
    run = _opened(student, open_source(teacher), healing or Healing(), out)
    options, state = run.options, run.state
    if adapter is not None and options.train is not Train.lora:
        raise TruedepthError("An adapter can be kept only if LoRA is trained.")
    for output in filter(None, (out, adapter)):
        check_output(output, force)
    with run.directory(restart):
        with state.main_process_first():
            text = run.text()
        model, lora = run.student_with_teachers(text)
        trained, curve, best = run_training(
            model,
            text.trained,
            text.validation,
            options,
            state.num_processes,
            run.kept / CHECKPOINTS,
            run.check_unchanged,
        )
        record = run.record(text, curve, best)
        if state.is_main_process:
            values = merged_tensors(trained, run.source, lora)
            run.check_unchanged()
            with contextlib.ExitStack() as stack:
                if adapter is not None:
                    partial = stack.enter_context(atomic_directory(adapter, force))
                    save_adapter(trained, lora, partial)
                run.write(values, record, out, shard_size, force)
    state.wait_for_everyone()
    return Healed(
        path=out,
        source=run.source.label,
        original=run.original.label,
        record=record,
        curve=curve,
        tokens=options.steps * options.step_tokens,
        text_tokens=sum(text.tokens.values()),
        seconds=time.monotonic() - start,
        step_tokens=options.step_tokens,
    )


@dataclass(frozen=True)
class _Run:
    """Everything that a healing needs except its text."""

    source: Source
    """The checkpoint to heal."""

    original: Source
    layout: Layout
    """The checkpoint's layout."""

    options: Healing
    """The options, with device, dtype and length of a window chosen."""

    dtype: torch.dtype
    """The dtype that the models compute in."""

    state: PartialState
    """The processes that train together."""

    kept: Path
    """The run's directory, which exists until the run is done."""

    def check_unchanged(self) -> None:
        """Check that the files of both models are unchanged: frozen weights are mapped from them.

        Raises:
            TruedepthError: A file has changed.
        """
        self.source.check_unchanged()
        self.original.check_unchanged()

    def recorded_options(self) -> dict[str, Any]:
        """The options that config.json records: those that reproduce the run."""
        fields = asdict(self.options)
        passing = ("device", "compile", "tensorboard", "micro_batch_size", "eval_every")
        for name in ("text", "own_answers", "keep_answers", "validation", *passing):
            del fields[name]
        return {
            **fields,
            "objective": asdict(self.options.objective),
            "dtype": dtype_name(self.dtype),
        }

    def _settings(self) -> dict[str, Any]:
        """Everything that the state of an unfinished run depends on."""
        options = self.options
        return {
            **self.recorded_options(),
            "version": __version__,
            "text": [[part.name, part.weight] for part in options.texts],
            "own_answers": [[part.name, part.weight] for part in options.own_answers],
            "micro_batch_size": options.micro_batch_size,
            "eval_every": options.eval_every,
            "validation": options.validation,
            "compile": options.compile,
            "checkpoint": self.source.fingerprint,
            "original": self.original.fingerprint,
        }

    @contextlib.contextmanager
    def directory(self, restart: bool) -> Iterator[None]:
        """Hold the run's directory: the first process locks it, the others wait for that."""
        settings = self._settings()
        with contextlib.ExitStack() as stack:
            if self.state.is_main_process:
                begin_again = restart or not self._has_work()
                stack.enter_context(unfinished(self.kept, settings, begin_again=begin_again))
            self.state.wait_for_everyone()
            yield

    def _has_work(self) -> bool:
        """Whether an unfinished run has left what took long: a state, answers or predictions."""
        kept = [*self.kept.glob(ANSWERS.format("*")), *self.kept.glob(f"{PREDICTIONS}/*")]
        return bool(kept) or last_whole(self.kept / CHECKPOINTS) is not None

    def text(self) -> TrainingText:
        """The windows for training and validation, in files of the run's directory."""
        options = self.options
        length = window_of(self.source, options.sequence_length)
        answering = Answering(self.original, options, length, self.state.device, self.dtype)
        texts = text_parts(options.texts, self.source, options.seed)
        return training_text(
            mixed(texts, answering.parts(self.kept), options.answer_share),
            self.source,
            self.kept,
            length=length,
            windows=options.steps * options.batch_size,
            validation=options.validation,
        )

    def student_with_teachers(self, text: TrainingText) -> tuple[Distillation, Any]:
        """The student with its teachers, and peft's configuration if LoRA is trained."""
        options, family = self.options, self.original.family
        teachers: tuple[Teacher, Teacher]
        if options.keep_predictions:
            teachers = self._kept_predictions(text)
        trained = is_trained(family, self.layout, options.train)
        student = student_of(self.source, trained, self.dtype)
        if not options.keep_predictions:
            sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"  # cannot share parameters
            model = original_beside(
                student, self.original, self.layout, self.dtype, shared=not sharded
            )
            teacher = Original(model.to(self.state.device))
            share_front(student, model, family, self.layout)
            teachers = teacher, teacher
        lora = None
        if options.train is Train.lora:
            lora = add_lora(student, family, self.layout, options.rank)
        if options.gradient_checkpointing:
            recompute_activations(student)
        if options.compile:
            compile_layers(student, family)
            if isinstance(teachers[0], Original):
                compile_layers(model, family)
        joined = Distillation(student, *teachers, self.layout, options.objective, options.seed)
        return joined, lora

    def _kept_predictions(self, text: TrainingText) -> tuple[Teacher, Teacher]:
        """Teachers for training and validation; the original is in memory only in this method."""
        options, state = self.options, self.state
        model = load(self.original, device=state.device, dtype=self.dtype).model

        def kept(name: str, ids: Tensor, temperature: float) -> Teacher:
            predictions = KeptPredictions(
                self.kept / PREDICTIONS / name,
                len(ids),
                ids.shape[1],
                min(options.keep_predictions, self.original.config["vocab_size"]),
                temperature,
            )
            predictions.fill(model, ids, state.process_index, state.num_processes)
            return predictions

        trained = kept("trained", text.trained, options.objective.temperature)
        validation = kept("validation", text.validation, 1.0)
        state.wait_for_everyone()
        return trained, validation

    def record(self, text: TrainingText, curve: list[dict[str, float]], best: int) -> HealingRecord:
        """What config.json says of the healing; `best` is the step whose weights are kept."""
        return HealingRecord(
            options=self.recorded_options(),
            original=self.original.name,
            version=__version__,
            text=text.tokens,
            validation=Validation(
                windows=len(text.validation),
                before=curve[0],
                after=next(row for row in curve if row["step"] == best),
            ),
        )

    def write(
        self,
        values: Mapping[str, Tensor],
        record: HealingRecord,
        out: Path,
        shard_size: int | str,
        force: bool,
    ) -> None:
        """Write the healed checkpoint, with `values` in place of the tensors of these names."""
        tensors = dict(self.source.tensors)
        for name, value in values.items():
            tensors[name] = from_tensor(value).to(tensors[name].dtype)
        made = dict(self.source.config.get("truedepth") or {})
        added = {"healing": record.to_dict(), "version": __version__}
        config = {**self.source.config, "truedepth": made | added}
        if self.source.outer is not None:
            config, tensors = self.source.outer.with_inside(config, tensors)
        calibration = made.get("calibration")
        card = model_card(
            self.original,
            self.layout.plan,
            self.layout.all_reduces,
            CalibrationRecord.from_dict(calibration) if calibration else None,
            record,
        )
        write_checkpoint(out, self.source, config, tensors, card, shard_size, force, self.kept)


def _opened(source: Source, original: Source, options: Healing, out: Path) -> _Run:
    """The run, after all checks that need neither weights nor text.

    Raises:
        TruedepthError: Models, options or `out` do not fit, or there is no such device.
    """
    check_belong(source, original)
    options = replace(options, sequence_length=window_of(source, options.sequence_length))
    for each in (source, original):
        check_apart(each.path, out)
    options, dtype = _with_device_and_dtype(options, original)
    state = PartialState(cpu=options.device == "cpu", timeout=WAITING)
    passes_per_step(options, state.num_processes)
    kept = beside(out, "healing")
    return _Run(source, original, Layout.of(source), options, dtype, state, kept)


def _with_device_and_dtype(options: Healing, original: Source) -> tuple[Healing, torch.dtype]:
    """The options with device and dtype chosen, and that dtype."""
    # the default is not tried: every process would hold memory of the first GPU
    device = str(device_of(options.device)) if options.device else default_device()
    dtype = options.dtype
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else fast_dtype(original, torch.device(device))
        dtype = torch.bfloat16 if dtype is torch.float16 else dtype
    return replace(options, device=device, dtype=dtype), dtype
