"""Arguments and options that several commands share."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from truedepth.errors import TruedepthError

if TYPE_CHECKING:
    import torch

    from truedepth.sources.source import Source


class DType(StrEnum):
    """Of weights, in memory or on disk."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"

    def torch(self) -> torch.dtype | None:
        """None for auto."""
        import torch

        return None if self is DType.auto else getattr(torch, self.value)


def writable(path: Path | None) -> Path | None:
    """Before hours of work, not after them."""
    if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise TruedepthError(f"Cannot write {path}: give a file in a directory that exists.")
    return path


def trusted(model: str, allow_pickle: bool, trust_remote_code: bool) -> Source:
    """MODEL, opened with what the user allows it."""
    from truedepth.sources.opening import open_source

    return open_source(model, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)


def write_json(path: Path | None, data: dict[str, Any]) -> None:
    """Where --json says, if it does."""
    if path is not None:
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id, directory, .gguf file, or 'default'.")
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle", help="Read .bin and .pt where there are no safetensors: tensors only."
    ),
]
RemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run a tokenizer's own Python code; read it first."),
]
JsonPath = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the result as JSON.", callback=writable),
]
Seed = Annotated[int, typer.Option(help="Of random choices, where there are any.")]
Device = Annotated[
    str | None,
    typer.Option(help="Where a model runs: cpu, cuda, cuda:1, …", show_default="a GPU if any"),
]
Weights = Annotated[
    DType, typer.Option(help="Of weights; auto is float32 on a CPU, else the checkpoint's own.")
]
Fast = Annotated[DType, typer.Option(help="auto is bfloat16 on processors that are fast at it.")]
Text = Annotated[
    Path | None,
    typer.Option(help=".txt or .jsonl file.", show_default="Python's own documentation"),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
