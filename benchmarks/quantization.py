"""What quantization does to a model and to its paired forms.

    python benchmarks/quantization.py --plan FILE [--plan FILE…] --calibration FILE
        [--calibration FILE…] --text FILE [--text FILE…] --directory DIR --json PATH
        [--types f16,q8_0,q4_0,q4_k_m,int8,int4] [--windows 16]

Every model is measured against the original in float32: the model as it is, each of its plans
calibrated, and, for comparison, the model with its norms' gains folded and nothing paired, and each
plan without calibration. GGUF's types run in llama.cpp; int8 and int4 are torchao's weight-only
types in transformers. `plain` rows are exported without balancing, `balanced` rows with it where
that is not the default, and `quantized first` rows are calibrated from and toward weights that had
been rounded to q4_0 before.

Rows that are already in the JSON file are not measured again, so the same command resumes. Needs
llama-cpp-python and torchao.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torchao.quantization import (
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)

import truedepth as td
from rows import LOSS, Rows, losses, parser_of
from truedepth.calibration.options import Calibration
from truedepth.checkpoint.writing import write_weights
from truedepth.engines.gguf.types import MatrixType
from truedepth.plan.config import plan_of
from truedepth.plan.plan import Plan
from truedepth.runtime.loading import Loaded
from truedepth.sources.source import Source
from truedepth.tensors import constant, scale_columns

PARTS = ("nll", *LOSS)
TORCHAO = {
    "int8": Int8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=getattr(torch, "int4"), granularity=PerGroup(32)),  # noqa: B009
}
SMALL = "q4_0"
"""The type in which the variants are compared."""


def main() -> None:
    """Measure row after row."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--plan", type=Path, action="append", required=True)
    parser.add_argument("--calibration", type=Path, action="append", required=True)
    parser.add_argument("--calibration-tokens", type=int, default=Calibration.tokens)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--types", default="f16,q8_0,q4_0,q4_k_m,int8,int4")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--directory", type=Path, required=True)
    given = parser.parse_args()
    given.directory.mkdir(parents=True, exist_ok=True)
    source = td.open_source(given.model)
    rows = Rows(given.json)
    original = td.load(source, dtype=torch.float32)
    types = given.types.split(",")
    for name, checkpoint, kind in jobs(source, given, types):
        if name in rows:
            continue
        variant = name.rpartition(", ")[2]
        balanced = {"plain": False, "balanced": True}.get(variant)
        model, size = quantized(checkpoint, kind, given.directory, balanced)
        lost = losses(model, original, given.text, given.windows, PARTS)
        rows[name] = {"bytes": size, **lost}
        rows.show(name)


def jobs(
    source: Source, given: argparse.Namespace, types: list[str]
) -> Iterator[tuple[str, Path, str]]:
    """Name, checkpoint and type of every row."""
    calibration = Calibration(text=given.calibration, tokens=given.calibration_tokens)
    depth = source.num_layers
    whole = checkpoint_of(source, given.directory / f"{depth}", Plan(depth))
    plans = [Plan.from_yaml(path) for path in given.plan]
    calibrated = {
        plan.effective_depth: checkpoint_of(
            source, given.directory / f"{plan.effective_depth}-calibrated", plan, calibration
        )
        for plan in plans
    }
    for size, checkpoint in {depth: whole, **calibrated}.items():
        for kind in ("f32", *types):
            yield f"{size}, {kind}", checkpoint, kind
        for kind in types:
            if kind not in ("f16", *TORCHAO):
                other = "plain" if MatrixType(kind).balanced else "balanced"
                yield f"{size}, {kind}, {other}", checkpoint, kind
    yield f"{depth}, gains folded, {SMALL}, plain", folded(source, whole, given.directory), SMALL
    for plan in plans:
        name = f"{plan.effective_depth}, not calibrated"
        checkpoint = checkpoint_of(source, given.directory / f"{plan.effective_depth}-raw", plan)
        yield f"{name}, f32", checkpoint, "f32"
        yield f"{name}, {SMALL}", checkpoint, SMALL
        yield f"{name}, {SMALL}, plain", checkpoint, SMALL
    first = rounded(source, whole, given.directory)
    for plan in plans:
        name = f"{plan.effective_depth}, quantized first"
        directory = given.directory / f"{plan.effective_depth}-quantized-first"
        yield f"{name}, {SMALL}", checkpoint_of(first, directory, plan, calibration), SMALL


