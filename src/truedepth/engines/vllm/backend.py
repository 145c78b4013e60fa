"""Stages in models for which vLLM has no classes of its own. Only vLLM imports this module.

vLLM runs these by transformers' code, of which it replaces attentions and linear maps. The layers
are then those of `modeling/stages.py`, and only what sums over ranks is vLLM's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)

from truedepth.engines.vllm.fusing import Member
from truedepth.engines.vllm.stages import check_local
from truedepth.modeling.stages import LocalStage, Stage
from truedepth.plan.stages import stage_of


class _Reduced:
    """Mixed into a stage, which then ends in one all-reduce of vLLM's."""

    class Ranks:
        """vLLM's tensor-parallel ranks."""

        get_local_rank = staticmethod(get_tensor_model_parallel_rank)

    @property
    def mesh(self) -> Any:
        """VLLM's ranks, if there are several."""
        return self.Ranks if get_tensor_model_parallel_world_size() > 1 else None

    def reduced(self, part: Tensor) -> Tensor:
        """The sum of all ranks' parts."""
        whole: Tensor = tensor_model_parallel_all_reduce(part)
        return whole


class VllmStage(_Reduced, Stage):
    """A stage that ends in one all-reduce of vLLM's."""


class VllmLocalStage(_Reduced, LocalStage):
    """Likewise, a rank-local one."""


def reduce_once(model: Any, config: Any) -> None:
    """Let every merged stage end in one all-reduce, in place.

    Args:
        model: transformers' model without the head, in which vLLM has replaced linear maps.
        config: The checkpoint's, whose `stages` say which sub-layers are merged.

    Raises:
        ValueError: Layers that a stage spans are in different processes of a pipeline, it is not
            known how their modules sum over ranks, or a stage is local to other ranks.
    """
    check_local(config)
    layers = model.get_decoder().layers
    for names in config.stages or ():
        for which in stage_of(names):
            Member(layers, which, config.sublayers).give_parts()
            for stage in layers[which.layer].stages:
                if isinstance(stage, LocalStage):
                    stage.__class__, stage.simulated = VllmLocalStage, None
                elif stage.is_merged:
                    stage.__class__ = VllmStage
