"""Granite: Llama's layers, their outputs multiplied by a number; others scale attention, embedding
and logits, which no plan changes.
"""

from dataclasses import replace

from truedepth.families.llama import LLAMA

GRANITE = replace(
    LLAMA, model_type="granite", class_prefix="Granite", multiplier="residual_multiplier"
)

FAMILIES = (GRANITE,)
