"""Healing: the wide layers of a checkpoint are trained back toward the original.

Calibration gives every linear map the best weights that sums over tokens can give it; what is left
needs the layers to change together. The original's predictions are what is trained toward, and by
default only the wide layers are trained. A run keeps its text and its state beside its output until
it is done, and the same call goes on with it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor

from truedepth.checkpoint.card import model_card
from truedepth.checkpoint.writing import write_checkpoint
from truedepth.errors import TruedepthError
from truedepth.files.atomic import atomic_directory, beside, check_apart, check_output
from truedepth.files.resumable import unfinished
from truedepth.healing.distillation import Distillation
from truedepth.healing.options import Healing, Train
from truedepth.healing.student import (
    add_lora,
    is_trained,
    merged_tensors,
    original_beside,
    student_of,
)
from truedepth.healing.teacher import KeptPredictions, Original, Teacher
from truedepth.healing.text import TrainingText, training_text
from truedepth.healing.training import last_whole, passes_a_step, run_training
from truedepth.plan.config import plan_of
from truedepth.plan.plan import Plan
from truedepth.runtime.device import default_device, fast_dtype
from truedepth.runtime.loading import load
from truedepth.sources.opening import open_source
from truedepth.sources.source import Source
from truedepth.tensors import dtype_name, from_tensor
from truedepth.text import check_window
from truedepth.version import __version__
from truedepth.widening.layout import as_run

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Healed:
    """What `heal` did."""

    path: Path
    source: str
    """The checkpoint that was healed, and where it was found."""

    original: str
    record: dict[str, Any]
    """What config.json says of it: text, tokens, objective, and what was measured on validation
    windows before and after."""

    curve: list[dict[str, float]]
    """What was measured on the way, by step."""

    tokens: int
    """Trained on, repetitions counted."""

    text_tokens: int
    """Different ones."""

    seconds: float
    """Since this call began; a run that was gone on with took longer."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"path": str(self.path)}


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
    """Train a converted checkpoint back toward its original, and write it as another.

    Under torchrun or `accelerate launch` every process calls this, and the first one writes.

    Args:
        checkpoint: A converted checkpoint, calibrated or not.
        out: Directory to write; appears when it is complete. An interrupted run resumes when the
            same call is made again.
        teacher: The original: hub id, directory, `.gguf` file, or 'default'.
        healing: What to train, on what, and how.
        keep_adapter: Directory for the LoRA adapter, as peft loads it; it is merged into the
            weights of `out` in any case.
        shard_size: Largest size of a weights file: a number of bytes, or such as `5GB`.
        force: Replace `out` if it exists.
        restart: Discard an unfinished run that had other settings.

    Raises:
        TruedepthError: Models, text or options do not fit, or the loss stopped being a number.
    """
    start = time.monotonic()
    options = healing or Healing()
    source, original = open_source(checkpoint), open_source(teacher)
    out = Path(out).expanduser().resolve()
    adapter = Path(keep_adapter).expanduser().resolve() if keep_adapter is not None else None
    plan = _check(source, original, options, adapter)
    for each in (source, original):
        check_apart(each.path, out)
    check_output(out, force)
    if adapter is not None:
        check_output(adapter, force)
    options, dtype = _placed(options, original)
    state = PartialState(cpu=options.device == "cpu")
    passes_a_step(options, state.num_processes)
    settings = _settings(source, original, options)
    kept = beside(out, "healing")
    with _directory(state, kept, settings, restart):
        with state.main_process_first():
            text = training_text(
                options.text,
                source.tokenizer,
                kept,
                length=options.sequence_length,
                windows=options.steps * options.batch_size,
                validation=options.validation,
                seed=options.seed,
            )
        model, lora = _student_with_teachers(
            source, original, plan, text, options, dtype, state, kept
        )

        def check() -> None:
            """Frozen weights are mapped from the files of both models."""
            source.check_unchanged()
            original.check_unchanged()

        trained, curve, best = run_training(
            model,
            text.trained,
            text.validation,
            options,
            state.num_processes,
            kept / CHECKPOINTS,
            check,
        )
        record = {
            **_recorded(original, options),
            "text": text.tokens,
            "validation": {
                "windows": len(text.validation),
                "before": curve[0],
                "after": next(row for row in curve if row["step"] == best),
            },
        }
        if state.is_main_process:
            values = merged_tensors(trained, source, lora)
            check()
            with contextlib.ExitStack() as stack:
                if adapter is not None:
                    partial = stack.enter_context(atomic_directory(adapter, force))
                    _save_adapter(trained, lora, partial)
                _write(source, original, plan, values, record, out, shard_size, force, kept)
    state.wait_for_everyone()
    return Healed(
        path=out,
        source=source.label,
        original=original.label,
        record=record,
        curve=curve,
        tokens=options.steps * options.batch_size * options.sequence_length,
        text_tokens=sum(text.tokens.values()),
        seconds=time.monotonic() - start,
    )


