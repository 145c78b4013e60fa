"""Finds out what the layers of any decoder of transformers are made of, by running a small one.

A random model with the config's structure and small sizes is run once. What enters and leaves the
modules of its layers shows whether a layer is

    x ← x + A(N x)        x ← x + F(N' x)

with norms before, behind or on both sides, and what A and F are called. This is then checked: the
sub-layers found, run one by one, must give what the model's own layers give.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from truedepth.errors import TruedepthError, reason_of
from truedepth.families.family import Family, SublayerNames
from truedepth.families.tracing.inside import Inside
from truedepth.families.tracing.records import CLOSE, Call, RanLayer, same, tensor_of
from truedepth.families.tracing.small_model import layers_of, random_model, small_config
from truedepth.modeling import KINDS, LayerForm, run_sublayer

REDUCING = ("rowwise", "rowwise_rep", "rowwise_split_input", "moe_tp_experts")
"""transformers' tensor-parallel styles that end in a sum over ranks."""

LENGTH = 12
"""Tokens that the small model is run on: more than its windows."""


def traced_family(config: Mapping[str, Any]) -> Family:
    """The family of a config.json that no file of this folder describes.

    Raises:
        TruedepthError: transformers cannot build such a model, or its layers compute something
            else; the message ends a sentence that begins with the model's name.
    """
    return _traced(json.dumps(small_config(config), sort_keys=True, default=str))


@functools.cache
def _traced(small: str) -> Family:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = random_model(json.loads(small))
        return _Trace(model).family()


class _Trace:
    """One run of a small model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.prefix = f"{model.base_model_prefix}.layers."
        self.norm: nn.Module | None = None
        self.layers = self._run(layers_of(model))

    @torch.no_grad()
    def _run(self, layers: nn.ModuleList) -> list[RanLayer]:
        found: dict[int, RanLayer] = {}
        calls: list[Call] = []
        entered: list[Tensor] = []
        hooks = []

        def keep_child(name: str, module: Any, args: Any, call: Any, output: Any) -> None:
            read = args[0] if args else call.get("hidden_states", next(iter(call.values()), None))
            gave = tensor_of(output)
            if isinstance(read, Tensor) and isinstance(gave, Tensor):
                calls.append(Call(name, read.clone(), gave.clone()))

        def enter(module: Any, args: Any, call: Any) -> None:
            calls.clear()
            entered[:] = [(args[0] if args else call["hidden_states"]).clone()]

        def leave(index: int, module: Any, args: Any, call: Any, output: Any) -> None:
            call = {key: value for key, value in call.items() if key != "hidden_states"}
            if index in found:
                raise TruedepthError("its layers run more than once")
            y = tensor_of(output)
            found[index] = RanLayer(module, entered[0], args[1:], call, y.clone(), tuple(calls))

        for index, layer in enumerate(layers):
            hooks.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
            for name, child in layer.named_children():
                hook = functools.partial(keep_child, name)
                hooks.append(child.register_forward_hook(hook, with_kwargs=True))
            hook = functools.partial(leave, index)
            hooks.append(layer.register_forward_hook(hook, with_kwargs=True))

        def behind(module: nn.Module, args: Any, call: Any) -> None:
            if self.norm is None and found and args and same(args[0], found[len(found) - 1].y):
                self.norm = module

        for child in self.model.base_model.children():
            if child is not layers:
                hooks.append(child.register_forward_pre_hook(behind, with_kwargs=True))
        ids = torch.arange(LENGTH)[None] * 5 % 59 + 3
        try:
            self.model(input_ids=ids, use_cache=False)
        except TruedepthError:
            raise
        except Exception as error:
            raise TruedepthError(
                f"a small model of its kind does not run: {reason_of(error)}"
            ) from error
        finally:
            for each in hooks:
                each.remove()
        if len(found) < len(layers):
            raise TruedepthError("not all of its layers run")
        return [found[index] for index in range(len(layers))]

    def family(self) -> Family:
        """What it shows."""
        forms = [self._form(layer) for layer in self.layers]
        if odd := next((index for index, form in enumerate(forms) if form != forms[0]), None):
            raise TruedepthError(
                f"its layers differ: layer 0 has {_said(forms[0])}, layer {odd} {_said(forms[odd])}"
            )
        attention, ffn, parallel, multiplier = forms[0]
        config, body = type(self.model.config).__name__, type(self.model.base_model).__name__
        prefix = type(self.model).__name__.removesuffix("ForCausalLM")
        body_prefix = config.removesuffix("Config")
        if body != f"{body_prefix}Model":
            raise TruedepthError(f"its classes {config} and {body} are not named alike")
        form = _form_of(attention, ffn, parallel, multiplier)
        inside = [
            Inside(layer, form, kind, self._reducers()) for layer in self.layers for kind in KINDS
        ]
        mixture = any(each.is_mixture for each in inside)
        return Family(
            model_type=self.model.config.model_type,
            class_prefix=prefix,
            body_prefix=body_prefix,
            reads=_joined(each.reads for each in inside),
            writes=_joined(each.writes for each in inside),
            traced=True,
            is_mixture=mixture,
            summands=_joined(each.summands for each in inside),
            heads={},
            attention=attention,
            ffn=ffn,
            parallel=parallel,
            multiplier=multiplier,
            layer=f"{self.prefix}{{}}.",
            outside=self._outside(),
            side_by_side_only="its FFN is a mixture of experts"
            if mixture
            else "no wide layer is known for this family",
        )

    def _reducers(self) -> set[str]:
        """Modules of a layer behind which transformers sums over tensor-parallel ranks."""
        plan = getattr(self.model.config, "base_model_tp_plan", None) or {}
        return {
            name.removeprefix("layers.*.")
            for name, style in plan.items()
            if name.startswith("layers.*.") and style in REDUCING
        }

    def _outside(self) -> tuple[str, str, str]:
        """The embedding, the norm behind the last layer, and the head."""
        names = {id(module): name for name, module in self.model.named_modules()}
        ends = (self.model.get_input_embeddings(), self.norm, self.model.get_output_embeddings())
        if any(id(module) not in names for module in ends):
            raise TruedepthError("it has no embedding, final norm and head that are modules")
        first, norm, head = (names[id(module)] for module in ends)
        return first, norm, head

    def _form(self, layer: RanLayer) -> Any:
        """The names of a layer's sub-layers, whether they are parallel, and their multiplier."""
        branches = _branches(layer)
        said = "; ".join(" -> ".join(call.name for call in branch) for branch in branches)
        refusal = TruedepthError(f"its layers are not x + A(N x), x + F(N x) (they run {said})")
        if len(branches) != 2:
            raise refusal
        middle = branches[1][0].read
        parallel = same(middle, layer.x)
        sublayers = []
        for branch, entered in zip(branches, (layer.x, middle), strict=True):
            names = _sublayer(branch, layer.module)
            if names is None or not same(branch[0].read, entered):
                raise refusal
            sublayers.append(names)
        scale = _scale(
            layer.y - layer.x - branches[1][-1].gave if parallel else middle - layer.x,
            branches[0][-1].gave,
        )
        multiplier = _multiplier(layer.module, scale)
        form = _form_of(sublayers[0], sublayers[1], parallel, multiplier)
        if not self._holds(layer, form):
            raise refusal
        return (*sublayers, parallel, multiplier)

    @torch.no_grad()
    def _holds(self, layer: RanLayer, form: LayerForm) -> bool:
        """Whether the sub-layers, run one by one, give what the layer gives."""
        x = layer.x
        try:
            a = run_sublayer(layer.module, form, "attention", x, *layer.args, **layer.call)
            f = run_sublayer(layer.module, form, "ffn", x if form.parallel else x + a)
        except Exception:  # arguments that the layer changes, or that only it takes
            return False
        return same(x + a + f, layer.y)


