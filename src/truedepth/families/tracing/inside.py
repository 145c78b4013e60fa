"""The maps inside a sub-layer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from truedepth.families.tracing.records import CLOSE, Call, RanLayer, same_rows
from truedepth.modeling import KINDS, LayerForm


class Inside:
    """The maps inside a sub-layer that ran."""

    def __init__(self, layer: RanLayer, form: LayerForm, kind: str, reducers: set[str]) -> None:
        self._layer, self._form, self._kind = layer, form, kind
        name, norm, _ = getattr(form, kind)
        body = layer.module.get_submodule(name)
        self.is_mixture = any(parameter.ndim > 2 for parameter in body.parameters())
        called: list[Call] = []
        hooks = [
            each.register_forward_hook(functools.partial(self._keep, called, f"{name}.{inner}"))
            for inner, each in body.named_modules()
            if isinstance(each, nn.Linear)
        ]
        output = self._run()
        for hook in hooks:
            hook.remove()
        x = layer.x if norm is None else layer.module.get_submodule(norm)(layer.x)
        maps = [call for call in called if not self.is_mixture or call.name.count(".") > 1]
        self.reads = [c.name for c in maps if same_rows(c.read, x)]
        rest = [call for call in maps if call.name not in self.reads]
        self.writes = [call.name for call in rest if self._writes(call, x, output)]
        inner = dict(layer.module.named_modules())
        own = [each for each in sorted(reducers) if each.startswith(f"{name}.") and each in inner]
        self.summands = list(dict.fromkeys([*own, *self.writes]))
        if not self._run(without=self.summands).abs().max() <= CLOSE * output.abs().max():
            self.summands = []

    def _writes(self, call: Call, x: Tensor, output: Tensor) -> bool:
        """Whether a map gives what the module gives; in a mixture, what shared experts give."""
        if self.is_mixture:
            return call.gave.shape[-1] == x.shape[-1]
        return same_rows(call.gave, output)

    @staticmethod
    def _keep(called: list[Call], name: str, module: Any, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):  # routers may be subclasses that give several
            called.append(Call(name, args[0].clone(), output.clone()))

    @torch.no_grad()
    def _run(self, without: Sequence[str] = ()) -> Tensor:
        """What its module gives if these modules within it gave 0."""
        layer, hooks = self._layer, []
        for name in without:
            module = layer.module.get_submodule(name)
            hooks.append(module.register_forward_hook(lambda _, given, output: output * 0))
        args, call = (layer.args, layer.call) if self._kind == KINDS[0] else ((), {})
        output = self._form.output(layer.module, self._kind, layer.x, *args, **call)
        for hook in hooks:
            hook.remove()
        return output
