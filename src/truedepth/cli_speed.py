"""The command about speed: `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from truedepth.cli_options import Device, DType, JsonPath, Model, Seed, Weights, write_json
from truedepth.errors import TruedepthError
from truedepth.timing import REPETITIONS, Engine, Task


def bench(
    model: Model,
    against: Annotated[
        str | None, typer.Option(help="What to compare with, in turn: the original.")
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="prefill: one pass over a prompt of so many tokens; generate: so many tokens, one"
            " after another; decode: one token, with so many in the KV cache."
        ),
    ] = ",".join(Task),
    lengths: Annotated[str, typer.Option(help="Tokens; several with commas.")] = "128",
    batch: Annotated[str, typer.Option(help="Sequences at a time; several with commas.")] = "1",
    engine: Annotated[Engine, typer.Option(help="What runs the models.")] = Engine.transformers,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks, started here.")] = 1,
    repetitions: Annotated[
        int, typer.Option(min=1, help="Timed runs of each model, in turn.")
    ] = REPETITIONS,
    plot: Annotated[
        Path | None, typer.Option(help="Picture of the speed-ups: .png, .svg or .pdf.")
    ] = None,
    json_path: JsonPath = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Weights = DType.auto,
) -> None:
    """How fast a model is, alone or beside its original: prefill, generation, one token."""
    numbers = _numbers("--lengths", lengths), _numbers("--batch", batch)
    names = [word.strip() for word in tasks.split(",")]
    if not set(names) <= set(Task):
        raise TruedepthError(f"--tasks takes {', '.join(Task)}, not {tasks!r}.")
    if plot is not None:
        from truedepth.report.plots import check_plot, plot_benchmark

        if against is None:
            raise TruedepthError("--plot shows speed-ups: it needs --against.")
        check_plot(plot)
    from truedepth.benchmark import bench
    from truedepth.report.speed import print_benchmark

    found = bench(
        model,
        against=against,
        tasks=[Task(name) for name in names],
        lengths=numbers[0],
        batches=numbers[1],
        engine=engine,
        ranks=tp,
        repetitions=repetitions,
        device=device,
        dtype=dtype.torch(),
    )
    write_json(json_path, found.to_dict())
    if plot is not None:
        plot_benchmark(found, plot)
    print_benchmark(found)


def _numbers(option: str, text: str) -> list[int]:
    """`128,1024` as numbers of at least 1."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise TruedepthError(f"{option} takes numbers like 128 or 128,1024, not {text!r}.")
    return [int(word) for word in words]