def _form_of(
    attention: SublayerNames, ffn: SublayerNames, parallel: bool, multiplier: str | None
) -> LayerForm:
    first, second = ([each.module, each.norm, each.post_norm] for each in (attention, ffn))
    return LayerForm(first, second, parallel, multiplier)


def _joined(names: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """Each once, in the order of their first use."""
    return tuple(dict.fromkeys(name for each in names for name in each))


def _branches(layer: RanLayer) -> list[list[Call]]:
    """The modules of a layer in chains in which each reads what the one before gave.

    What changes nothing (dropout) or gives something else than a state is left out.
    """
    found: list[list[Call]] = []
    for call in layer.children:
        if call.gave.shape != layer.x.shape or same(call.read, call.gave):
            continue
        if found and same(found[-1][-1].gave, call.read):
            found[-1].append(call)
        else:
            found.append([call])
    return found


def _sublayer(branch: Sequence[Call], layer: nn.Module) -> SublayerNames | None:
    """A chain `norm -> module -> norm behind`, of which either norm may be missing."""
    bodies = [call.name for call in branch if _has_maps(layer.get_submodule(call.name))]
    names = [call.name for call in branch]
    if len(bodies) != 1 or len(names) > 3:
        return None
    before, behind = (part for part in _around(names, bodies[0]))
    if len(before) > 1 or len(behind) > 1:
        return None
    return SublayerNames(bodies[0], *before or (None,), *behind or (None,))


def _around(names: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    at = list(names).index(name)
    return list(names[:at]), list(names[at + 1 :])


def _has_maps(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _scale(added: Tensor, gave: Tensor) -> float:
    return float((added * gave).sum() / gave.square().sum())


def _multiplier(layer: nn.Module, scale: float) -> str | None:
    """The layer's attribute of this value; None for 1."""
    if abs(scale - 1) < CLOSE:
        return None
    values = {k: v for k, v in vars(layer).items() if isinstance(v, float)}
    return next((k for k, v in values.items() if abs(v - scale) < CLOSE * abs(v)), "")


def _said(form: Iterable[Any]) -> str:
    attention, ffn, *_ = form
    return f"{attention.module} and {ffn.module}"
