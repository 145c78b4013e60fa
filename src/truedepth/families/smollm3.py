"""SmolLM3: Llama's layers, some of them without RoPE."""

from dataclasses import replace

from truedepth.families.llama import LLAMA

SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    class_prefix="SmolLM3",
    per_layer=("layer_types", "no_rope_layers"),
)

FAMILIES = (SMOLLM3,)
