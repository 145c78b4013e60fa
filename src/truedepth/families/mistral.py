"""Mistral and Ministral: Llama's layers, in some models with a sliding window."""

from dataclasses import replace

from truedepth.families.llama import LLAMA

MISTRAL = replace(LLAMA, model_type="mistral", class_prefix="Mistral")
MINISTRAL = replace(LLAMA, model_type="ministral", class_prefix="Ministral")
MINISTRAL3 = replace(LLAMA, model_type="ministral3", class_prefix="Ministral3")

FAMILIES = (MISTRAL, MINISTRAL, MINISTRAL3)
