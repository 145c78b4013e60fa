"""What widening has to know of a model family, one small file a family.

Families are data. A decoder layer reads the residual stream through linear maps that follow a norm,
and writes to it through linear maps whose output is added to it; that, and the names, is all that
widening needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from truedepth.errors import TruedepthError


@dataclass(frozen=True)
class Family:
    """Names of one family's tensors, as transformers calls them."""

    model_type: str
    """`model_type` in config.json."""

    class_prefix: str
    """What transformers' class names begin with: `Llama` for `LlamaForCausalLM`."""

    reads: Mapping[str, str]
    """Linear maps that read the residual stream -> the norm before them, whose gain they absorb."""

    writes: tuple[str, ...]
    """Linear maps whose output is added to the residual stream."""

    heads: Mapping[str, str]
    """Linear maps whose rows (or columns, where they write) are heads -> what config.json calls the
    number of these."""

    obsolete: tuple[str, ...] = ()
    """Tensors of a layer that old checkpoints carry and no current model class reads."""

    layer: str = "model.layers.{}."
    """Prefix of the tensors of one layer."""

    outside: tuple[str, ...] = ("model.embed_tokens", "model.norm", "lm_head")
    """Modules that belong to no layer."""

    tied: tuple[str, str] = ("lm_head.weight", "model.embed_tokens.weight")
    """The tensor that tied embeddings leave out, and the one that stands for it."""

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms of a layer, each once, in the order of their first use."""
        return tuple(dict.fromkeys(self.reads.values()))

    @property
    def branches(self) -> tuple[tuple[str, str], ...]:
        """Norm and module of attention, then of FFN: `(("input_layernorm", "self_attn"), …)`."""
        pairs = ((norm, name.rpartition(".")[0]) for name, norm in self.reads.items())
        return tuple(dict.fromkeys(pairs))

    @property
    def modules(self) -> tuple[str, ...]:
        """Every module of a layer that has parameters."""
        return (*self.norms, *self.reads, *self.writes)

    @property
    def layer_tensors(self) -> set[str]:
        """Every tensor that a layer may have: all weights, and biases but of norms."""
        weights = {f"{module}.weight" for module in self.modules}
        return weights | {f"{module}.bias" for module in (*self.reads, *self.writes)}

    def split(self, tensor: str) -> tuple[int | None, str]:
        """`model.layers.3.mlp.up_proj.weight` as `(3, "mlp.up_proj.weight")`.

        A tensor of no layer gives `(None, tensor)`.
        """
        head, tail = self.layer.split("{}")
        if tensor.startswith(head):
            index, separator, rest = tensor.removeprefix(head).partition(tail)
            if separator and index.isdecimal():
                return int(index), rest
        return None, tensor


def all_families() -> Iterator[Family]:
    """Every supported family."""
    from truedepth.families.llama import LLAMA
    from truedepth.families.mistral import MISTRAL
    from truedepth.families.qwen2 import QWEN2

    yield from (LLAMA, MISTRAL, QWEN2)


def head_dim(config: Mapping[str, Any]) -> int:
    """Of a config.json, which need not say it."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


CONVERTED = "truedepth_"
"""Before the `model_type` of the original, that of a layer-parallel checkpoint."""


def unconverted(model_type: str) -> str:
    """`llama` for `truedepth_llama`."""
    return model_type.removeprefix(CONVERTED)


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json.

    Raises:
        TruedepthError: The family is unknown, or this model of it cannot be widened exactly.
    """
    model_type = str(config.get("model_type"))
    known = {family.model_type: family for family in all_families()}
    if model_type.startswith(CONVERTED):
        raise TruedepthError(
            f"{where} is layer-parallel already; convert the model that it was made from instead."
        )
    if model_type not in known:
        raise TruedepthError(
            f"{where} is of the family {model_type!r}, which is not supported;"
            f" supported: {', '.join(sorted(known))}."
        )
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise TruedepthError(
            f"{where} holds quantized weights ({method or 'of an unknown method'}), which cannot be"
            " folded exactly; convert the unquantized model and quantize the result."
        )
    return known[model_type]


def original_family(config: Mapping[str, Any], where: str) -> Family:
    """The family of a model, or of the original of a layer-parallel checkpoint.

    Raises:
        TruedepthError: As `family_of` does.
    """
    return family_of({**config, "model_type": unconverted(str(config.get("model_type")))}, where)
