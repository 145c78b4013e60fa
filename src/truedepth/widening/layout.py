"""A model under a plan: what of it is which layer, computed once and carried.

`Layout(source, plan)` is a conversion that is not written yet; `Layout.of(checkpoint)` reads the
same from one that is. A group of a plan becomes one wide layer where its layers can be one. Where
they cannot, they keep their places and run side by side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from truedepth import modeling
from truedepth.errors import TruedepthError
from truedepth.families.family import KEY_VALUE, head_dim
from truedepth.families.lookup import CONVERTED, original_family, quantization_of
from truedepth.plan.config import GroupLayers, group_layers, plan_entries, plan_of
from truedepth.plan.plan import Plan
from truedepth.plan.stages import (
    KINDS,
    Segment,
    Stage,
    Sublayer,
    group_of,
    group_segment,
    is_of_whole_layers,
    said,
)
from truedepth.runtime.empty import empty_model, transformers_config
from truedepth.sources.parameters import parameters_of
from truedepth.sources.source import Source
from truedepth.tensors import LazyTensor, dtype_name
from truedepth.widening.widen import Layer, widen


class Layout:
    """A source under a plan. Nothing is read before it is asked for, and once."""

    def __init__(self, source: Source, plan: Plan, dtype: torch.dtype | None = None) -> None:
        """Lay out an original that is not converted yet.

        Args:
            source: The original.
            plan: Which of its layers run together.
            dtype: Dtype of the tensors; default: as in the source.

        Raises:
            TruedepthError: The plan is for another number of layers, or parts layers whose
                attention and FFN read one state.
        """
        if plan.num_layers != source.num_layers:
            raise TruedepthError(
                f"The plan is for {plan.num_layers} layers, but {source.name} has"
                f" {source.num_layers}."
            )
        self.source, self.plan, self._dtype = source, plan, dtype
        if dtype is not None or any(map(self.is_wide, plan.groups)):
            source.check_plain("which cannot be folded exactly")
        odd = next((each for each in plan.merged if not is_of_whole_layers(each)), None)
        if odd and self.is_parallel:
            raise TruedepthError(
                f"Sub-layers of {source.name} ({source.family.model_type}) cannot share the stage"
                f" {said(odd)}: attention and FFN of its layers read one state already, so a stage"
                " holds whole layers, such as [A2 F2] or [A2 F2 A3 F3]."
            )

    @classmethod
    def of(cls, checkpoint: Source) -> Layout:
        """The layout of a converted checkpoint by its config.json, or of an original as it is."""
        return _Written(checkpoint)

    @cached_property
    def layers(self) -> GroupLayers:
        """For each group its layers in the converted model."""
        found, depth = [], 0
        for group in self.plan.groups:
            size = 1 if self.is_wide(group) else len(group)
            found.append(tuple(range(depth, depth + size)))
            depth += size
        return tuple(found)

    @property
    def is_parallel(self) -> bool:
        """Whether attention and FFN of a layer read one state in the original already.

        A stage then holds whole layers; one of a single layer changes nothing but the all-reduces.
        """
        family = original_family(self.source.config, str(self.source.path))
        return family.is_parallel(self._original)

    @property
    def is_original(self) -> bool:
        """Whether the plan changes nothing of what the original computes."""
        return all(map(self.is_exact, self.plan.merged)) and not self.plan.paired_layers

    def is_exact(self, stage: Stage) -> bool:
        """Whether the sub-layers of a stage read one state in the original already."""
        layers = {each.layer for each in stage}
        return len(stage) == 1 or (self.is_parallel and len(layers) == 1)

    def why_not_wide(self, group: Sequence[int]) -> str:
        """Why a group does not become one wide layer, as the end of a sentence; "" if it does."""
        if (outer := self.source.outer) is not None and len(group) > 1:
            return f"they are inside a model that takes other input too ({outer.model_type})"
        return self.source.family.why_not_wide(self._original, group)

    def is_wide(self, group: Sequence[int]) -> bool:
        """Whether a group of two layers or more becomes one wide layer."""
        return len(group) > 1 and not self.why_not_wide(group)

    @property
    def executed_plan(self) -> Plan:
        """The plan as engines run it: layers that run side by side are by themselves."""
        pairs = zip(self.plan.groups, self.layers, strict=True)
        groups = [group for group, layers in pairs if len(layers) < len(group)]
        return Plan(self.plan.num_layers, groups, stages=self.plan.merged)

    @property
    def all_reduces(self) -> int:
        """All-reduces per token in the layers over several tensor-parallel ranks."""
        return self.executed_plan.all_reduces

    @property
    def shared_sublayers(self) -> tuple[Sublayer, ...]:
        """The converted model's sub-layers that share a stage which they do not share in the
        original, or stand for some that do.
        """
        pairs = zip(self.plan.groups, self.layers, strict=True)
        groups = (layers for group, layers in pairs if len(group) > 1)
        grouped = {Sublayer(layer, kind) for at in groups for layer in at for kind in KINDS}
        kept = self.kept_layers
        stages = (stage for stage in self.plan.merged if not self.is_exact(stage))
        merged = (each for stage in stages for each in stage)
        return tuple(sorted(grouped | {Sublayer(kept[each.layer], each.kind) for each in merged}))

    @property
    def kept_layers(self) -> dict[int, int]:
        """Layers that are the original's own, by their number there: where they are now."""
        return {
            member: layer
            for group, layers in zip(self.plan.groups, self.layers, strict=True)
            if len(group) == len(layers)
            for member, layer in zip(group, layers, strict=True)
        }

    def made_from(self, name: str) -> dict[str, LazyTensor]:
        """The original's tensors that a tensor of the converted model may be made from, by name.

        For one of a layer these are all tensors of the original layers that it stands for.
        """
        layer, _ = self.source.family.split(name)
        if layer is None:
            return {each: tensor for each, tensor in self._members[1].items() if each == name}
        pairs = zip(self.plan.groups, self.layers, strict=True)
        group, places = next(pair for pair in pairs if layer in pair[1])
        members = group if len(places) < len(group) else [group[places.index(layer)]]
        return {
            self.source.family.layer.format(member) + rest: tensor
            for member in members
            for rest, tensor in self._members[0][member].items()
        }

    @cached_property
    def _original(self) -> Any:
        """The original's config, an instance of transformers' class."""
        return transformers_config(self.source.config, self.source.path)

    @cached_property
    def _tied(self) -> bool:
        """Whether the output projection is the embedding.

        A config may say so while the file holds another projection; transformers then takes the
        file's.
        """
        if not self._original.tie_word_embeddings:
            return False
        head, embedding = (self.source.tensors.get(name) for name in self.source.family.tied)
        if head is None or embedding is None:
            return True
        return (head.shape, head.dtype) == (embedding.shape, embedding.dtype) and all(
            map(torch.equal, head.blocks(1 << 20), embedding.blocks(1 << 20))
        )

    @cached_property
    def _members(self) -> tuple[list[dict[str, LazyTensor]], dict[str, LazyTensor]]:
        """The tensors of every original layer by name within it, and those of no layer."""
        source = self.source
        layers: list[dict[str, LazyTensor]] = [{} for _ in range(source.num_layers)]
        outside: dict[str, LazyTensor] = {}
        for name, tensor in source.tensors.items():
            layer, rest = source.family.split(name)
            if layer is None:
                outside[name] = tensor
            elif layer >= source.num_layers:
                raise TruedepthError(
                    f"{source.path} has the tensor {name!r}, but its config says"
                    f" {source.num_layers} layers."
                )
            elif rest not in source.family.obsolete:
                layers[layer][rest] = tensor
        if missing := [layer for layer, held in enumerate(layers) if not held]:
            other = f"; its tensors have other names, such as {min(outside)!r}" if outside else ""
            other *= not any(layers)
            raise TruedepthError(f"{source.path} has no tensors for layer {missing[0]}{other}.")
        if self._tied:  # the embedding again; transformers ties it on loading
            outside.pop(source.family.tied[0], None)
        return layers, outside

    def wide_layer(self, group: Sequence[int], dtype: torch.dtype | None = None) -> Layer:
        """The tensors of the wide layer that a group becomes, by name within it.

        Args:
            group: Layers of the original, whether or not the plan groups them so.
            dtype: Dtype of the tensors; default: as in the source.

        Raises:
            TruedepthError: The layers cannot be widened exactly.
        """
        layers, _ = self._members
        members, sizes = [layers[layer] for layer in group], self._original.to_dict()
        try:
            return widen(self.source.family, members, dtype, sizes)
        except TruedepthError as error:
            raise TruedepthError(f"Layers {list(group)} cannot be joined: {error}") from error

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The plan's segments; where attention and FFN read one state, layers are not parted."""
        if not self.is_parallel:
            return self.plan.segments
        merged = {stage[0].layer: (stage,) for stage in self.plan.merged}
        inside = {each.layer for stage in self.plan.merged for each in stage[1:]} - merged.keys()
        return tuple(
            merged.get(group[0], group_segment(group))
            for group in self.plan.groups
            if group[0] not in inside
        )

    def is_merged(self, segment: Segment) -> bool:
        """Whether a segment becomes weights of its own: a wide layer, or a stage of several."""
        group = group_of(segment)
        return self.is_wide(group) if group else not self.is_exact(segment[0])

    def renamed(self, tensor: str) -> str:
        """The converted model's name for a tensor that has this name in the original.

        Those of a wide layer have the names of its first member.
        """
        layer, rest = self.source.family.split(tensor)
        for group, at in zip(self.plan.groups, self.layers, strict=True):
            if layer in group:
                return self.source.family.layer.format(at[group.index(layer)]) + rest
        return tensor

    @cached_property
    def tensors(self) -> Mapping[str, LazyTensor]:
        """The tensors of the converted model by name, computed when they are read.

        A group of one is that layer as it is, renumbered, and so are layers side by side.

        Raises:
            TruedepthError: A layer has tensors that cannot be widened exactly.
        """
        layers, tensors = self._members[0], dict(self._members[1])
        for group, places in zip(self.plan.groups, self.layers, strict=True):
            members: list[Layer] = [layers[layer] for layer in group]
            if len(places) < len(group):
                members = [self.wide_layer(group, self._dtype)]
            for index, member in zip(places, members, strict=True):
                prefix = self.source.family.layer.format(index)
                tensors |= {prefix + name: tensor for name, tensor in member.items()}
        if self._dtype is None:
            return tensors
        return {name: tensor.to(self._dtype) for name, tensor in tensors.items()}

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json of the converted model."""
        family, original = self.source.family, self._original
        config = {key: value for key, value in self.source.config.items() if key != "torch_dtype"}
        config["dtype"] = self._dtype_of_most()
        config["model_type"] = f"{CONVERTED}{family.model_type}"
        config["architectures"] = [f"{modeling.PREFIX}{family.classes[-1]}"]
        config["auto_map"] = modeling.auto_map(modeling.auto_classes(family.model_type))
        config["tie_word_embeddings"] = self._tied
        pairs = list(zip(self.plan.groups, self.layers, strict=True))
        config |= plan_entries(self.plan, self.layers)
        if "side_by_side" in config or "stages" in config:
            config["sublayers"] = family.layer_form(original)
        if "stages" in config:
            config["sublayers"]["writes"] = family.parts_of_sums
        # Of a wide layer these do not follow from the number of heads.
        config["head_dim"] = head_dim(original.to_dict())
        if key_value := getattr(original, KEY_VALUE, None):
            config[KEY_VALUE] = key_value
        for key in family.per_layer:
            if entries := getattr(original, key, None):
                config[key] = [entries[m] for group, at in pairs for m in group[: len(at)]]
        return config

    def _dtype_of_most(self) -> str:
        """The dtype of most of the weights, or the one that they had before they were quantized."""
        if quantization_of(self.source.config):
            said = self.source.config.get("dtype") or self.source.config.get("torch_dtype")
            return str(said or "bfloat16")
        bytes_by_dtype: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            bytes_by_dtype[tensor.dtype] += tensor.nbytes
        return dtype_name(bytes_by_dtype.most_common(1)[0][0])


class _Written(Layout):
    """A checkpoint as it is."""

    def __init__(self, checkpoint: Source) -> None:
        self.source = checkpoint
        self.plan = plan_of(checkpoint.config) or Plan(checkpoint.num_layers)

    @cached_property
    def layers(self) -> GroupLayers:
        return group_layers(self.source.config)

    @property
    def tensors(self) -> Mapping[str, LazyTensor]:
        return self.source.tensors

    @property
    def config(self) -> Mapping[str, Any]:
        return self.source.config


def check_loadable(
    config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], source: Path
) -> None:
    """The tensors must be those of the model that transformers will build from the config.

    What quantized weights consist of is not looked at.

    Raises:
        TruedepthError: They are not.
    """
    if quantization_of(config):
        return
    model = empty_model(config, source)
    tensors = parameters_of(model, tensors)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in model.all_tied_weights_keys:
        expected.pop(name)
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise TruedepthError(f"{source} has no tensor for {name!r}.")
        if name not in expected:
            raise TruedepthError(
                f"{source} contains the tensor {name!r}, which its config does not describe."
            )
        if expected[name] != tensors[name].shape:
            raise TruedepthError(
                f"{source} gives {name!r} the shape {list(tensors[name].shape)}, but its config"
                f" says {list(expected[name])}."
            )
