"""Fuses the stages of a loaded model, for inference: the same function in fewer kernels.

    y = x + W_out [f_1(W_1 x̂), f_2(W_2 x̂), …]

The sub-layers of a stage read one state x. Where their norms are x̂ ⊙ g_s + b_s, g_s and b_s fold
into the maps that read, as in a wide layer (`widening/widen.py`): one norm and one product serve
all of them, and their outputs are joined before one product for the maps that write. A sub-layer
alone keeps its norm; its maps are joined in the same way.

The attention and FFN modules stay, and with them all that transformers does with heads, caches and
masks: in the place of each map that reads they have a `Slice` of the product.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from truedepth.errors import TruedepthError
from truedepth.families.family import Family, SublayerNames
from truedepth.families.lookup import original_family
from truedepth.modeling import text_config
from truedepth.plan.plan import Plan
from truedepth.plan.stages import (
    ATTENTION,
    KINDS,
    Kind,
    Stage,
    Sublayer,
    home_of,
    parts_of,
    ranks_of,
    stage_of,
    whole_layer,
)

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model) -> Model:
    """Fuse the stages of a model, in place, for inference.

    Works on originals and on converted checkpoints, in one process and tensor-parallel over
    several. In float32 the logits stay within 1e-4. In other dtypes the maps of merged stages are
    rounded once more, as those of wide layers are.

    Args:
        model: A model of transformers with all its weights, as `load` and `from_pretrained` give
            it. Its maps are replaced: it can no longer be trained, quantized or saved.

    Returns:
        The model.

    Raises:
        TruedepthError: Layers have norms behind their sub-layers or run side by side, or maps are
            quantized, adapted, or packed and sharded; the model is as it was.
    """
    whole: Any = model
    config = text_config(whole.config)
    name = type(model).__name__
    family = original_family(config.to_dict(), name)
    layers = whole.get_decoder().base_model.layers
    if isinstance(layers[0], FusedLayer):
        return model
    members = {
        Sublayer(index, kind): _Member(family, layer, kind)
        for index, layer in enumerate(layers)
        for kind in KINDS
    }
    if why_not := _why_not(family, whole.config, members.values()):
        raise TruedepthError(f"The stages of {name} cannot be fused: {why_not}.")
    parts: list[list[FusedPart]] = [[] for _ in layers]
    for stage in _stages(family, whole.config, len(layers)):
        is_local = ranks_of(stage) is not None
        cut = parts_of(stage)
        if is_local and not family.is_parallel(config):  # each reads what those before it wrote
            cut = [(each,) for each in stage]
        for inside in cut:
            fused = FusedPart([members[each] for each in inside])
            fused.begins, fused.ends = inside is cut[0], inside is cut[-1]
            fused.is_local = is_local
            parts[home_of(inside)].append(fused)
    for layer, own in zip(layers, parts, strict=True):
        kind = type(layer)
        layer.__class__ = type(kind.__name__, (FusedLayer, kind), {"__module__": kind.__module__})
        layer.parts = nn.ModuleList(own)
    whole.save_pretrained = _refuse_to_save
    return model


def _refuse_to_save(*arguments: object, **options: object) -> None:
    raise TruedepthError(
        "A model whose stages are fused is for inference and cannot be saved; save it before."
    )


def _stages(family: Family, config: Any, layers: int) -> Sequence[Stage]:
    """The stages of a loaded model, by the numbers of its own layers (a wide layer is one)."""
    stages = list(map(stage_of, getattr(config, "stages", None) or ()))
    if family.is_parallel(text_config(config)):
        inside = {each.layer for stage in stages for each in stage}
        alone = (layer for layer in range(layers) if layer not in inside)
        stages += map(whole_layer, alone)
    return Plan(layers, stages=stages).stages


def _why_not(family: Family, config: Any, members: Iterable[_Member]) -> str:
    """Why a model's stages cannot be fused, as the end of a sentence; "" if they can."""
    if family.side_by_side_only or getattr(config, "side_by_side", None):
        return family.side_by_side_only or "some of its layers run side by side"
    if getattr(config, "simulate_ranks", None):
        return "this process simulates the ranks of its local stages"
    for member in members:
        for name in (*member.reads, member.writes):
            linear = member.layer.get_submodule(name)
            if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
                return f"{name} is a {type(linear).__name__}; fuse before quantizing or adapting"
            if isinstance(linear.weight, DTensor) and name in family.packed:
                return f"transformers shards {name}, which packs several maps, in another way"
    return ""


@dataclass(frozen=True)
class _Member:
    """A sub-layer with its weights."""

    family: Family
    layer: Any
    kind: Kind

    @property
    def names(self) -> SublayerNames:
        names: SublayerNames = getattr(self.family, self.kind)
        return names

    @property
    def module(self) -> nn.Module:
        """The attention or FFN."""
        module: nn.Module = self.layer.get_submodule(self.names.module)
        return module

    @property
    def norm(self) -> Any:
        """The norm before it."""
        return self.layer.get_submodule(self.names.norm)

    @property
    def reads(self) -> list[str]:
        """Names of its maps that read."""
        return [name for name in self.family.reads if self.family.part_of(self.kind, name)]

    @property
    def writes(self) -> str:
        """The name of its map that writes."""
        return self.family.writes[KINDS.index(self.kind)]


