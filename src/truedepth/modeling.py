"""Decoder-only models whose layers differ in width: the classes of truedepth checkpoints.

`config.layer_widths[i]` is the number of original layers that layer i runs side by side. Layer i is
the model family's own decoder layer, built from the model's config with head counts and FFN width
multiplied by that number. The rest of the model is the family's own code, so attention back ends,
caches, generation and tensor-parallel plans are those of the original.

Other layers stay as they are. `config.stages` says which of their sub-layers read the same state,
such as `["F14", "A15"]`, an FFN and the next layer's attention; `config.side_by_side`, which layers
that cannot be merged read the same input; and `config.sublayers`, how such layers compute.

`TruedepthLlamaForCausalLM` is made from `transformers.LlamaForCausalLM` when it is first asked for,
and so for every family. This file is copied into every checkpoint and imports only torch and
transformers, so that checkpoints load with `trust_remote_code=True` where truedepth is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

PREFIX = "Truedepth"

WIDENED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""The values of a config that grow with a layer's width."""


class LayerConfig:
    """The model's config as a layer of a given width sees it.

    It is a live view, not a copy: `model.set_attn_implementation(...)` changes the model's config
    after construction, and wide layers must follow.
    """

    def __init__(self, config: Any, width: int) -> None:
        self._config = config
        self._width = width

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_config", "_width"):  # copy and pickle ask early
            raise AttributeError(name)
        value = getattr(self._config, name)
        return value * self._width if name in WIDENED else value


class LayerWidthsConfig:
    """Adds to a config `layer_widths` (one integer per layer), `stages` (neighbouring sub-layers
    that read one state), `side_by_side` (groups of layers that run on one input), `sublayers`
    (their `LayerForm`) and `truedepth` (how it was made).
    """

    layer_widths: list[int] | None = None
    stages: list[list[str]] | None = None
    side_by_side: list[list[int]] | None = None
    sublayers: dict[str, Any] | None = None
    truedepth: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if self.layer_widths is None:
            self.layer_widths = [1] * self.num_hidden_layers  # type: ignore[attr-defined]
        widths, depth = self.layer_widths, self.num_hidden_layers  # type: ignore[attr-defined]
        if not isinstance(widths, list) or not all(type(w) is int and w >= 1 for w in widths):
            raise ValueError(
                f"layer_widths must be a list of integers of at least 1, not {widths!r}"
            )
        if len(widths) != depth:
            raise ValueError(
                f"layer_widths has {len(widths)} entries, but num_hidden_layers is {depth}"
            )
        for group in self.side_by_side or ():
            first, size = group[0], len(group)
            if group != list(range(first, first + size)) or first < 0 or first + size > depth:
                raise ValueError(
                    f"side_by_side must hold groups of consecutive layers, not {group}"
                )

        for stage in self.stages or ():
            places = [_place(name) for name in stage]
            first, size = places[0], len(places)
            if places != list(range(first, first + size)) or first < 0 or first + size > 2 * depth:
                raise ValueError(f"stages must hold neighbouring sub-layers, not {stage}")

    def validate_architecture(self) -> None:
        """Check nothing: heads need not divide the hidden size, for `head_dim` is given."""

    @property
    def per_layer_config(self) -> list[Any]:
        """One config per layer; transformers (since 5.20) sizes caches by these."""
        return [
            LayerConfig(self, width) if width > 1 else self for width in self.layer_widths or ()
        ]

    @per_layer_config.setter
    def per_layer_config(self, value: object) -> None:
        raise ValueError("per_layer_config follows from layer_widths and cannot be set")


def _place(sublayer: str) -> int:
    """The place of `A14` or `F14` in the order A0 F0 A1 F1 …; -1 if it is neither."""
    kind, layer = sublayer[:1], sublayer[1:]
    return 2 * int(layer) + (kind == "F") if kind in ("A", "F") and layer.isdecimal() else -1


class LayerWidthsModel:
    """Replaces layers of width 2 and more by the family's own layer, built wider, and makes the
    sub-layers of each stage in `stages`, and the layers of each group in `side_by_side`, read one
    state.
    """

    def __init__(self, config: Any) -> None:
        ranks = getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        if heads % ranks or kv_heads % ranks:  # transformers would shard within heads
            raise ValueError(
                f"{heads} heads and {kv_heads} KV heads are not divisible by {ranks}"
                f" tensor-parallel ranks; convert the original with truedepth convert --pad-heads"
                f" {ranks}"
            )
        super().__init__(config)  # type: ignore[call-arg]
        layers = self.base_model.layers  # type: ignore[attr-defined]
        for index, width in enumerate(config.layer_widths):
            if width > 1:
                layers[index] = wide_layer(layers[index], config, width, index)
        for stage in config.stages or ():
            merge_stage(layers, LayerForm(**config.sublayers), [_place(name) for name in stage])
        for group in config.side_by_side or ():
            for index in group:
                mix_into(layers[index], SideBySide, LayerForm(**config.sublayers))
            layers[group[0]].is_first, layers[group[-1]].is_last = True, True
            # a tuple, so that they do not become submodules of the last layer
            layers[group[-1]].members = tuple(layers[index] for index in group)
        self.post_init()  # type: ignore[attr-defined]


