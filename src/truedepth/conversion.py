"""A model and a plan -> a checkpoint on disk: plan, layout, calibration, writing."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from truedepth.calibration.options import Calibration
from truedepth.calibration.run import calibrated
from truedepth.checkpoint.card import model_card
from truedepth.checkpoint.records import CalibrationRecord
from truedepth.checkpoint.writing import write_checkpoint
from truedepth.errors import TruedepthError
from truedepth.files.atomic import beside, check_apart, check_output
from truedepth.options import Bounds, checked
from truedepth.plan.plan import Plan
from truedepth.runtime.empty import transformers_config
from truedepth.sources.opening import open_source
from truedepth.sources.source import Source
from truedepth.tensors import NotFiniteError, dtype_name, first_not_finite
from truedepth.version import __version__
from truedepth.widening.layout import Layout, check_loadable
from truedepth.widening.padding import check_local, head_padding, padded


@dataclass(frozen=True)
class Conversion:
    """What `convert` did."""

    path: Path
    plan: Plan
    source: str
    origin: str
    size: int
    """Size of the weights, bytes."""

    executed_plan: Plan
    """The plan as engines run it: layers that run side by side are by themselves."""

    quantization: str | None = None
    """How the source was quantized, if it was: its weights were dequantized."""

    calibration: CalibrationRecord | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "path": str(self.path),
            "source": self.source,
            "origin": self.origin,
            "size": self.size,
            "quantization": self.quantization,
            "plan": self.plan.to_dict(),
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "effective_depth": self.plan.effective_depth,
            "paired_layers": self.plan.paired_layers,
            "all_reduces_per_token": {
                "original": self.plan.unpaired.all_reduces,
                "converted": self.executed_plan.all_reduces,
            },
        }


@checked
def convert(
    model: str | Path | Source,
    out: str | Path,
    plan: Plan,
    *,
    calibration: Calibration | None = None,
    dtype: torch.dtype | None = None,
    pad_heads: Annotated[int, Bounds(1)] = 1,
    shard_size: int | str = "5GB",
    force: bool = False,
) -> Conversion:
    """Write `model` under `plan` as a transformers checkpoint.

    The source is only read. Memory stays bounded: tensors are read and written in blocks of rows.
    An interrupted calibration keeps the layers that it has refitted beside `out`, and the same call
    resumes after them.

    Args:
        model: A directory, `.gguf` file, hub id, `default`, or an open source.
        out: Directory to write; appears when it is complete.
        plan: Which layers run together; for a model of this depth.
        calibration: Refit what is merged on this text; by default it is exact.
        dtype: Dtype of the written weights. Default: as in the source, float32 for quantized GGUF
            files.
        pad_heads: Add heads of zeros until the head counts divide by this number of ranks.
        shard_size: Largest size of a weights file: a number of bytes, or such as `5GB`.
        force: Replace `out` if it exists.

    Raises:
        TruedepthError: The plan does not fit the model, or source or output cannot be used.
    """
    source = open_source(model)
    out = Path(out).expanduser().resolve()
    check_conversion(source, out, force)
    if calibration is not None:
        source.check_plain("which cannot be refitted")
    source = padded(source, pad_heads)
    check_local(source, plan.ranks)
    layout = Layout(source, plan, dtype)
    tensors, config = dict(layout.tensors), dict(layout.config)
    made: dict[str, Any] = {
        "version": __version__,
        "source": source.name,
        "plan": plan.to_dict() | {"model": source.name},
        "calibration": None,
        "healing": None,
    }
    config["truedepth"] = made
    check_loadable(config, tensors, source.path)
    kept = record = None
    with ExitStack() as stack:
        if calibration is not None and not layout.is_original:
            kept = beside(out, "calibration")
            refitted = stack.enter_context(calibrated(layout, kept, calibration))
            tensors |= {name: t.to(tensors[name].dtype) for name, t in refitted.tensors.items()}
            record = refitted.record
            made["calibration"] = record.to_dict()
        if source.outer is not None:
            config, tensors = source.outer.with_inside(config, tensors, dtype)
            transformers_config(config, source.path)
        card = model_card(source, plan, layout.all_reduces, record)
        try:
            size = write_checkpoint(out, source, config, tensors, card, shard_size, force, kept)
        except NotFiniteError as error:
            raise _why_not_finite(error, layout, tensors[error.name].dtype) from error
    return Conversion(
        path=out,
        plan=plan,
        source=source.name,
        origin=source.origin,
        size=size,
        executed_plan=layout.executed_plan,
        quantization=source.quantization,
        calibration=record,
    )


def _why_not_finite(error: NotFiniteError, layout: Layout, dtype: torch.dtype) -> TruedepthError:
    """The exception for a weight that cannot be written.

    Args:
        error: Where NaN or an infinity was found.
        layout: The conversion's layout.
        dtype: The dtype that the tensor was to be written in.
    """
    where = layout.source.path
    for name, tensor in layout.made_from(error.name).items():
        if (found := first_not_finite(name, tensor)) is not None:
            return TruedepthError(
                f"{where} cannot be converted: its {name!r} holds {found.value} in row {found.row}."
            )
    way_out = "no dtype holds it"
    if dtype is torch.float16:
        way_out = "write it with --dtype bfloat16 or --dtype float32 (dtype=torch.bfloat16)"
    return TruedepthError(
        f"{error.name!r} of the converted model would hold {error.value} in row {error.row}, from a"
        f" value beyond the {torch.finfo(dtype).max:g} of {dtype_name(dtype)}; {way_out}."
    )


def check_conversion(source: Source, out: str | Path, force: bool, pad_heads: int = 1) -> None:
    """What can be refused is refused before weights are downloaded or a plan is searched.

    Raises:
        TruedepthError: The family is not supported, the model cannot be padded so, a file that goes
            along cannot be copied, or `out` cannot be written to.
    """
    out = Path(out).expanduser().resolve()
    source.family  # noqa: B018
    head_padding(source.config, pad_heads)
    check_apart(source.path, out)
    check_output(out, force)
    source.check_companions()


def calibrate(
    model: str | Path | Source,
    out: str | Path,
    plan: Plan,
    calibration: Calibration | None = None,
    **options: Any,
) -> Conversion:
    """`convert` with what is merged refitted to the original; `options` are those of `convert`."""
    return convert(model, out, plan, calibration=calibration or Calibration(), **options)
