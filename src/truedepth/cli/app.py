"""The command line: each command is a few lines over the library."""

from __future__ import annotations

import io
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from truedepth.cli import heal as cli_heal
from truedepth.cli import plan as cli_plan
from truedepth.cli import speed as cli_speed
from truedepth.cli.options import (
    AllowPickle,
    Device,
    DType,
    Fast,
    Force,
    JsonPath,
    Model,
    RemoteCode,
    Seed,
    Text,
    Weights,
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
) -> None:
    if version:
        print(f"truedepth {__version__}")
        raise typer.Exit


@app.command()
def info(
    model: Model,
    json_path: JsonPath = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Annotated[DType, typer.Option(help="To state sizes in; auto is bfloat16.")] = DType.auto,
) -> None:
    """What a model is, what can be paired, and what a plan would save."""
    from truedepth.inspection import inspect_model
    from truedepth.report.inspection import print_info

    found = inspect_model(model)
    write_json(json_path, found.to_dict())
    print_info(found, dtype.torch())


app.command()(cli_plan.plan)
app.command()(cli_plan.convert)
app.command()(cli_heal.heal)


@app.command()
def study(
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory of the study; one begun is completed.")
    ],
    text: Text = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 256,
    windows: Annotated[int, typer.Option(min=1, help="Use the first so many.")] = 16,
    stride: Annotated[
        int, typer.Option(min=1, help="Spans begin and end at multiples of this.")
    ] = 1,
    permutations: Annotated[int, typer.Option(min=1, help="Random orders a span.")] = 2,
    only: Annotated[
        list[str] | None, typer.Option(help="This transformation only; repeat for several.")
    ] = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
    json_path: JsonPath = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Fast = DType.auto,
) -> None:
    """How deep a model really is: every span of layers transformed; report.html."""
    from truedepth.depth_study.run import study
    from truedepth.depth_study.transformations import TRANSFORMATIONS
    from truedepth.report.study import print_study
    from truedepth.report.study_report import write_study

    _prepare(seed)
    try:
        found = study(
            trusted(model, allow_pickle, trust_remote_code),
            out,
            text=text,
            window=window,
            windows=windows,
            stride=stride,
            permutations=permutations,
            transformations=only or list(TRANSFORMATIONS),
            seed=seed,
            device=device,
            dtype=dtype.torch(),
        )
    except KeyboardInterrupt:
        raise TruedepthError(
            f"Interrupted; what was measured is kept in {out}, and the same command goes on.", 130
        ) from None
    written = write_study(found, out, shlex.join(["truedepth", *sys.argv[1:]]))
    write_json(json_path, found.to_dict())
    print_study(found, written)


