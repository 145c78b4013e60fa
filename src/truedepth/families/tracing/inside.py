"""The maps inside a sub-layer."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from truedepth.families.tracing.records import Call, RanLayer, same, same_rows
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
        if not self._is_sum(output):
            self.summands = []
            if self.is_mixture:
                self.writes = []

    def _is_sum(self, output: Tensor) -> bool:
        """Whether the module gives the sum of what its summands give, with nothing behind it."""
        scales = dict.fromkeys(self.summands, 0.0)
        alone = [self._run(scales | {name: 1.0}) for name in self.summands]
        doubled = self._run(dict.fromkeys(self.summands, 2.0))
        if not same(doubled, 2 * output):
            return False
        return bool(alone) and same(torch.stack(alone).sum(0), output)

    def _writes(self, call: Call, x: Tensor, output: Tensor) -> bool:
        """Whether a map gives what the module gives; in a mixture, what shared experts give."""
        if self.is_mixture:
            return call.gave.shape[-1] == x.shape[-1]
        return same_rows(call.gave, output)

    @staticmethod
    def _keep(called: list[Call], name: str, module: Any, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):  # routers may be subclasses that give several
            called.append(Call(name, args[0].clone(), output.clone()))

    @staticmethod
    def _scaled(scale: float, module: Any, args: Any, output: Tensor) -> Tensor:
        return output * scale

    @torch.no_grad()
    def _run(self, scales: Mapping[str, float] | None = None) -> Tensor:
        """What its module gives if modules within it gave so many times what they give."""
        layer, hooks = self._layer, []
        for name, scale in (scales or {}).items():
            module = layer.module.get_submodule(name)
            hooks.append(module.register_forward_hook(functools.partial(self._scaled, scale)))
        args, call = (layer.args, layer.call) if self._kind == KINDS[0] else ((), {})
        normed = self._form.normed(layer.module, self._kind, layer.x)
        output = self._form.output(layer.module, self._kind, normed, *args, **call)
        for hook in hooks:
            hook.remove()
        return output
