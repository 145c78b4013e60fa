"""The front of a student and its original: layers that are the same, and computed once for both."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from truedepth.families.family import Family
from truedepth.widening.layout import Layout


def front_of(
    student: PreTrainedModel, original: PreTrainedModel, family: Family, layout: Layout
) -> int:
    """How many layers, from the first one on, compute the same in both, from the same tensors.

    Args:
        student: The model to train.
        original: The original, as `student.original_beside` gives it: what is frozen and the same
            in both are the same tensors.
        family: The original's family.
        layout: The student's layout.
    """
    sharing = {each.layer for each in layout.shared_sublayers}
    count = 0
    while layout.kept_layers.get(count) == count and count not in sharing:
        count += 1
    theirs = dict(student.named_parameters())
    for name, parameter in original.named_parameters():
        layer, _ = family.split(name)
        if theirs.get(name) is not parameter:
            count = min(count, layer or 0)
    return count


def share_front(
    student: PreTrainedModel, original: PreTrainedModel, family: Family, layout: Layout
) -> None:
    """Let the original begin behind the front, with the student's stream there, in place.

    The front's layers pass on what they are given. So from now on the original can only be run on
    windows that the student was run on just before, unless there is no front.

    Args:
        student: The model to train.
        original: The original, as `student.original_beside` gives it.
        family: The original's family.
        layout: The student's layout.
    """
    count = front_of(student, original, family, layout)
    if not count:
        return
    streams: list[Tensor] = []

    def layer(model: PreTrainedModel, number: int) -> nn.Module:
        found: nn.Module = model.get_submodule(family.layer.format(number).rstrip("."))
        return found

    def keep(_: nn.Module, __: Any, stream: Tensor) -> None:
        streams[:] = [stream.detach()]

    def pass_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    def go_on(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return (streams[0], *given[1:]), named

    for number in range(count):
        layer(original, number).forward = pass_on
    layer(student, count - 1).register_forward_hook(keep)
    layer(original, count).register_forward_pre_hook(go_on, with_kwargs=True)
