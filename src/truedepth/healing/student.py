"""The model that is trained, whole or where it is merged, and the original that shares with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from truedepth.errors import TruedepthError
from truedepth.families.family import Family
from truedepth.healing.options import Train
from truedepth.plan.stages import KINDS, Sublayer
from truedepth.runtime.empty import filled_model
from truedepth.sources.source import Source
from truedepth.tensors import LazyTensor
from truedepth.widening.layout import Layout

LORA_DOWN, LORA_UP = "lora_A", "lora_B"  # peft's names


def student_of(
    source: Source, trained: Callable[[str], bool], dtype: torch.dtype
) -> PreTrainedModel:
    """A checkpoint to train: trained parameters in float32, the others frozen in `dtype`.

    Args:
        source: The checkpoint.
        trained: Whether the parameter with a given name is trained.
        dtype: The dtype of the frozen parameters.
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
    """The original; it shares those parameters of the student that are frozen and equal.

    Args:
        student: The model to train, made from the original by a plan.
        source: The original.
        layout: The student's layout.
        dtype: The dtype of parameters that are not shared.
        shared: False to share none.
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
    """Whether the parameter of that name is trained; with LoRA, none of the checkpoint's is.

    The experts of a mixture, which few tokens run through, are trained with all weights only.
    """
    shares = shares_a_stage(family, layout)

    def paired(name: str) -> bool:
        return shares(name) and family.is_dense(family.split(name)[1])

    return lambda name: train is Train.all or (train is Train.paired and paired(name))


def shares_a_stage(family: Family, layout: Layout) -> Callable[[str], bool]:
    """Whether the module or tensor of that name is of a sub-layer that shares a stage.

    Those of wide layers do, and so do those of layers side by side.
    """
    sharing = set(layout.shared_sublayers)

    def shares(name: str) -> bool:
        layer, rest = family.split(name)
        return layer is not None and any(
            Sublayer(layer, kind) in sharing and family.part_of(kind, rest) for kind in KINDS
        )

    return shares


def add_lora(student: PreTrainedModel, family: Family, layout: Layout, rank: int) -> Any:
    """Add low-rank matrices to the linear maps of the sub-layers that share a stage, in place.

    Returns:
        peft's configuration.

    Raises:
        TruedepthError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise TruedepthError("LoRA needs peft: `pip install truedepth[heal]`.") from error
    maps, shares = (*family.reads, *family.writes), shares_a_stage(family, layout)
    names = [name for name, _ in student.named_modules() if family.split(name)[1] in maps]
    targets = "|".join(re.escape(name) for name in names if shares(name))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    inject_adapter_in_model(config, student)
    for name, parameter in student.named_parameters():
        added = LORA_DOWN in name or LORA_UP in name
        parameter.requires_grad_(added)
        if added:
            parameter.data = parameter.data.float()
    return config


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep only the layers' inputs for the backward pass, which computes the rest again."""
    older = model.gradient_checkpointing_enable  # its name in transformers before 5.23
    getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})


def compile_layers(model: PreTrainedModel, family: Family) -> None:
    """Compile every layer, in place, when it is first called.

    Layers share the code of their class, and torch gives up on code that it has compiled a few
    times. So its limit is raised: for each layer, once with gradients and once without.
    """
    layers = []
    for name, module in model.named_modules():
        number, inside = family.split(f"{name}.")
        if number is not None and not inside:
            layers.append(module)
    limits = torch._dynamo.config
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(limits, limit, getattr(limits, limit) + 2 * len(layers))
    for layer in layers:
        layer.compile()


def merged_tensors(
    trained: Mapping[str, Tensor], source: Source, lora: Any = None
) -> dict[str, Tensor]:
    """The tensors of the checkpoint that training changed, by name, in float32.

    Args:
        trained: The trained parameters by name.
        source: The checkpoint that training started from.
        lora: peft's configuration if LoRA was trained.
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


def save_adapter(trained: Mapping[str, Tensor], lora: Any, directory: Path) -> None:
    """Save the LoRA adapter, with the names that peft's `save_pretrained` gives."""
    held = {
        f"base_model.model.{name.replace('.default.', '.')}": value.contiguous()
        for name, value in trained.items()
    }
    save_file(held, directory / "adapter_model.safetensors")
    lora.save_pretrained(str(directory))
