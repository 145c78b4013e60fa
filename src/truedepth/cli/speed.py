"""The commands about speed: `bench` and `predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from truedepth.cli.options import Device, DType, Fast, JsonPath, Model, Seed, writable, write_json
from truedepth.errors import TruedepthError
from truedepth.speed.timing import REPETITIONS, Engine, Task


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
    eager: Annotated[
        bool,
        typer.Option(
            "--eager",
            help="Nothing compiled, no CUDA graphs. By default vLLM compiles, and transformers on a"
            " GPU.",
        ),
    ] = False,
    repetitions: Annotated[
        int, typer.Option(min=1, help="Timed runs of each model, in turn.")
    ] = REPETITIONS,
    plot: Annotated[
        Path | None,
        typer.Option(help="Picture of the speed-ups: .png, .svg or .pdf.", callback=writable),
    ] = None,
    json_path: JsonPath = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Fast = DType.auto,
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
        repetitions=repetitions,
        device=device,
        dtype=dtype.torch(),
    )
    write_json(json_path, found.to_dict())
    if plot is not None:
        plot_benchmark(found, plot)
    print_benchmark(found)


def predict(
    model: Model,
    plan: Annotated[
        Path | None,
        typer.Option(help="Plan file.", show_default="of a converted model its own"),
    ] = None,
    depth: Annotated[
        int | None, typer.Option(help="Pairs down to this effective depth; which does not matter.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    link: Annotated[
        str | None,
        typer.Option(
            help="Between them: nvlink, pcie5, pcie4, infiniband, 40gbe, 10gbe, or an all-reduce's"
            " microseconds and GB/s as 30,12.5.",
            show_default="measured between the ranks",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens in the KV cache.")] = 128,
    json_path: JsonPath = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Fast = DType.auto,
) -> None:
    """What a plan would buy on this machine: a token's time before and after."""
    if plan is not None and depth is not None:
        raise TruedepthError("Say what to pair with one of --plan and --depth.")
    if link is not None and tp == 1:
        raise TruedepthError("One rank sends nothing: --link goes with --tp of 2 and more.")
    import torch

    from truedepth.plan.plan import Plan
    from truedepth.report.speed import print_prediction
    from truedepth.speed.links import parse_link
    from truedepth.speed.prediction import predict

    wire = parse_link(link) if link is not None else None
    torch.manual_seed(seed)
    found = predict(
        model,
        Plan.from_yaml(plan) if plan is not None else None,
        depth=depth,
        ranks=tp,
        link=wire,
        batch=batch,
        length=length,
        device=device,
        dtype=dtype.torch(),
    )
    write_json(json_path, found.to_dict())
    print_prediction(found)


def _numbers(option: str, text: str) -> list[int]:
    """`128,1024` as numbers."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise TruedepthError(f"{option} takes numbers like 128 or 128,1024, not {text!r}.")
    return [int(word) for word in words]
