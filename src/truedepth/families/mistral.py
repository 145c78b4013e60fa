"""Mistral: Llama's layers, here and there with a sliding window."""

from dataclasses import replace

from truedepth.families.llama import LLAMA

MISTRAL = replace(LLAMA, model_type="mistral", class_prefix="Mistral")