def wide_layer(layer: nn.Module, config: Any, width: int, index: int) -> nn.Module:
    """A layer of the same class, `width` times as wide, with new weights.

    Args:
        layer: A layer of a model of the original family.
        config: The model's config, with `head_dim`: a wide layer's heads do not determine it.
        width: The width as a multiple of the layer's.
        index: The layer's index in the model.
    """
    own = LayerConfig(config, width)
    wide: nn.Module = type(layer)(own, index)
    _give_heads_their_gains(wide, own)
    return wide


def _give_heads_their_gains(layer: nn.Module, config: Any) -> None:
    """Give every head its own q and k gains: a wide layer's heads come from different layers."""
    heads = {"q_norm": config.num_attention_heads, "k_norm": config.num_key_value_heads}
    for module in list(layer.modules()):
        for name, norm in module.named_children():
            if name in heads and norm.weight.ndim == 1:
                setattr(module, name, HeadNorm(norm, heads[name]))


class HeadNorm(nn.Module):
    """RMSNorm over each head, with gains per head: weight `[heads, head_dim]`."""

    def __init__(self, norm: Any, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach().expand(heads, -1).clone())
        self.variance_epsilon = norm.variance_epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Takes and gives `[..., heads, head_dim]`; under tensor parallelism, this rank's heads."""
        gains: Tensor = self.weight
        held = hidden_states.shape[-2]
        if held < len(gains):
            start = torch.distributed.get_rank() % (len(gains) // held) * held
            gains = gains[start : start + held]
        x = hidden_states.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return gains * x.to(hidden_states.dtype)


@dataclass(frozen=True)
class LayerForm:
    """How the layers of a model compute, by names within a layer; `sublayers` in config.json."""

    attention: Sequence[str | None]
    """Names of the attention, the norm before it and the norm after it; None for a missing norm."""

    ffn: Sequence[str | None]
    """Names of the FFN, the norm before it and the norm after it."""

    parallel: bool
    """Whether attention and FFN read the same state."""

    multiplier: str | None
    """The layer's attribute by which attention's and the FFN's outputs are multiplied, if any."""

    writes: Sequence[str] | None = None
    """Names of the linear maps of attention and FFN that write to the residual stream."""


class Staged:
    """Mixed into the layers that have a sub-layer in a stage of several:

        y = x + Σ_s s(N_s x)

    A layer at whose end a stage is open passes on x and the sum so far, `[2, batch, length,
    hidden]`. Over several ranks that is the sum of a rank's parts; the stage ends in an all-reduce.
    """

    continues = joined = leaves_open = False
    """Whether the attention is in the stage of the layer before, whether the FFN is in that of the
    attention, and whether the next layer's attention is in that of the FFN."""

    form: LayerForm

    def forward(self, hidden_states: Tensor, *args: Any, **call: Any) -> Tensor:
        """From the stream, or x and a sum, to the stream, or x and a sum."""
        attention, ffn = self.form.writes or (None, None)
        x, so_far = hidden_states.unbind(0) if self.continues else (hidden_states, None)
        added = run_sublayer(self, self.form, "attention", x, *args, **call)
        added = added if so_far is None else so_far + added
        if self.joined:
            added = added + run_sublayer(self, self.form, "ffn", x)
        else:
            x = x + self._whole(added, attention)
            added = run_sublayer(self, self.form, "ffn", x)
        if self.leaves_open:
            return torch.stack([x, added])
        return x + self._whole(added, ffn)

    def _whole(self, added: Tensor, writer: str | None) -> Tensor:
        """The sum over all ranks of a stage that ends with this writing map."""
        module = None if writer is None else self.get_submodule(writer)  # type: ignore[attr-defined]
        return module.summed(added) if isinstance(module, PartOfSum) else added


class PartOfSum(nn.Linear):
    """A map that writes to the residual stream, in a stage of several.

    Under tensor parallelism transformers puts a function into the place of `forward` that ends in
    an all-reduce. That is left out here: the stage has one of its own, behind the sum.
    """

    def _part(self, features: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if isinstance(weight, DTensor):
            mesh = weight.device_mesh
            if features.shape[-1] == self.in_features:  # whole, as behind maps that are packed
                features = DTensor.from_local(features, mesh, [Replicate()])
                features = features.redistribute(mesh, [Shard(-1)]).to_local()
            bias = bias.to_local() if isinstance(bias, DTensor) else bias
            weight, bias = weight.to_local(), bias if mesh.get_local_rank() == 0 else None
        return nn.functional.linear(features, weight, bias)

    forward = property(lambda self: self._part, lambda self, replacement: None)

    def summed(self, part: Tensor) -> Tensor:
        """The sum of all ranks' parts, `[batch, length, hidden]`."""
        if not isinstance(self.weight, DTensor):
            return part
        mesh = self.weight.device_mesh
        if not part.requires_grad:
            torch.distributed.all_reduce(part, group=mesh.get_group())
            return part
        whole = DTensor.from_local(part, mesh, [Partial()]).redistribute(mesh, [Replicate()])
        return whole.to_local()


def merge_stage(layers: Any, form: LayerForm, places: Sequence[int]) -> None:
    """Let neighbouring sub-layers read one state, in place.

    Args:
        layers: A model's decoder layers.
        form: How they compute.
        places: The sub-layers' places in the order A0 F0 A1 F1 …
    """
    for place in places:
        layer = layers[place // 2]
        if not isinstance(layer, Staged):
            mix_into(layer, Staged, form)
        if form.writes:
            layer.get_submodule(form.writes[place % 2]).__class__ = PartOfSum
    for before in places[:-1]:
        if before % 2:
            layers[before // 2].leaves_open = layers[before // 2 + 1].continues = True
        else:
            layers[before // 2].joined = True


def mix_into(layer: Any, behaviour: type, form: LayerForm) -> None:
    """Give a layer the forward of `Staged` or `SideBySide`, in place."""
    own = type(layer)
    layer.__class__ = type(own.__name__, (behaviour, own), {"__module__": own.__module__})
    layer.form = form


class SideBySide:
    """Mixed into the layers of a group that run on one input x:

        a = x + Σ A_i(N_i x)        y = a + Σ F_i(N'_i a)

    In `parallel` families the FFNs read x instead of a. Layers before the last pass on x and the
    sum a so far, `[2, batch, length, hidden]`; the last returns y.
    """

    is_first = is_last = False
    members: tuple[Any, ...] = ()
    form: LayerForm

    def forward(self, hidden_states: Tensor, *args: Any, **call: Any) -> Tensor:
        """From x (the first layer) or x and a: x and a, or y (the last layer)."""
        x, a = (hidden_states, hidden_states) if self.is_first else hidden_states.unbind(0)
        a = a + run_sublayer(self, self.form, "attention", x, *args, **call)
        if not self.is_last:
            return torch.stack([x, a])
        y, entered = a, x if self.form.parallel else a
        for member in self.members:
            y = y + run_sublayer(member, self.form, "ffn", entered)
        return y


def run_sublayer(
    layer: Any, form: LayerForm, kind: str, x: Tensor, *args: Any, **call: Any
) -> Tensor:
    """What a sub-layer adds to the residual stream, `s(N_s x)`: `[batch, length, hidden]`.

    Args:
        layer: The decoder layer.
        form: Names the layer's modules, norms and multiplier.
        kind: `attention` or `ffn`.
        x: The residual stream, `[batch, length, hidden]`.
        args: Positional arguments for the module: for attention, those that the layer gets.
        call: Keyword arguments for the module.
    """
    module, norm, post_norm = getattr(form, kind)
    if norm is not None:
        x = layer.get_submodule(norm)(x)
    output = layer.get_submodule(module)(x, *args, **call)
    added: Tensor = output[0] if isinstance(output, tuple) else output
    if post_norm is not None:
        added = layer.get_submodule(post_norm)(added)
    return added if form.multiplier is None else added * getattr(layer, form.multiplier)


_AUTO = {"Config": "AutoConfig", "Model": "AutoModel", "ForCausalLM": "AutoModelForCausalLM"}


def __getattr__(name: str) -> Any:
    """`Truedepth<Family>Config`, `…Model` and `…ForCausalLM`, made when first asked for.

    Making them ahead would import every family's model code with this file.
    """
    suffix = next((suffix for suffix in _AUTO if name.endswith(suffix)), "")
    base = getattr(transformers, name.removeprefix(PREFIX), None) if suffix else None
    if not name.startswith(PREFIX) or base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = _config_class(name, base) if suffix == "Config" else _model_class(name, base)
    made.register_for_auto_class(_AUTO[suffix])  # save_pretrained copies this file too
    globals()[name] = made
    return made


def _config_class(name: str, base: Any) -> Any:
    fields = LayerWidthsConfig.__annotations__
    body = {
        "__module__": __name__,
        "model_type": f"{PREFIX.lower()}_{base.model_type}",
        # transformers makes a config class a dataclass of the fields in its own body.
        "__annotations__": fields,
        **dict.fromkeys(fields),
    }
    return type(name, (LayerWidthsConfig, base), body)


def _model_class(name: str, base: Any) -> Any:
    config_class = getattr(sys.modules[__name__], f"{PREFIX}{base.config_class.__name__}")
    body = {"__module__": __name__, "config_class": config_class}
    return type(name, (LayerWidthsModel, base), body)


def auto_map(classes: tuple[str, str, str]) -> dict[str, str]:
    """config.json's `auto_map`: where transformers finds the classes when it runs remote code.

    Args:
        classes: Names of the family's config, model and model with a head: `LlamaConfig`, ….
    """
    module = __name__.rpartition(".")[2]
    return {
        auto: f"{module}.{PREFIX}{name}" for name, auto in zip(classes, _AUTO.values(), strict=True)
    }
