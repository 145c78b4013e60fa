"""Stages of sub-layers in vLLM's decoder layers. Only vLLM imports this module.

vLLM's layers pass on what was added last and the stream that it is still to be added to. While a
stage is open, that is its sum so far and the state x that its members read, so nothing else crosses
from layer to layer. A stage ends in one all-reduce: its members leave out their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)

from truedepth.engines.support import shares_queries
from truedepth.engines.vllm.fusing import Fused, Member, can_join
from truedepth.families.lookup import original_family
from truedepth.plan.plan import Plan
from truedepth.plan.stages import ATTENTION, Stage, home_of, parts_of, ranks_of, said, stage_of


class Part:
    """Sub-layers that read one state: one, or several that are fused."""

    begins = ends = True
    """Whether it is the first and the last part of its stage."""

    reduces = False
    """Whether the stage's sum is reduced at its end, instead of what each map writes."""

    ranks: int | None = None
    """The number of ranks that its stage is local to, if it is."""

    fused: Fused | None = None

    def __init__(self, members: Sequence[Member], norms: Sequence[Any] = ()) -> None:
        """Take its members, and the norms behind all sub-layers of its stage."""
        self.members, self.norm, self.norms = tuple(members), members[0].norm, tuple(norms)

    def normed(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What it reads, and the state x with what was added last."""
        if added is not None:
            if self.norm is not None:
                normed, x = self.norm(added, x)
                return normed, x
            x = x + added
        return (x if self.norm is None else self.norm(x)), x

    def state(self, x: Tensor, so_far: Tensor, multiplier: float = 1.0) -> Tensor:
        """What a part that does not begin its stage reads, `[tokens, hidden]`.

        Args:
            x: The state before the stage.
            so_far: What the stage has summed so far, as `__call__` takes it.
            multiplier: Of what sub-layers add to the stream.
        """
        if self.ranks is None:
            return x
        if not self.norms:
            return x + so_far * multiplier
        pairs = zip(self.norms, so_far, strict=False)  # of the sub-layers that ran
        local: Tensor = sum(norm(each) for norm, each in pairs) * self.ranks**-0.5
        return x + local

    def __call__(self, positions: Tensor, normed: Tensor, so_far: Tensor | None) -> Tensor:
        """The stage's sum, `[tokens, hidden]`, with what was summed so far.

        While a stage with norms behind its sub-layers is open, what each gave: `[sub-layers,
        tokens, hidden]`.
        """
        if self.fused is None:
            (member,) = self.members
            added: Tensor = member(positions, normed)
        else:
            added = self.fused(positions, normed, self.members)
        if self.norms:
            added = added[None] if so_far is None else torch.cat([so_far, added[None]])
        elif so_far is not None:
            added = so_far + added
        if self.ends and self.reduces:
            added = tensor_model_parallel_all_reduce(added)
        if self.ends and self.norms:
            pairs = zip(self.norms, added, strict=True)
            added = torch.stack([norm(each) for norm, each in pairs]).sum(0)
        return added


class Staged:
    """Mixed into a decoder layer that has a sub-layer in a stage of several."""

    parts: Sequence[Part]

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Called like a Llama layer of vLLM.

        Args:
            positions: `[tokens]`.
            hidden_states: What was added last, or the sum so far of an open stage; `[tokens,
                hidden]`.
            residual: What it is to be added to, `[tokens, hidden]`.
        """
        added, x = hidden_states, residual
        for part in self.parts:
            if not part.begins:
                assert x is not None
                added = part(positions, part.normed(part.state(x, added))[0], added)
                continue
            normed, x = part.normed(added) if x is None else part.normed(x, added)
            added = part(positions, normed, None)
        assert x is not None
        return added, x


class StagedStream(Staged):
    """The same for layers that pass on the stream alone, such as Granite's.

    While a stage is open, x and the sum so far cross as `[2, tokens, hidden]`.
    """

    residual_multiplier: float = 1.0

    def forward(  # type: ignore[override]
        self, positions: Tensor, hidden_states: Tensor, **_: Any
    ) -> Tensor:
        """Called like a Granite layer of vLLM."""
        x, so_far = hidden_states, None
        for part in self.parts:
            if not part.begins and so_far is None:
                x, so_far = hidden_states.unbind(0)
            state = x if so_far is None else part.state(x, so_far, self.residual_multiplier)
            so_far = part(positions, part.normed(state)[0], so_far)
            if part.ends:
                x, so_far = x + so_far * self.residual_multiplier, None
        return x if so_far is None else torch.stack([x, so_far])


def merge_stages(model: nn.Module, config: Any) -> None:
    """Let sub-layers of vLLM's layers read one state, in place.

    Args:
        model: vLLM's model without the head.
        config: The checkpoint's, whose `stages` say which.

    Raises:
        ValueError: Layers that a stage spans are in different processes of a pipeline, or are of a
            class that stages cannot run in, or stages are local to another number of ranks.
    """
    if config.stages and get_pp_group().world_size > 1:
        raise ValueError(
            "vLLM runs stages of sub-layers with tensor parallelism, not with pipeline parallelism"
        )
    check_local(config)
    layers: Any = model.layers
    for index in _touched(config):
        own = type(layers[index])
        passed = inspect.signature(own.forward).parameters
        if not {"positions", "hidden_states"} <= passed.keys():
            raise ValueError(
                f"vLLM's {own.__name__} is not called as other layers are, so truedepth cannot run"
                " stages in it; use transformers"
            )
        staged = Staged if "residual" in passed else StagedStream
        layers[index].__class__ = type(own.__name__, (staged, own), {"__module__": own.__module__})
    for names in config.stages or ():
        for which in stage_of(names):
            Member(layers, which, config.sublayers).give_parts()
    _arrange(layers, config, lambda stage: [(each,) for each in stage])


def check_local(config: Any) -> None:
    """Refuse stages that are local to another number of ranks, or in which ranks would share more.

    Raises:
        ValueError: There is one.
    """
    ranks = get_tensor_model_parallel_world_size()
    local = Plan(config.num_hidden_layers, stages=config.stages or ()).ranks
    if local is None:
        return
    if shares_queries(config):
        raise ValueError(
            "the queries of this model are normed over the heads of all ranks, which read different"
            " states in a local stage; vLLM does not run that, use transformers"
        )
    if local != ranks:
        raise ValueError(
            f"this model has stages that are local to {local} tensor-parallel ranks, not to"
            f" {ranks}; serve it with --tensor-parallel-size {local}"
        )


def check_alone(config: Any) -> None:
    """Refuse stages of several whole layers, whose attentions and FFNs read one state already.

    Those of one layer run as the layer does, with its own all-reduces. Local ones do, too: the FFN
    reads what the attention reads, not what its rank has written.

    Raises:
        ValueError: There is such a stage, or stages are local to another number of ranks.
    """
    for stage in map(stage_of, config.stages):
        if len({each.layer for each in stage}) > 1:
            raise ValueError(
                "vLLM's layers of this family do not share a stage, as those of"
                f" {said(stage)} do; use transformers"
            )
    check_local(config)


def fuse_stages(model: nn.Module, config: Any) -> None:
    """Fuse the merged stages of a model whose weights are loaded, in place.

    In float32 the logits stay within 1e-4. In other dtypes the maps are rounded once more, as those
    of wide layers are. Sub-layers alone stay as they are; vLLM has joined their maps.

    Args:
        model: vLLM's model without the head, with merged stages, before its maps are prepared.
        config: The checkpoint's.
    """
    layers: Any = model.layers

    def cut(stage: Stage) -> list[Stage]:
        if ranks_of(stage) is not None:  # each reads what those before it wrote
            return [(each,) for each in stage]
        own = [layers[each.layer].self_attn.attn for each in stage if each.kind == ATTENTION]
        return [stage] if len(own) < 2 or can_join(own) else parts_of(stage)

    _arrange(layers, config, cut)
    offset = original_family(config.to_dict(), type(model).__name__).gain_offset
    for index in _touched(config):
        layers[index].fused = nn.ModuleList()
        for part in layers[index].parts:
            if len(part.members) > 1:
                part.fused = Fused(part.members, offset)
                part.norm = part.fused.norm
                layers[index].fused.append(part.fused)


def _touched(config: Any) -> set[int]:
    """The layers that have a sub-layer in a merged stage."""
    return {each.layer for names in config.stages or () for each in stage_of(names)}


def _arrange(layers: Any, config: Any, cut: Callable[[Stage], Iterable[Stage]]) -> None:
    """Give each layer that has a sub-layer in a merged stage the parts that it runs."""
    found: dict[int, list[Part]] = {index: [] for index in _touched(config)}
    for stage in Plan(len(layers), stages=config.stages or ()).stages:
        if stage[0].layer not in found:
            continue
        parts = list(cut(stage))
        own = {each: Member(layers, each, config.sublayers) for each in stage}
        norms = [each.post_norm for each in own.values() if each.post_norm is not None]
        for members in parts:
            part = Part([own[each] for each in members], norms)
            part.begins, part.ends = members is parts[0], members is parts[-1]
            part.reduces, part.ranks = len(stage) > 1, ranks_of(stage)
            found[home_of(members)].append(part)
    for index, held in found.items():
        layers[index].parts = tuple(held)
