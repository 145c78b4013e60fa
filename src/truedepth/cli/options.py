"""Arguments and options that several commands share."""

from __future__ import annotations

import json
import logging
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from truedepth.errors import TruedepthError

if TYPE_CHECKING:
    import torch

    from truedepth.sources.source import Source


class DType(StrEnum):
    """A dtype by its name; auto: what suits the machine and the model."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"

    def torch(self) -> torch.dtype | None:
        """None for auto."""
        import torch

        return None if self is DType.auto else getattr(torch, self.value)


def writable(path: Path | None) -> Path | None:
    """Refuse a file that cannot be written, before hours of work.

    Raises:
        TruedepthError: It cannot be written.
    """
    if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise TruedepthError(f"Cannot write {path}: give a file in a directory that exists.")
    return path


def trusted(model: str, allow_pickle: bool, trust_remote_code: bool) -> Source:
    """Open a model with what the user allows it."""
    from truedepth.sources.opening import open_source

    return open_source(model, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)


def write_json(path: Path | None, data: dict[str, Any]) -> None:
    """Write the result to the file that --json names, if it names one."""
    if path is not None:
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def prepare(seed: int) -> None:
    """Set the random state, and keep other libraries' progress bars out of log files."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.manual_seed(seed)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bar()


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id, directory, .gguf file, or 'default'.")
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.")]
JsonPath = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the result as JSON to this file.", callback=writable),
]
Seed = Annotated[int, typer.Option(help="Random seed.")]
UnusedSeed = Annotated[int, typer.Option(help="Not used; every command takes it.")]
UnusedDevice = Annotated[str | None, typer.Option(help="Not used; every command takes it.")]
Device = Annotated[
    str | None,
    typer.Option(help="Device to run on: cpu, cuda, cuda:1, …", show_default="a GPU if any"),
]
Weights = Annotated[
    DType, typer.Option(help="Dtype of the weights; auto: float32 on a CPU, else as stored.")
]
Fast = Annotated[
    DType,
    typer.Option(
        help="Dtype to compute in; auto: on a CPU bfloat16 if it is fast there, else float32; on a"
        " GPU as stored."
    ),
]
