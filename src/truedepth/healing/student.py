"""What a healing trains: a checkpoint, all of it or its wide layers, and the original beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from truedepth.errors import TruedepthError
from truedepth.families.family import Family
from truedepth.healing.options import Train
from truedepth.runtime.empty import filled_model
from truedepth.sources.source import Source
from truedepth.tensors import LazyTensor
from truedepth.widening.layout import Layout

LORA_DOWN, LORA_UP = "lora_A", "lora_B"  # peft's names


def student_of(
    source: Source, trained: Callable[[str], bool], dtype: torch.dtype
) -> PreTrainedModel:
    """A checkpoint to train: what is trained is float32, the rest in `dtype` and frozen.

    Args:
        source: The checkpoint.
        trained: Whether the parameter of that name is.
        dtype: Of the others.
    """

    def parameter(name: str, tensor: LazyTensor) -> nn.Parameter:
        if trained(name):
            return nn.Parameter(tensor.read().float().clone())
        return nn.Parameter(tensor.read().to(dtype), requires_grad=False)

    return filled_model(source, parameter)


def original_beside(
    student: PreTrainedModel,
    source: Source,
    layout: Layout,
    dtype: torch.dtype,
    shared: bool = True,
) -> PreTrainedModel:
    """The original, with the student's own parameters wherever these are frozen and the same.

    Args:
        student: What the plan made of the original.
        source: The original.
        layout: Of the student.
        dtype: Of parameters that are not shared.
        shared: False for a model of its own.
    """
    theirs: dict[str, nn.Parameter] = dict(student.named_parameters()) if shared else {}
    kept = layout.kept_layers

    def parameter(name: str, tensor: LazyTensor) -> nn.Parameter:
        layer, rest = source.family.split(name)
        value = tensor.read()
        if layer in kept:
            name = source.family.layer.format(kept[layer]) + rest
        twin = theirs.get(name) if layer is None or layer in kept else None
        if twin is not None and not twin.requires_grad and torch.equal(twin, value.to(twin.dtype)):
            return twin
        return nn.Parameter(value.to(dtype), requires_grad=False)

    return filled_model(source, parameter)


def is_trained(family: Family, layout: Layout, train: Train) -> Callable[[str], bool]:
    """Whether the parameter of that name is trained; with LoRA none of the checkpoint's own is."""
    paired = layout.paired_layers
    return lambda name: (
        train is Train.all or (train is Train.paired and family.split(name)[0] in paired)
    )


def add_lora(student: PreTrainedModel, family: Family, layout: Layout, rank: int) -> Any:
    """Low-rank additions to the linear maps of wide layers, in place.

    Returns:
        peft's configuration.

    Raises:
        TruedepthError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise TruedepthError("LoRA needs peft: `pip install truedepth[heal]`.") from error
    maps = "|".join(map(re.escape, (*family.reads, *family.writes)))
    paired = sorted(layout.paired_layers)
    layers = "|".join(re.escape(family.layer.format(index)) for index in paired)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=f"({layers})({maps})")
    inject_adapter_in_model(config, student)
    for name, parameter in student.named_parameters():
        added = LORA_DOWN in name or LORA_UP in name
        parameter.requires_grad_(added)
        if added:
            parameter.data = parameter.data.float()
    return config


def merged_tensors(
    trained: Mapping[str, Tensor], source: Source, lora: Any = None
) -> dict[str, Tensor]:
    """The checkpoint's tensors that training has changed, by name, float32.

    Args:
        trained: The trained parameters by name.
        source: The checkpoint that training began from.
        lora: peft's configuration, where low-rank additions were trained.
    """
    if lora is None:
        return dict(trained)
    found = {}
    for name, down in trained.items():
        if LORA_DOWN in name:
            up = trained[name.replace(LORA_DOWN, LORA_UP)]
            name = name.partition(f".{LORA_DOWN}")[0] + ".weight"
            found[name] = source.tensors[name].read().float() + lora.lora_alpha / lora.r * up @ down
    return found
