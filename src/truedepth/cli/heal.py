"""The command that trains a checkpoint back toward its original: `heal`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from truedepth.cli.commands import Fields, Given, command
from truedepth.cli.options import JsonPath, Out, trusted, writable, write_json
from truedepth.errors import TruedepthError
from truedepth.healing.options import RUN, TRAINED, Healing, Recipe, Train

ANSWERING = ("answer_share", "answer_temperature", "answer_tokens", "keep_answers")


@command("truedepth.healing.run.heal")
def heal(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="Checkpoint that convert wrote.")
    ],
    out: Out,
    *,
    teacher: str,
    healing: Annotated[Given[Healing], Fields(Healing())],
    recipe: Annotated[
        Recipe,
        typer.Option(
            help="Settings to start from. best: the defaults shown here, which came nearest to the"
            " original. paper: next-token loss, 32 windows per step, a learning rate that falls"
            " linearly. Other options override them."
        ),
        TRAINED,
    ] = Recipe.best,
    keep_adapter: Annotated[Path | None, TRAINED],
    restart: Annotated[bool, RUN],
    allow_pickle: bool,
    trust_remote_code: bool,
    shard_size: str,
    force: bool,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Picture of the validations against tokens: .png, .svg or .pdf.",
            callback=writable,
        ),
        RUN,
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Train what CKPT runs together toward the original.

    Run the same command again to resume an interrupted run.
    """
    from truedepth.report.plots import check_plot, plot_healing

    options = healing.over(recipe.healing)
    if plot is not None:
        check_plot(plot)
    _check_needed(healing, options, keep_adapter)

    from accelerate import PartialState

    from truedepth.healing.run import heal as heal_checkpoint
    from truedepth.report.healing import print_healing

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
        if plot is not None:
            plot_healing({"": (done.step_tokens, done.curve)}, plot)
        print_healing(done)


def _check_needed(healing: Given[Healing], options: Healing, keep_adapter: Path | None) -> None:
    """Refuse options that nothing would use.

    Raises:
        TruedepthError: There is one.
    """
    said = {*healing.said} | ({"keep_adapter"} if keep_adapter is not None else set())
    for names, needed, given in (
        (("rank", "keep_adapter"), "--train lora", options.train is Train.lora),
        (ANSWERING, "--own-answers", bool(options.own_answers)),
        (("rollout",), "--on-policy", options.objective.on_policy > 0),
    ):
        for name in names:
            if name in said and not given:
                raise TruedepthError(f"--{name.replace('_', '-')} goes with {needed}.")
