"""A model and a plan -> a checkpoint on disk: plan, widen, write."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from truedepth import __version__, modeling
from truedepth.calibration_run import Calibration, calibrated
from truedepth.card import model_card
from truedepth.checkpoint import atomic_directory, check_output, write_weights
from truedepth.errors import TruedepthError
from truedepth.loading import empty_model
from truedepth.plan import Plan
from truedepth.progress import progress_bar
from truedepth.sources import Source, open_source
from truedepth.tensors import LazyTensor, dtype_name
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

    calibration: dict[str, Any] | None = None
    """What was calibrated on, and what it gained on held-out windows."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "path": str(self.path),
            "source": self.source,
            "origin": self.origin,
            "size": self.size,
            "plan": self.plan.to_dict(),
            "calibration": self.calibration,
            "effective_depth": self.plan.effective_depth,
            "paired_layers": self.plan.paired_layers,
            "all_reduces_per_token": {
                "original": self.plan.unpaired.all_reduces_per_token(2),
                "converted": self.plan.all_reduces_per_token(2),
            },
        }


def convert(
    model: str | Path | Source,
    out: str | Path,
    plan: Plan,
    *,
    calibration: Calibration | None = None,
    dtype: torch.dtype | None = None,
    shard_size: int | str = "5GB",
    force: bool = False,
) -> Conversion:
    """Write `model` under `plan` as a transformers checkpoint.

    The source is only read. Memory stays bounded: tensors are read and written in blocks of rows.
    An interrupted calibration keeps the layers that it has refitted beside `out`, and the same call
    goes on after them.

    Args:
        model: A directory, `.gguf` file, hub id, `default`, or an open source.
        out: Directory to write; appears when it is complete.
        plan: Which layers run together; for a model of this depth.
        calibration: Refit the wide layers on this text; by default they are exact.
        dtype: Of the weights; by default as in the source, float32 for quantized GGUF files.
        shard_size: Most bytes a file of weights holds, as a number or such as `"5GB"`.
        force: Replace `out` if it exists.

    Raises:
        TruedepthError: The plan does not fit the model, or source or output cannot be used.
    """
    source = open_source(model)
    out = Path(out).expanduser().resolve()
    if plan.num_layers != source.num_layers:
        raise TruedepthError(
            f"The plan is for {plan.num_layers} layers, but {source.name} has {source.num_layers}."
        )
    # What can be refused is refused before a hub model's weights are downloaded.
    source.family  # noqa: B018
    _check_apart(source.path, out)
    check_output(out, force)
    tensors = converted_tensors(source, plan, dtype)
    config = converted_config(source, plan, tensors)
    _check_loadable(config, tensors, source.path)
    kept = out.with_name(f".{out.name}.calibration")
    if calibration is not None and plan.paired_layers:
        exact = converted_tensors(source, plan, torch.float32)
        refitted = calibrated(source, plan, config, exact, kept, calibration)
        tensors |= {name: t.to(tensors[name].dtype) for name, t in refitted.tensors.items()}
        config["truedepth"]["calibration"] = refitted.record
    with atomic_directory(out, force) as partial:
        total = sum(tensor.nbytes for tensor in tensors.values())
        with progress_bar("Converting", total, unit="bytes") as advance:
            size = write_weights(partial, tensors, shard_size, advance)
        source.save_companions(partial)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")
        shutil.copyfile(modeling.__file__, partial / Path(modeling.__file__).name)
        card = model_card(source, plan, config["truedepth"]["calibration"])
        (partial / "README.md").write_text(card, encoding="utf-8")
    if calibration is not None:
        shutil.rmtree(kept, ignore_errors=True)
    record = config["truedepth"]["calibration"]
    return Conversion(out, plan, source.name, source.origin, size, record)


def calibrate(
    model: str | Path | Source,
    out: str | Path,
    plan: Plan,
    calibration: Calibration | None = None,
    **options: Any,
) -> Conversion:
    """`convert` with the wide layers refitted to the original; `options` are those of `convert`."""
    return convert(model, out, plan, calibration=calibration or Calibration(), **options)