@app.command("eval")
def evaluate(
    model: Model,
    against: Annotated[str | None, typer.Option(help="The original, on the same tokens.")] = None,
    text: Text = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 512,
    windows: Annotated[int, typer.Option(min=0, help="Use the first so many; 0 for all.")] = 64,
    tasks: Annotated[
        str | None, typer.Option(help="Benchmarks instead of text: piqa,arc_easy,…")
    ] = None,
    task_dir: Annotated[
        Path | None, typer.Option(help="JSONL files of the tasks.", show_default="from the hub")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples a question.", show_default="the task's")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Items a task at most.", show_default="all")
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Windows or items a forward pass.")] = "auto",
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
    json_path: JsonPath = None,
    seed: Annotated[
        int, typer.Option(help="Of the choice of examples; lm-evaluation-harness's own default.")
    ] = 1234,
    device: Device = None,
    dtype: Weights = DType.auto,
) -> None:
    """Perplexity or benchmark accuracy, and with --against the distance from the original."""
    from truedepth.report.evaluation import perplexity_rows, print_scores
    from truedepth.report.tables import print_rows

    if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size)):
        raise TruedepthError(f"--batch-size must be a number or auto, not {batch_size!r}.")
    if tasks is None and (task_dir or num_fewshot is not None or limit):
        raise TruedepthError("--task-dir, --num-fewshot and --limit go with --tasks.")
    if tasks is not None and text is not None:
        raise TruedepthError("--tasks and --text are two measurements; run eval twice.")
    _prepare(seed)
    measured, original = (
        trusted(each, allow_pickle, trust_remote_code) if each is not None else None
        for each in (model, against)
    )
    assert measured is not None
    if tasks is not None:
        from truedepth.evaluation.accuracy import task_scores

        found = task_scores(
            measured,
            [name.strip() for name in tasks.split(",") if name.strip()],
            against=original,
            task_dir=task_dir,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=int(batch_size) if batch_size != "auto" else "auto",
            device=device,
            dtype=dtype.torch(),
            seed=seed,
        )
        write_json(json_path, found.to_dict())
        print_scores(found)
        return
    from truedepth.evaluation.perplexity import perplexity

    losses = perplexity(
        measured,
        against=original,
        text=text,
        window=window,
        windows=windows or None,
        batch_size=4 if batch_size == "auto" else int(batch_size),
        device=device,
        dtype=dtype.torch(),
    )
    write_json(json_path, losses.to_dict())
    print_rows(perplexity_rows(losses))


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(metavar="CKPT", help="Checkpoint that convert or heal wrote.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="File to write.")],
    kind: Annotated[
        MatrixType,
        typer.Option(
            "--type",
            case_sensitive=False,
            help="Of matrices. auto is the checkpoint's own, without loss. From q6_k on llama.cpp's"
            " quantizer makes them, which truedepth\\[gguf] brings.",
        ),
    ] = MatrixType.auto,
    force: Force = False,
    json_path: JsonPath = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Annotated[DType, typer.Option(help="The same as --type f32, f16 or bf16.")] = DType.auto,
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
def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What the model answers or continues.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt; no chat template.")
    ] = False,
    verify: Annotated[
        str | None,
        typer.Option(
            metavar="ORIGINAL",
            help="Let MODEL propose tokens and its original check them: greedy text is then the"
            " original's.",
        ),
    ] = None,
    draft_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Proposed at a time, with --verify.", show_default="2"),
    ] = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
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

    _prepare(seed)
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
        draft_tokens=draft_tokens or DRAFT_TOKENS,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        raw=raw,
        stream=True,
    )
    if original is not None:
        print(
            f"{written.tokens} tokens in {written.passes} passes of {original.source.name};"
            f" {written.accepted / max(1, written.drafted):.0%} of {written.drafted} proposed"
            " tokens stand.",
            file=sys.stderr,
        )
    write_json(json_path, {"model": model, "prompt": prompt, **written.to_dict()})


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Keep the converted checkpoint here.")] = None,
    force: Force = False,
    json_path: JsonPath = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Weights = DType.auto,
) -> None:
    """Pair 14 of the default model's layers, calibrate, and measure: one page."""
    from truedepth.demo import run_demo
    from truedepth.report.demo import print_demo

    _prepare(seed)
    result = run_demo(out, force=force, device=device, dtype=dtype.torch())
    write_json(json_path, result.to_dict())
    print_demo(result)


def _prepare(seed: int) -> None:
    """Before a model is loaded: the random state, and no bars of others in log files."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.manual_seed(seed)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bar()


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 failed, 2 wrong usage or input."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    for stream in (sys.stdout, sys.stderr):  # a terminal without Δ or … shows a question mark
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app()
    except TruedepthError as error:
        sys.exit(_fail(str(error), error.exit_code))
    except KeyboardInterrupt:
        sys.exit(_fail("Interrupted.", 130))
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        sys.exit(_fail(f"{error.strerror or error}{where}.", 1))


def _fail(sentence: str, code: int) -> int:
    print(f"truedepth: {sentence}", file=sys.stderr)
    return code
