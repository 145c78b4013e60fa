"""The command that trains a checkpoint back toward its original: `heal`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from truedepth.cli_options import DType, Force, JsonPath, Seed, write_json
from truedepth.errors import TruedepthError
from truedepth.heal_options import Healing, Objective, Schedule, TextPart, Train


class Recipe(StrEnum):
    """Settings by name."""

    distil = "distil"
    paper = "paper"


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
            " NAME=2 weighs it twice; repeat to mix.",
            show_default="RedPajama-Data-1T-Sample",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="To train on.")] = 2_000_000,
    recipe: Annotated[
        Recipe,
        typer.Option(
            help="paper: next-token loss, 32 windows a step, learning rate 1e-4 falling linearly."
            " Options given beside it override it."
        ),
    ] = Recipe.distil,
    train: Annotated[
        Train, typer.Option(help="Wide layers, all weights, or LoRA on wide layers.")
    ] = Train.paired,
    rank: Annotated[int | None, typer.Option(help="Of LoRA.", show_default="16")] = None,
    next_token: Annotated[
        float | None,
        typer.Option(
            help="Share of the next-token loss; the rest is KL from the original.",
            show_default="0",
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the KL.")] = 1.0,
    hidden: Annotated[
        float, typer.Option(help="Weight of the error of what wide layers give.")
    ] = 0.0,
    keep_predictions: Annotated[
        int,
        typer.Option(
            help="Most likely tokens of the original's predictions to keep on disk instead of the"
            " original in memory; 0 runs the original beside the student."
        ),
    ] = 0,
    sequence_length: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its highest.", show_default="2e-4")
    ] = None,
    schedule: Annotated[
        Schedule | None, typer.Option(help="How it falls.", show_default="cosine")
    ] = None,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which it rises.")] = 0.05,
    batch_size: Annotated[
        int | None, typer.Option(help="Windows a step, on all devices.", show_default="16")
    ] = None,
    micro_batch_size: Annotated[int, typer.Option(help="Windows a pass, on one.")] = 4,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to it.")] = 1.0,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    eval_every: Annotated[
        int, typer.Option(help="Steps between validations, each with a checkpoint.")
    ] = 50,
    validation: Annotated[int, typer.Option(help="Windows to validate on.")] = 64,
    logs: Annotated[Path | None, typer.Option(help="Directory for TensorBoard.")] = None,
    keep_adapter: Annotated[
        Path | None, typer.Option(help="Directory for the LoRA adapter, which is also merged.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Give up an unfinished run of other settings.")
    ] = False,
    shard_size: Annotated[str, typer.Option(help="Most bytes a weights file holds.")] = "5GB",
    force: Force = False,
    json_path: JsonPath = None,
    seed: Seed = 0,
    device: Annotated[
        Device | None, typer.Option(help="Where to train.", show_default="a GPU if any")
    ] = None,
    dtype: Annotated[
        DType,
        typer.Option(
            help="Of the arithmetic; trained weights are float32. auto is float32 on a CPU."
        ),
    ] = DType.auto,
) -> None:
    """Train the wide layers of CKPT toward the original; an interrupted run is gone on with."""
    if rank is not None and train is not Train.lora:
        raise TruedepthError("--rank goes with --train lora.")
    if keep_adapter is not None and train is not Train.lora:
        raise TruedepthError("--keep-adapter goes with --train lora.")

    from accelerate import PartialState

    from truedepth.healing import heal as heal_checkpoint
    from truedepth.report.pages import print_healing

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
        dtype=dtype.torch(),
        logs=logs,
    )
    done = heal_checkpoint(
        checkpoint,
        out,
        teacher=teacher,
        healing=options,
        keep_adapter=keep_adapter,
        shard_size=shard_size,
        force=force,
        restart=restart,
    )
    if PartialState().is_main_process:
        write_json(json_path, done.to_dict())
        print_healing(done)
