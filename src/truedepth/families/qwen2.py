"""Qwen2 and Qwen2.5: Llama's layers with biases on queries, keys and values."""

from dataclasses import replace

from truedepth.families.llama import LLAMA

QWEN2 = replace(LLAMA, model_type="qwen2", class_prefix="Qwen2")