class Slice(nn.Module):
    """In the place of a map that reads: its rows of the product of all of them."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, product: Tensor) -> Tensor:
        """`[…, all rows]` to `[…, rows]`."""
        return product[..., self.start : self.stop]


class FusedPart(nn.Module):
    """Sub-layers that read one state, with at most one attention among them.

    Under tensor parallelism it holds a rank's shards, and gives a rank's part of the sum.
    """

    begins = ends = True
    """Whether it is the first and the last part of its stage."""

    is_local = False
    """Whether it reads what its rank has written in its stage, too."""

    def __init__(self, members: Sequence[_Member]) -> None:
        super().__init__()
        family, layer = members[0].family, members[0].layer
        norms = {id(each.norm): each.norm for each in members}
        folded = len(norms) > 1
        self.norm = unit_norm(members[0].norm, family.gain_offset) if folded else members[0].norm
        shard = layer.get_submodule(members[0].writes).weight
        self.group = shard.device_mesh.get_group() if isinstance(shard, DTensor) else None
        self.scale = getattr(layer, family.multiplier) if family.multiplier else None
        # a tuple, so that they do not become submodules of two modules
        self.members = tuple((each.module, each.kind == ATTENTION) for each in members)
        weights, biases, start = [], [], 0
        for each in members:
            for name in each.reads:
                weight, bias = _local(each.layer.get_submodule(name))
                if folded:
                    weight, bias = fold(weight, bias, each.norm, family.gain_offset)
                weights.append(weight)
                biases.append(bias)
                each.layer.set_submodule(name, Slice(start, start := start + len(weight)))
        self.read = _linear(torch.cat(weights), join_biases(biases, weights))
        weights, total = [], None
        for each in members:
            weight, bias = _local(each.layer.get_submodule(each.writes))
            weights.append(weight)
            if bias is not None:
                total = bias if total is None else total + bias
            each.layer.set_submodule(each.writes, nn.Identity())
        if self.group is not None and dist.get_rank(self.group):
            total = None  # once in the sum
        self.write = _linear(torch.cat(weights, 1), total)

    def forward(self, x: Tensor, *args: Any, **call: Any) -> Tensor:
        """What it adds to the state `[batch, length, hidden]`, of the same shape.

        Args:
            x: The state.
            args: Positional arguments for the attention.
            call: Its keyword arguments.
        """
        product = self.read(self.norm(x))
        features = [
            module(product, *args, **call)[0] if attends else module(product)
            for module, attends in self.members
        ]
        added: Tensor = self.write(torch.cat(features, -1) if len(features) > 1 else features[0])
        return added if self.scale is None else added * self.scale


class FusedLayer:
    """Mixed into a decoder layer: runs its parts of stages instead of its sub-layers.

    An FFN whose stage goes on with the next attention runs there. If a stage is open at a layer's
    end, the layer passes on x and the sum so far, `[2, batch, length, hidden]`.
    """

    parts: nn.ModuleList

    def forward(self, hidden_states: Tensor, *args: Any, **call: Any) -> Tensor:
        """From the stream, or x and a sum, to the stream, or x and a sum."""
        x, so_far = hidden_states, None
        for part in self.parts:
            if not part.begins and so_far is None:
                x, so_far = hidden_states.unbind(0)
            state = x + so_far if part.is_local and so_far is not None else x
            added = part(state, *args, **call)
            so_far = added if so_far is None else so_far + added
            if part.ends:
                if part.group is not None:
                    dist.all_reduce(so_far, group=part.group)
                x, so_far = x + so_far, None
        return x if so_far is None else torch.stack([x, so_far])


def unit_norm(norm: Any, gain_offset: float) -> Any:
    """A norm of gain 1 and without a bias."""
    unit = copy.deepcopy(norm).requires_grad_(False)
    unit.weight.fill_(1 - gain_offset)
    if getattr(unit, "bias", None) is not None:
        unit.bias.zero_()
    return unit


def _local(linear: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a map; of a sharded map, this rank's."""
    weight, bias = (
        each.to_local() if isinstance(each, DTensor) else each
        for each in (linear.weight, linear.bias)
    )
    return weight.detach(), None if bias is None else bias.detach()


def fold(
    weight: Tensor, bias: Tensor | None, norm: Any, gain_offset: float
) -> tuple[Tensor, Tensor | None]:
    """`W diag(g)` and `W b + bias` for a norm with gain g and bias b."""
    wide = weight.float()
    if (shift := getattr(norm, "bias", None)) is not None:
        moved = wide @ shift.detach().float()
        bias = (moved if bias is None else bias.float() + moved).to(weight.dtype)
    return (wide * (norm.weight.detach().float() + gain_offset)).to(weight.dtype), bias


def join_biases(biases: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor | None:
    """The biases of maps under one another, with zeros for maps that have none."""
    if all(bias is None for bias in biases):
        return None
    pairs = zip(biases, weights, strict=True)
    return torch.cat([w.new_zeros(len(w)) if b is None else b for b, w in pairs])


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A map of given weights `[out, in]`, for inference."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
