"""The command that trains a checkpoint back toward its original: `heal`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from truedepth.cli.options import (
    AllowPickle,
    Force,
    JsonPath,
    RemoteCode,
    Seed,
    trusted,
    write_json,
)
from truedepth.errors import TruedepthError
from truedepth.healing.options import Healing, Objective, Schedule, TextPart, Train


class Recipe(StrEnum):
    """Settings by name."""

    distil = "distil"
    paper = "paper"


class Precision(StrEnum):
    """Of a training's arithmetic."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Device(StrEnum):
    """Where to train."""

    cpu = "cpu"
    cuda = "cuda"


def heal(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="Checkpoint that convert has written.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.")],
    teacher: Annotated[
        str, typer.Option(help="Its original: hub id, directory, .gguf file, or 'default'.")
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="To train on: .txt or .jsonl file, directory of such, or data set of the hub;"
            " NAME=2 weighs it twice; repeat to mix. By default RedPajama's sample from the hub.",
            show_default=False,
            rich_help_panel="Text",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="To train on.", rich_help_panel="Text")
    ] = Healing.tokens,
    recipe: Annotated[
        Recipe,
        typer.Option(
            help="paper: next-token loss, 32 windows a step, learning rate 1e-4 falling linearly."
            " Options given beside it override it.",
            rich_help_panel="What is trained",
        ),
    ] = Recipe.distil,
    train: Annotated[
        Train,
        typer.Option(
            help="Wide layers, all weights, or LoRA on wide layers.",
            rich_help_panel="What is trained",
        ),
    ] = Train.paired,
    rank: Annotated[
        int | None,
        typer.Option(help="Of LoRA.", show_default="16", rich_help_panel="What is trained"),
    ] = None,
    next_token: Annotated[
        float | None,
        typer.Option(
            help="Share of the next-token loss; the rest is KL from the original.",
            show_default="0",
            rich_help_panel="What is trained",
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Of the KL.", rich_help_panel="What is trained")
    ] = Objective.temperature,
    hidden: Annotated[
        float,
        typer.Option(
            help="Weight of the error of what wide layers give.", rich_help_panel="What is trained"
        ),
    ] = Objective.hidden,
    keep_predictions: Annotated[
        int,
        typer.Option(
            help="Most likely tokens of the original's predictions to keep on disk instead of the"
            " original in memory; 0 runs the original beside the student.",
            rich_help_panel="Memory",
        ),
    ] = Healing.keep_predictions,
    sequence_length: Annotated[
        int, typer.Option(help="Tokens a window.", rich_help_panel="Text")
    ] = Healing.sequence_length,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="At its highest.",
            show_default=f"{Healing.learning_rate:g}",
            rich_help_panel="Steps",
        ),
    ] = None,
    schedule: Annotated[
        Schedule | None,
        typer.Option(help="How it falls.", show_default=Healing.schedule, rich_help_panel="Steps"),
    ] = None,
    warmup: Annotated[
        float, typer.Option(help="Share of the steps in which it rises.", rich_help_panel="Steps")
    ] = Healing.warmup,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Windows a step, on all devices.",
            show_default=str(Healing.batch_size),
            rich_help_panel="Steps",
        ),
    ] = None,
    micro_batch_size: Annotated[
        int, typer.Option(help="Windows a pass, on one.", rich_help_panel="Memory")
    ] = Healing.micro_batch_size,
    weight_decay: Annotated[
        float, typer.Option(help="AdamW's.", rich_help_panel="Steps")
    ] = Healing.weight_decay,
    max_grad_norm: Annotated[
        float, typer.Option(help="Gradients are clipped to it.", rich_help_panel="Steps")
    ] = Healing.max_grad_norm,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing", help="Less memory, more time.", rich_help_panel="Memory"
        ),
    ] = False,
    eval_every: Annotated[
        int,
        typer.Option(
            help="Steps between validations, each with a checkpoint.", rich_help_panel="The run"
        ),
    ] = Healing.eval_every,
    validation: Annotated[
        int, typer.Option(help="Windows to validate on.", rich_help_panel="Text")
    ] = Healing.validation,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Directory for TensorBoard.", rich_help_panel="The run")
    ] = None,
    keep_adapter: Annotated[
        Path | None,
        typer.Option(
            help="Directory for the LoRA adapter, which is also merged.",
            rich_help_panel="What is trained",
        ),
    ] = None,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Give up an unfinished run of other settings.",
            rich_help_panel="The run",
        ),
    ] = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
    shard_size: Annotated[str, typer.Option(help="Most bytes a weights file holds.")] = "5GB",
    force: Force = False,
    json_path: JsonPath = None,
    seed: Seed = 0,
    device: Annotated[
        Device | None, typer.Option(help="Where to train.", show_default="a GPU if any")
    ] = None,
    dtype: Annotated[
        Precision,
        typer.Option(
            help="Of the arithmetic; trained weights are float32. auto is float32 on a CPU.",
        ),
    ] = Precision.auto,
) -> None:
    """Train the wide layers of CKPT toward the original; an interrupted run is gone on with."""
    if rank is not None and train is not Train.lora:
        raise TruedepthError("--rank goes with --train lora.")
    if keep_adapter is not None and train is not Train.lora:
        raise TruedepthError("--keep-adapter goes with --train lora.")

    import torch
    from accelerate import PartialState

    from truedepth.healing.run import heal as heal_checkpoint
    from truedepth.report.healing import print_healing

    paper = recipe is Recipe.paper
    share = next_token if next_token is not None else float(paper)
    if learning_rate is None:
        learning_rate = 1e-4 if paper else Healing.learning_rate
    if batch_size is None:
        batch_size = 32 if paper else Healing.batch_size
    if schedule is None:
        schedule = Schedule.linear if paper else Healing.schedule
    options = Healing(
        text=tuple(map(TextPart.parse, text)) if text else Healing.text,
        tokens=tokens,
        sequence_length=sequence_length,
        validation=validation,
        train=train,
        rank=rank or Healing.rank,
        objective=Objective(share, temperature, hidden),
        keep_predictions=keep_predictions,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        gradient_checkpointing=gradient_checkpointing,
        eval_every=eval_every,
        seed=seed,
        device=device.value if device else None,
        dtype=None if dtype is Precision.auto else getattr(torch, dtype.value),
        tensorboard=tensorboard,
    )
    done = heal_checkpoint(
        trusted(checkpoint, False, trust_remote_code),
        out,
        teacher=trusted(teacher, allow_pickle, trust_remote_code),
        healing=options,
        keep_adapter=keep_adapter,
        shard_size=shard_size,
        force=force,
        restart=restart,
    )
    if PartialState().is_main_process:
        write_json(json_path, done.to_dict())
        print_healing(done)