def checkpoint_of(
    source: Source, path: Path, plan: Plan, calibration: Calibration | None = None
) -> Path:
    """Convert, unless the checkpoint exists already."""
    if not path.exists():
        td.convert(source, path, plan, calibration=calibration, dtype=torch.float32)
    if plan_of(td.open_source(path).config) != Plan(plan.num_layers, plan.groups):
        raise SystemExit(f"{path} was converted with another plan: give another --directory.")
    return path


def quantized(
    checkpoint: Path, kind: str, directory: Path, balanced: bool | None
) -> tuple[Loaded, int | None]:
    """A checkpoint in a type, loaded, and its size in bytes."""
    if kind == "f32":
        loaded = td.load(checkpoint, dtype=torch.float32)
        return loaded, sum(p.nbytes for p in loaded.model.parameters())
    if kind in TORCHAO:
        loaded = td.load(checkpoint, dtype=torch.float32)
        quantize_(loaded.model, TORCHAO[kind])
        return loaded, sum(held_bytes(p, kind) for p in loaded.model.parameters())
    out = directory / "quantized.gguf"
    if balanced is None:
        balanced = MatrixType(kind).balanced
    with patch.object(MatrixType, "balanced", balanced):
        done = td.export(checkpoint, out, type=kind, force=True)
    return td.load(out), done.size


def held_bytes(parameter: torch.Tensor, kind: str) -> int:
    """Bytes of a weight with its scales; int4 as if packed (torchao holds one byte each)."""
    if not hasattr(parameter, "__tensor_flatten__"):
        return parameter.nbytes
    parts = [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]
    packed = 2 if kind == "int4" else 1
    return sum(
        part.nbytes // (packed if part.shape == parameter.shape else 1)
        for part in parts
        if part is not None
    )


def folded(original: Source, whole: Path, directory: Path) -> Path:
    """The unpaired checkpoint with its gains in the matrices: exact, as in a group."""
    out = directory / "folded"
    if out.exists():
        return out
    source = td.open_source(whole)
    family = original.family
    tensors = dict(source.tensors)
    for layer in range(source.num_layers):
        prefix = family.layer.format(layer)
        for read in family.reads:
            norm = family.norm_before(read)
            gain = source.tensors[f"{prefix}{norm}.weight"]
            name = f"{prefix}{read}.weight"
            tensors[name] = scale_columns(source.tensors[name], gain)
            tensors[f"{prefix}{norm}.weight"] = constant(1.0, gain.shape[0], torch.float32)
    return rewritten(whole, out, tensors)


def rounded(source: Source, whole: Path, directory: Path) -> Source:
    """The original with weights rounded to the small type, as an ordinary checkpoint."""
    out = directory / "rounded"
    if not out.exists():
        td.export(whole, directory / "rounded.gguf", type=SMALL, force=True)
        tensors = td.open_source(directory / "rounded.gguf").tensors
        rewritten(whole, out, tensors)
        config = {**source.config, "tie_word_embeddings": "lm_head.weight" not in tensors}
        (out / "config.json").write_text(json.dumps(config))
    return td.open_source(out)


def rewritten(whole: Path, out: Path, tensors: Any) -> Path:
    """A copy of a checkpoint with other weights."""
    partial = out.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(whole, partial, ignore=shutil.ignore_patterns("*.safetensors"))
    write_weights(partial, tensors)
    partial.rename(out)
    return out


if __name__ == "__main__":
    main()
