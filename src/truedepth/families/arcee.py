"""Arcee (AFM): Llama's attention, and an FFN without a gate."""

from dataclasses import replace

from truedepth.families.llama import LLAMA

ARCEE = replace(
    LLAMA,
    model_type="arcee",
    class_prefix="Arcee",
    reads=(*LLAMA.reads[:3], "mlp.up_proj"),
)

FAMILIES = (ARCEE,)
