"""The command line: each command is a few lines over the library."""

from __future__ import annotations

import io
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from truedepth.cli import evaluate as cli_evaluate
from truedepth.cli import heal as cli_heal
from truedepth.cli import plan as cli_plan
from truedepth.cli import speed as cli_speed
from truedepth.cli.commands import command
from truedepth.cli.errors import DEBUG, reported
from truedepth.cli.options import (
    Device,
    DType,
    Fast,
    JsonPath,
    Model,
    Seed,
    UnusedDevice,
    UnusedSeed,
    Weights,
    prepare,
    trusted,
    write_json,
)
from truedepth.engines.gguf.types import MatrixType
from truedepth.errors import TruedepthError
from truedepth.version import __version__

app = typer.Typer(
    help="Layer Parallelism: a pretrained LLM, shallower and wider, without retraining.",
    epilog="MODEL is a hub id, a directory, a .gguf file, or the word 'default'"
    " (SmolLM2-135M-Instruct). Layers are numbered from 0.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _app(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool,
        typer.Option(
            DEBUG, help="Show where an error comes from; may stand anywhere in a command."
        ),
    ] = False,
) -> None:
    if version:
        print(f"truedepth {__version__}")
        raise typer.Exit


@app.command()
@command()
def info(
    model: Model,
    json_path: JsonPath = None,
    seed: UnusedSeed = 0,
    device: UnusedDevice = None,
    dtype: Annotated[
        DType, typer.Option(help="Dtype assumed when printing sizes; auto: bfloat16.")
    ] = DType.auto,
) -> None:
    """Show what a model is, what of it can run together, and what a plan would save."""
    from truedepth.inspection import inspect_model
    from truedepth.report.inspection import print_info

    found = inspect_model(model)
    write_json(json_path, found.to_dict())
    print_info(found, dtype.torch())


app.command()(cli_plan.plan)
app.command()(cli_plan.convert)
app.command()(cli_heal.heal)


@app.command()
@command("truedepth.depth_study.run.study")
def study(
    model: Model,
    *,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Directory of the study; an interrupted study in it is completed."
        ),
    ],
    text: Path | None,
    window: int | None,
    windows: int,
    stride: int,
    permutations: int,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Apply only this transformation; repeat for several."),
    ] = None,
    allow_pickle: bool,
    trust_remote_code: bool,
    json_path: JsonPath = None,
    seed: int,
    device: Device = None,
    dtype: Fast = DType.auto,
) -> None:
    """Measure how deep a model really is: transform every span of layers, write report.html."""
    from truedepth.depth_study.run import study
    from truedepth.report.study import print_study
    from truedepth.report.study_report import write_study

    prepare(seed)
    try:
        found = study(
            trusted(model, allow_pickle, trust_remote_code),
            out,
            text=text,
            window=window,
            windows=windows,
            stride=stride,
            permutations=permutations,
            transformations=only,
            seed=seed,
            device=device,
            dtype=dtype.torch(),
        )
    except KeyboardInterrupt:
        raise TruedepthError(
            f"Interrupted; {out} keeps what was measured, and the same command resumes.", 130
        ) from None
    written = write_study(found, out, shlex.join(["truedepth", *map(_without_place, sys.argv[1:])]))
    write_json(json_path, found.to_dict())
    print_study(found, written)


def _without_place(word: str) -> str:
    """A word of a command that is shown to others: of an absolute path, the name alone."""
    option, equals, path = word.rpartition("=")
    return option + equals + Path(path).name if Path(path).is_absolute() else word


app.command("eval")(cli_evaluate.evaluate)


@app.command()
@command("truedepth.engines.gguf.export.export")
def export(
    model: Annotated[
        str, typer.Argument(metavar="CKPT", help="Checkpoint that convert or heal wrote.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="File to write.")],
    *,
    kind: Annotated[
        MatrixType,
        typer.Option(
            "--type",
            case_sensitive=False,
            help="Type of the matrices. auto: the checkpoint's (lossless). k- and i-quants use"
            " llama.cpp's quantizer: pip install 'truedepth\\[gguf]'.",
        ),
    ] = MatrixType.auto,
    force: bool,
    json_path: JsonPath = None,
    seed: UnusedSeed = 0,
    device: UnusedDevice = None,
    dtype: Annotated[
        DType, typer.Option(help="Another way to write --type f32, f16 or bf16.")
    ] = DType.auto,
) -> None:
    """Write a layer-parallel checkpoint as a GGUF file that llama.cpp runs as it is."""
    if dtype is not DType.auto:
        if kind is not MatrixType.auto:
            raise TruedepthError("--type and --dtype say the same thing; give one of them.")
        kind = MatrixType(dtype.value.replace("bfloat", "bf").replace("float", "f"))
    from truedepth.engines.gguf.export import export
    from truedepth.report.export import print_export

    done = export(model, out, type=kind, force=force)
    write_json(json_path, done.to_dict())
    print_export(done)


app.command()(cli_speed.bench)
app.command()(cli_speed.predict)


@app.command()
@command("truedepth.runtime.generation.answer")
def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Text that the model answers or continues.")
    ],
    *,
    max_new_tokens: int,
    temperature: float,
    raw: bool,
    verify: Annotated[
        str | None,
        typer.Option(
            metavar="ORIGINAL",
            help="Let MODEL draft tokens and its original check them: greedy text is then the"
            " original's.",
        ),
    ] = None,
    draft_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens drafted at a time, with --verify.", show_default="2"),
    ] = None,
    allow_pickle: bool,
    trust_remote_code: bool,
    json_path: JsonPath = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Weights = DType.auto,
) -> None:
    """Let a model, original or converted, answer PROMPT."""
    if draft_tokens is not None and verify is None:
        raise TruedepthError("--draft-tokens goes with --verify.")
    from truedepth.runtime.generation import DRAFT_TOKENS, answer
    from truedepth.runtime.loading import load

    prepare(seed)
    loaded, original = (
        load(trusted(each, allow_pickle, trust_remote_code), device=device, dtype=dtype.torch())
        if each is not None
        else None
        for each in (model, verify)
    )
    assert loaded is not None
    if model == "default":
        print(f"{loaded.source.name} from: {loaded.source.origin}", file=sys.stderr)
    written = answer(
        original or loaded,
        prompt,
        draft=loaded if original else None,
        draft_tokens=DRAFT_TOKENS if draft_tokens is None else draft_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        raw=raw,
        stream=True,
    )
    if original is not None:
        print(
            f"{written.tokens} tokens in {written.passes} passes of {original.source.name};"
            f" {written.accepted / max(1, written.drafted):.0%} of {written.drafted} drafted"
            " tokens were accepted.",
            file=sys.stderr,
        )
    write_json(json_path, {"model": model, "prompt": prompt, **written.to_dict()})


@app.command()
@command("truedepth.demo.run_demo")
def demo(
    *,
    out: Annotated[
        Path | None, typer.Option(help="Directory to keep the converted checkpoint in.")
    ] = None,
    force: bool,
    json_path: JsonPath = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Weights = DType.auto,
) -> None:
    """Pair 14 of the default model's layers, calibrate, and measure: a page of results."""
    from truedepth.demo import run_demo
    from truedepth.report.demo import print_demo

    prepare(seed)
    result = run_demo(out, force=force, device=device, dtype=dtype.torch())
    write_json(json_path, result.to_dict())
    print_demo(result)


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 failed, 2 wrong usage or input."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    for stream in (sys.stdout, sys.stderr):  # a terminal without Δ or … shows a question mark
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.exit(reported(app, sys.argv[1:]))