def _check(source: Source, original: Source, options: Healing, adapter: Path | None) -> Plan:
    """What can be refused is refused before anything is read. Gives the checkpoint's plan."""
    plan = plan_of(source.config)
    if plan is None:
        raise TruedepthError(
            f"{source.path} is not a checkpoint that truedepth has made; convert a model first."
        )
    if source.path.is_file():
        raise TruedepthError(f"{source.path} is a GGUF file; heal what it was exported from.")
    if not plan.paired_layers:
        raise TruedepthError(f"No layers of {source.path} are paired: there is nothing to heal.")
    if plan_of(original.config) is not None or original.num_layers != plan.num_layers:
        raise TruedepthError(
            f"{original.name} is not the original of {source.path}, which was made from a model of"
            f" {plan.num_layers} layers."
        )
    for name in ("vocab_size", "hidden_size"):
        if original.config[name] != source.config[name]:
            raise TruedepthError(
                f"{original.name} is not the original of {source.path}: {name} differs,"
                f" {original.config[name]} and {source.config[name]}."
            )
    check_window(source, options.sequence_length)
    if adapter is not None and options.train is not Train.lora:
        raise TruedepthError("There is an adapter to keep only where LoRA is trained.")
    return plan


def _placed(options: Healing, original: Source) -> tuple[Healing, torch.dtype]:
    """With device and dtype chosen; and that dtype."""
    device = options.device or default_device()
    dtype = options.dtype
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else fast_dtype(original, torch.device(device))
        dtype = torch.bfloat16 if dtype is torch.float16 else dtype
    return replace(options, device=device, dtype=dtype), dtype


def _recorded(original: Source, options: Healing) -> dict[str, Any]:
    """What makes the run again, but for the text."""
    fields = asdict(options)
    for name in ("text", "device", "tensorboard", "micro_batch_size", "eval_every", "validation"):
        del fields[name]
    assert options.dtype is not None
    return {
        **fields,
        "objective": asdict(options.objective),
        "dtype": dtype_name(options.dtype),
        "original": original.name,
        "version": __version__,
    }


def _settings(source: Source, original: Source, options: Healing) -> dict[str, Any]:
    return {
        **_recorded(original, options),
        "text": [[part.name, part.weight] for part in options.text],
        "micro_batch_size": options.micro_batch_size,
        "eval_every": options.eval_every,
        "validation": options.validation,
        "checkpoint": source.fingerprint,
        "original": original.fingerprint,
    }


@contextlib.contextmanager
def _directory(
    state: PartialState, directory: Path, settings: Mapping[str, Any], restart: bool
) -> Iterator[None]:
    """The run's directory; locked by the first process, which the others wait for."""
    with contextlib.ExitStack() as stack:
        if state.is_main_process:
            nothing_lost = restart or last_whole(directory / CHECKPOINTS) is None
            stack.enter_context(unfinished(directory, settings, begin_again=nothing_lost))
        state.wait_for_everyone()
        yield


def _student_with_teachers(
    source: Source,
    original: Source,
    plan: Plan,
    text: TrainingText,
    options: Healing,
    dtype: torch.dtype,
    state: PartialState,
    directory: Path,
) -> tuple[Distillation, Any]:
    """The student with its teachers, and peft's configuration where there is one."""
    teachers: tuple[Teacher, Teacher]
    if options.keep_predictions:
        teachers = _kept_predictions(original, text, options, dtype, state, directory)
    student = student_of(source, is_trained(original.family, source.config, options.train), dtype)
    if not options.keep_predictions:
        sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"  # then nothing can be shared
        model = original_beside(student, original, plan, dtype, shared=not sharded)
        teacher = Original(model.to(state.device))
        teachers = teacher, teacher
    lora = None
    if options.train is Train.lora:
        lora = add_lora(student, original.family, options.rank)
    if options.gradient_checkpointing:
        older = student.gradient_checkpointing_enable  # its name in transformers before 5.23
        getattr(student, "activation_checkpointing_enable", older)({"use_reentrant": False})
    return Distillation(student, *teachers, plan, options.objective), lora


def _kept_predictions(
    original: Source,
    text: TrainingText,
    options: Healing,
    dtype: torch.dtype,
    state: PartialState,
    directory: Path,
) -> tuple[Teacher, Teacher]:
    """For the windows of both uses; the original is in memory only here."""
    model = load(original, device=state.device, dtype=dtype).model

    def kept(name: str, ids: Tensor, temperature: float) -> Teacher:
        predictions = KeptPredictions(
            directory / "predictions" / name,
            len(ids),
            options.sequence_length,
            min(options.keep_predictions, original.config["vocab_size"]),
            temperature,
        )
        predictions.fill(model, ids, state.process_index, state.num_processes)
        return predictions

    trained = kept("trained", text.trained, options.objective.temperature)
    validation = kept("validation", text.validation, 1.0)
    state.wait_for_everyone()
    return trained, validation


def _write(
    source: Source,
    original: Source,
    plan: Plan,
    values: Mapping[str, Tensor],
    record: dict[str, Any],
    out: Path,
    shard_size: int | str,
    force: bool,
    kept: Path,
) -> None:
    tensors = dict(source.tensors)
    for name, value in values.items():
        tensors[name] = from_tensor(value).to(tensors[name].dtype)
    config = dict(source.config)
    made = dict(config.get("truedepth") or {})
    config["truedepth"] = made | {"healing": record, "version": __version__}
    all_reduces = as_run(original, plan).all_reduces_per_token(2)
    card = model_card(original, plan, all_reduces, made.get("calibration"), record)
    write_checkpoint(out, source, config, tensors, card, shard_size, force, kept)


def _save_adapter(trained: Mapping[str, Tensor], lora: Any, directory: Path) -> None:
    """As peft's own `save_pretrained` names it."""
    held = {
        f"base_model.model.{name.replace('.default.', '.')}": value.contiguous()
        for name, value in trained.items()
    }
    save_file(held, directory / "adapter_model.safetensors")
    lora.save_pretrained(str(directory))
