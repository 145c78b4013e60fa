"""A model and a plan -> a checkpoint on disk: plan, widen, write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from truedepth import __version__, modeling
from truedepth.checkpoint import atomic_directory, write_weights
from truedepth.errors import TruedepthError
from truedepth.plan import Plan
from truedepth.progress import progress_bar
from truedepth.report.card import model_card
from truedepth.sources import Source, open_source
from truedepth.tensors import LazyTensor
from truedepth.widen import widen


@dataclass(frozen=True)
class Conversion:
    """What `convert` did."""

    path: Path
    plan: Plan
    source: str
    origin: str
    size: int
    """Bytes of the weights."""


def convert(
    model: str | Path | Source,
    out: str | Path,
    plan: Plan,
    *,
    dtype: torch.dtype | None = None,
    shard_size: int | str = "5GB",
    force: bool = False,
) -> Conversion:
    """Write `model` under `plan` as a transformers checkpoint.

    The source is only read. Memory stays bounded: tensors are read and written in blocks of rows.

    Args:
        model: A directory, `.gguf` file, hub id, `default`, or an open source.
        out: Directory to write; appears when it is complete.
        plan: Which layers run together; for a model of this depth.
        dtype: Of the weights; by default as in the source, float32 for quantized GGUF files.
        shard_size: Most bytes a file of weights holds.
        force: Replace `out` if it exists.

    Raises:
        TruedepthError: The plan does not fit the model, or source or output cannot be used.
    """
    source = model if isinstance(model, Source) else open_source(model)
    out = Path(out).expanduser()
    if plan.num_layers != source.num_layers:
        raise TruedepthError(
            f"The plan is for {plan.num_layers} layers, but {source.name} has {source.num_layers}."
        )
    _check_apart(source.path, out)
    tensors = converted_tensors(source, plan, dtype)
    config = converted_config(source, plan, dtype)
    with atomic_directory(out, force) as partial:
        total = sum(tensor.nbytes for tensor in tensors.values())
        with progress_bar("Converting", total, unit="bytes") as advance:
            size = write_weights(partial, tensors, shard_size, advance)
        source.save_companions(partial)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")
        shutil.copyfile(modeling.__file__, partial / Path(modeling.__file__).name)
        (partial / "README.md").write_text(model_card(source, plan), encoding="utf-8")
    return Conversion(out, plan, source.name, source.origin, size)


def converted_tensors(
    source: Source, plan: Plan, dtype: torch.dtype | None = None
) -> dict[str, LazyTensor]:
    """The tensors of the converted model by name; layers in no group are the source's, renumbered.

    Raises:
        TruedepthError: A layer has tensors that cannot be widened exactly.
    """
    layers: list[dict[str, LazyTensor]] = [{} for _ in range(source.num_layers)]
    outside: dict[str, LazyTensor] = {}
    for name, tensor in source.tensors.items():
        layer, rest = source.family.split(name)
        if layer is None:
            outside[name] = tensor
        elif layer >= source.num_layers:
            raise TruedepthError(
                f"{source.path} has the tensor {name!r}, but config.json says {source.num_layers}"
                " layers."
            )
        elif rest not in source.family.obsolete:
            layers[layer][rest] = tensor

    if missing := [layer for layer, held in enumerate(layers) if not held]:
        raise TruedepthError(f"{source.path} has no tensors for layer {missing[0]}.")
    if source.config.get("tie_word_embeddings"):
        outside.pop("lm_head.weight", None)  # the embedding again; transformers ties it on loading
        needed = set(source.family.outside) - {"lm_head"}
    else:
        needed = set(source.family.outside)
    if lacking := sorted(name for name in needed if f"{name}.weight" not in outside):
        raise TruedepthError(f"{source.path} has no tensor '{lacking[0]}.weight'.")

    tensors = dict(outside)
    for index, group in enumerate(plan.groups):
        members = [layers[layer] for layer in group]
        try:
            wide = members[0] if len(group) == 1 else widen(source.family, members, dtype)
        except TruedepthError as error:
            raise TruedepthError(f"Layers {list(group)} cannot be joined: {error}") from error
        tensors |= {source.family.layer.format(index) + name: t for name, t in wide.items()}
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return tensors


def converted_config(
    source: Source, plan: Plan, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """config.json of the converted model."""
    config = dict(source.config)
    prefix = source.family.class_prefix
    config["model_type"] = f"{modeling.PREFIX.lower()}_{source.family.model_type}"
    config["architectures"] = [f"{modeling.PREFIX}{prefix}ForCausalLM"]
    config["auto_map"] = modeling.auto_map(prefix)
    config["num_hidden_layers"] = plan.effective_depth
    # Wide layers have more heads, so hidden_size / heads would no longer give this.
    if config.get("head_dim") is None:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    config["layer_widths"] = plan.widths
    config["truedepth"] = {
        "version": __version__,
        "source": source.name,
        "plan": plan.to_dict() | {"model": source.name},
        "calibration": None,
        "healing": None,
    }
    dtypes = {tensor.dtype for tensor in source.tensors.values()}
    dtype = dtype or (dtypes.pop() if len(dtypes) == 1 else None)
    config.pop("torch_dtype", None) if dtype else None
    if dtype:
        config["dtype"] = str(dtype).removeprefix("torch.")
    return config


def plan_of(config: Mapping[str, Any]) -> Plan | None:
    """The plan in a converted checkpoint's config.json; None for any other model."""
    made = config.get("truedepth")
    if not isinstance(made, dict) or "plan" not in made:
        return None
    return Plan.from_dict(made["plan"], "The plan in config.json")


def _check_apart(source: Path, out: Path) -> None:
    source, out = source.resolve(), out.resolve()
    if out == source or source in out.parents:
        raise TruedepthError(f"The output {out} is inside the source {source}; choose another.")
    if out in source.parents:
        raise TruedepthError(f"The output {out} contains the source {source}; choose another.")