def converted_tensors(
    source: Source, plan: Plan, dtype: torch.dtype | None = None
) -> dict[str, LazyTensor]:
    """The tensors of the converted model by name; layers in no group are the source's, renumbered.

    Raises:
        TruedepthError: A layer has tensors that cannot be widened exactly.
    """
    layers: list[dict[str, LazyTensor]] = [{} for _ in range(source.num_layers)]
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in source.tensors.items():
        layer, rest = source.family.split(name)
        if layer is None:
            tensors[name] = tensor
        elif layer >= source.num_layers:
            raise TruedepthError(
                f"{source.path} has the tensor {name!r}, but its config says {source.num_layers}"
                " layers."
            )
        elif rest not in source.family.obsolete:
            layers[layer][rest] = tensor
    if missing := [layer for layer, held in enumerate(layers) if not held]:
        raise TruedepthError(f"{source.path} has no tensors for layer {missing[0]}.")
    if _tied(source):
        tensors.pop("lm_head.weight", None)  # the embedding again; transformers ties it on loading

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
    source: Source, plan: Plan, tensors: Mapping[str, LazyTensor]
) -> dict[str, Any]:
    """config.json of the converted model, whose tensors are `tensors`."""
    prefix = source.family.class_prefix
    config = {key: value for key, value in source.config.items() if key != "torch_dtype"}
    bytes_by_dtype: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        bytes_by_dtype[tensor.dtype] += tensor.nbytes
    config["dtype"] = dtype_name(bytes_by_dtype.most_common(1)[0][0])
    config["model_type"] = f"{modeling.PREFIX.lower()}_{source.family.model_type}"
    config["architectures"] = [f"{modeling.PREFIX}{prefix}ForCausalLM"]
    config["auto_map"] = modeling.auto_map(prefix)
    config["tie_word_embeddings"] = _tied(source)
    config["num_hidden_layers"] = plan.effective_depth
    config["layer_widths"] = plan.widths
    config["truedepth"] = {
        "version": __version__,
        "source": source.name,
        "plan": plan.to_dict() | {"model": source.name},
        "calibration": None,
        "healing": None,
    }
    return config


def plan_of(config: Mapping[str, Any]) -> Plan | None:
    """The plan of a converted checkpoint, from its config.json; None for any other model."""
    widths = config.get("layer_widths")
    if not isinstance(widths, list) or not all(type(width) is int for width in widths):
        return None
    layers = iter(range(sum(widths)))
    return Plan(sum(widths), [[next(layers) for _ in range(width)] for width in widths])


def _tied(source: Source) -> bool:
    """Whether the output projection is the embedding.

    A config may say so while the file holds another projection; transformers then takes the file's.
    """
    if not source.config.get("tie_word_embeddings"):
        return False
    head, embedding = (source.tensors.get(name) for name in source.family.tied)
    if head is None or embedding is None:
        return True
    return (head.shape, head.dtype) == (embedding.shape, embedding.dtype) and all(
        map(torch.equal, head.blocks(1 << 20), embedding.blocks(1 << 20))
    )


def _check_loadable(
    config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], source: Path
) -> None:
    """The tensors must be those of the model that transformers will build from the config."""
    model = empty_model(config, source)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in model.all_tied_weights_keys:
        expected.pop(name)
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise TruedepthError(f"{source} has no tensor for {name!r}.")
        if name not in expected:
            raise TruedepthError(f"{source} gives the tensor {name!r}, which its model has not.")
        if expected[name] != tensors[name].shape:
            raise TruedepthError(
                f"{source} gives {name!r} the shape {list(tensors[name].shape)}, but its config"
                f" says {list(expected[name])}."
            )


def _check_apart(source: Path, out: Path) -> None:
    """Neither may contain the other, also where the source is made of links."""
    links = list(source.iterdir()) if source.is_dir() else []
    for place in {source.resolve(), *(link.resolve() for link in links)}:
        if out == place or out in place.parents:
            raise TruedepthError(f"The output {out} contains the source {place}; choose another.")
    if source.is_dir() and source.resolve() in out.parents:
        raise TruedepthError(f"The output {out} is inside the source {source}; choose another.")
