"""Granite: Llama's layers with outputs multiplied by a constant. Other constants scale attention,
embedding and logits; no plan changes these.
"""

from dataclasses import replace

from truedepth.families.llama import LLAMA

GRANITE = replace(
    LLAMA, model_type="granite", class_prefix="Granite", multiplier="residual_multiplier"
)

FAMILIES = (GRANITE,)
