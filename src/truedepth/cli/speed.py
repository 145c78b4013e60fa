"""The commands about speed: `bench` and `predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from truedepth.cli.commands import Like, command
from truedepth.cli.options import (
    Device,
    DType,
    Fast,
    JsonPath,
    Model,
    Seed,
    UnusedSeed,
    writable,
    write_json,
)
from truedepth.errors import TruedepthError
from truedepth.speed.links import LINKS, parse_link
from truedepth.speed.timing import REPETITIONS, Engine, Task


@command("truedepth.speed.benchmark.bench")
def bench(
    model: Model,
    *,
    against: Annotated[
        str | None, typer.Option(help="Model to compare with, timed in turn: the original.")
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="prefill: one pass over a prompt of LENGTHS tokens; generate: LENGTHS tokens, one"
            " after another; decode: one token, with LENGTHS tokens in the KV cache."
        ),
    ] = ",".join(Task),
    lengths: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = "128",
    batch: Annotated[
        str, typer.Option(help="Numbers of sequences at a time, separated by commas.")
    ] = "1",
    engine: Annotated[
        Engine, typer.Option(help="Engine that runs the models.")
    ] = Engine.transformers,
    tp: Annotated[int, Like("ranks")],
    eager: bool,
    fuse: bool,
    repetitions: int = REPETITIONS,
    plot: Annotated[
        Path | None,
        typer.Option(help="Picture of the speed-ups: .png, .svg or .pdf.", callback=writable),
    ] = None,
    json_path: JsonPath = None,
    seed: UnusedSeed = 0,
    device: Device = None,
    dtype: Fast = DType.auto,
) -> None:
    """Time a model, alone or in turn with its original: prefill, generation, one token."""
    numbers = _numbers("--lengths", lengths), _numbers("--batch", batch)
    names = [word.strip() for word in tasks.split(",")]
    if not set(names) <= set(Task):
        raise TruedepthError(f"--tasks takes {', '.join(Task)}, not {tasks!r}.")
    if plot is not None:
        from truedepth.report.plots import check_plot, plot_benchmark

        if against is None:
            raise TruedepthError("--plot shows speed-ups: it needs --against.")
        check_plot(plot)
    from truedepth.report.speed import print_benchmark
    from truedepth.speed.benchmark import bench

    found = bench(
        model,
        against=against,
        tasks=[Task(name) for name in names],
        lengths=numbers[0],
        batches=numbers[1],
        engine=engine,
        ranks=tp,
        eager=eager,
        fuse=fuse,
        repetitions=repetitions,
        device=device,
        dtype=dtype.torch(),
    )
    write_json(json_path, found.to_dict())
    if plot is not None:
        plot_benchmark(found, plot)
    print_benchmark(found)


@command("truedepth.speed.prediction.predict")
def predict(
    model: Model,
    *,
    plan: Annotated[
        Path | None,
        typer.Option(help="Plan file (YAML).", show_default="the converted model's own plan"),
    ] = None,
    depth: int | None,
    all_reduces: int | None,
    tp: Annotated[int, Like("ranks")],
    link: Annotated[
        str | None,
        typer.Option(
            help=f"Link between the ranks: {', '.join(LINKS)}, or the microseconds and GB/s of an"
            " all-reduce as 30,12.5.",
            show_default="measured between the ranks",
        ),
    ] = None,
    task: str,
    batch: int,
    length: int,
    fuse: bool,
    json_path: JsonPath = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Fast = DType.auto,
) -> None:
    """Predict the time per token or prompt before and after, on this machine."""
    if [plan, depth, all_reduces].count(None) < 2:
        raise TruedepthError("Say what runs together with one of --plan, --depth, --all-reduces.")
    if link is not None and tp == 1:
        raise TruedepthError("One rank sends nothing: --link goes with --tp of 2 and more.")
    import torch

    from truedepth.plan.plan import Plan
    from truedepth.report.speed import print_prediction
    from truedepth.speed.prediction import predict

    wire = parse_link(link) if link is not None else None
    torch.manual_seed(seed)
    found = predict(
        model,
        Plan.from_yaml(plan) if plan is not None else None,
        depth=depth,
        all_reduces=all_reduces,
        ranks=tp,
        link=wire,
        task=task,
        batch=batch,
        length=length,
        fuse=fuse,
        device=device,
        dtype=dtype.torch(),
    )
    write_json(json_path, found.to_dict())
    print_prediction(found)


def _numbers(option: str, text: str) -> list[int]:
    """The numbers of `128,1024`."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise TruedepthError(f"{option} takes numbers like 128 or 128,1024, not {text!r}.")
    return [int(word) for word in words]
